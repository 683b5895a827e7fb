"""Alignment and uniformity: Wang and Isola (2020), arXiv:2005.10242, with their alpha = 2 and t = 2.

Alignment is the mean squared distance between similar texts, uniformity the logarithm of the mean Gaussian potential over all
pairs of texts; lower is better for both. A model that maps every text to one point is perfectly aligned and not uniform at all,
so the two numbers belong together.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from unified_lm.core.errors import DataError
from unified_lm.data.rows.records import Text
from unified_lm.evaluation.analyses.base import Analysis, AnalysisSettings, Material, Numbers, rounded
from unified_lm.evaluation.analyses.figure import MARKERS, PALETTE, arm_legend, finish, save, subplots
from unified_lm.evaluation.analyses.states import pooled_vectors
from unified_lm.evaluation.analyses.texts import PYDOCS, fingerprint, read_retrieval, read_scored_pairs
from unified_lm.evaluation.bootstrap import bootstrap_interval
from unified_lm.evaluation.result_table import ResultTable
from unified_lm.inference.unified import UnifiedLM

ALPHA = 2.0
T = 2.0

Pairs = list[tuple[Text, Text]]


def squared_distances(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Row-wise squared distances of unit vectors `[N, D]`: float64 `[N]`."""
    return ((left - right) ** 2).sum(axis=1)


def alignment(left: np.ndarray, right: np.ndarray) -> float:
    """`mean |x - y|^alpha` over positive pairs of unit vectors `[N, D]` (section 4.1.1)."""
    return float((squared_distances(left, right) ** (ALPHA / 2)).mean())


def uniformity(vectors: np.ndarray) -> float:
    """`log mean exp(-t |x - y|^2)` over all pairs of distinct rows of unit vectors `[N, D]`, N >= 2 (section 4.1.2)."""
    if len(vectors) < 2:
        raise DataError("uniformity needs at least two vectors.")
    distances = np.clip(2 - 2 * (vectors @ vectors.T), 0, None)
    potentials = np.exp(-T * distances)[np.triu_indices(len(vectors), k=1)]
    return float(np.log(potentials.mean()))


def _prepare(settings: AnalysisSettings) -> Material:
    if settings.sts is not None:
        scored = read_scored_pairs(settings.sts, None)
        chosen = [i for i, score in enumerate(scored.scores) if score >= settings.positive_score][: settings.num_pairs]
        pairs = [(Text(scored.left[i]), Text(scored.right[i])) for i in chosen]
        description: dict[str, Any] = {"pairs": scored.name, "least_score": settings.positive_score}
        where = f"{settings.sts} with a score of at least {settings.positive_score:g}"
    else:
        source = settings.retrieval or PYDOCS
        found = read_retrieval(source, settings.num_pairs)
        pairs = [(query, found.documents[min(own)]) for query, own in zip(found.queries, found.relevant, strict=True)]
        description, where = {"pairs": found.name}, source
    if len(pairs) < 2:
        raise DataError(f"{len(pairs)} similar pairs in {where}; at least 2 are needed.")
    description["num_pairs"] = len(pairs)
    return Material(description, fingerprint([(a.text, a.instruction, b.text, b.instruction) for a, b in pairs]), pairs)


def unit_vectors(model: UnifiedLM, texts: list[Text], show_progress: bool) -> np.ndarray:
    """Embed texts, each with its instruction: unit vectors, float64 `[N, D]`."""
    vectors = pooled_vectors(model, texts, show_progress).astype(np.float64)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _measure(model: UnifiedLM, material: Material, show_progress: bool) -> Numbers:
    pairs: Pairs = material.content
    left = unit_vectors(model, [a for a, _ in pairs], show_progress)
    right = unit_vectors(model, [b for _, b in pairs], show_progress)
    aligned = bootstrap_interval(lambda d: float((d ** (ALPHA / 2)).mean()), squared_distances(left, right))
    return {
        "attention": model.attention,
        "num_pairs": len(pairs),
        "alignment": rounded(aligned.value),
        "alignment_low": rounded(aligned.low),
        "alignment_high": rounded(aligned.high),
        "uniformity": rounded((uniformity(left) + uniformity(right)) / 2),  # each side alone, as in the authors' code
        "mean_positive_cosine": rounded(float((left * right).sum(axis=1).mean())),
    }


def _draw(arms: Mapping[str, Numbers], material: Mapping[str, Any], path: Path) -> Path:
    figure, axes = subplots(1, 1, 6.4, 4.8)
    axis = axes[0][0]
    for index, numbers in enumerate(arms.values()):
        error = [[numbers["alignment"] - numbers["alignment_low"]], [numbers["alignment_high"] - numbers["alignment"]]]
        color, marker = PALETTE[index % len(PALETTE)], MARKERS[index % len(MARKERS)]
        axis.errorbar(
            numbers["uniformity"], numbers["alignment"], yerr=np.maximum(error, 0), color=color, marker=marker, markersize=9,
            capsize=3, linewidth=1,
        )  # fmt: skip
    axis.margins(0.2)
    axis.annotate(
        "better", xy=(0.03, 0.03), xytext=(0.13, 0.11), xycoords="axes fraction", fontsize=8, color="#555555",
        arrowprops={"arrowstyle": "->", "color": "#555555"},
    )  # fmt: skip
    pairs = f"{material['num_pairs']} pairs of {material['pairs']}"
    finish(
        axis, f"alignment and uniformity, {pairs}", "uniformity (t = 2), lower is better", "alignment (α = 2), lower is better"
    )
    arm_legend(figure, list(arms), columns=3)
    return save(figure, path)


def _tabulate(arms: Mapping[str, Numbers], material: Mapping[str, Any]) -> ResultTable:
    keys = ("attention", "alignment", "alignment_low", "alignment_high", "uniformity", "mean_positive_cosine")
    return ResultTable(
        title="Alignment and uniformity",
        columns=("model", "attention", "alignment", "alignment, low", "alignment, high", "uniformity", "mean positive cosine"),
        rows=[[label, *(numbers[key] for key in keys)] for label, numbers in arms.items()],
        note=f"{material['num_pairs']} pairs of {material['pairs']}; lower is better for both. 95 % interval: bootstrap over "
        "pairs.",
    )


UNIFORMITY = Analysis(
    name="uniformity",
    summary="alignment of similar pairs and uniformity of all texts",
    version=1,
    prepare=_prepare,
    measure=_measure,
    draw=_draw,
    tabulate=_tabulate,
)
