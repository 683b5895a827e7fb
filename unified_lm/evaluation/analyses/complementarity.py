"""Do routing and hidden states say the same of texts? Li and Zhou 2024 (arXiv:2410.10814), section 3.2 and figure 2.

The same texts are clustered by either, and the clusters compared; similarities of random pairs are correlated; and where scored
pairs or queries are given, it is counted how often both get the same ones wrong. Little agreement, with either of them better
than chance, is what makes their sum better than both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata

from unified_lm.core.errors import DataError
from unified_lm.evaluation.agreement import agreement, k_means, require_sklearn
from unified_lm.evaluation.analyses.base import Analysis, AnalysisSettings, Material, Numbers, rounded
from unified_lm.evaluation.analyses.figure import PALETTE, arm_legend, finish, save, subplots
from unified_lm.evaluation.analyses.routed import embed_parts
from unified_lm.evaluation.analyses.standardize import rank_correlation
from unified_lm.evaluation.analyses.texts import (
    RetrievalPairs,
    ScoredPairs,
    distinct,
    fingerprint,
    read_retrieval,
    read_scored_pairs,
    read_texts,
)
from unified_lm.evaluation.result_table import ResultTable
from unified_lm.inference.unified import UnifiedLM

_SEEDS = 5
_PAIRS = 20_000
_WORST = 0.25
"""Share of scored pairs that counts as wrong: those whose rank by cosine is furthest from their rank by score."""


@dataclass(frozen=True)
class _Content:
    texts: list[str]
    clusters: int
    sts: ScoredPairs | None
    retrieval: RetrievalPairs | None


def _prepare(settings: AnalysisSettings) -> Material:
    require_sklearn()
    name, texts = read_texts(settings.texts, settings.num_texts)
    texts = distinct(texts)
    if len(texts) <= settings.clusters:
        raise DataError(f"{len(texts)} texts of {name} cannot form {settings.clusters} clusters; give more texts (--texts).")
    sts = None if settings.sts is None else read_scored_pairs(settings.sts, settings.num_pairs)
    retrieval = None if settings.retrieval is None else read_retrieval(settings.retrieval, settings.num_pairs)
    description = {
        "texts": name,
        "num_texts": len(texts),
        "clusters": settings.clusters,
        "sts": None if sts is None else {"name": sts.name, "num_pairs": len(sts.left)},
        "retrieval": None if retrieval is None else {"name": retrieval.name, "num_queries": len(retrieval.queries)},
    }
    read = [vars(part) if part is not None else None for part in (sts, retrieval)]
    scores = None if sts is None else sts.scores.tolist()
    return Material(
        description, fingerprint(texts, settings.clusters, read, scores), _Content(texts, settings.clusters, sts, retrieval)
    )


def pair_similarities(vectors: np.ndarray, seed: int = 0, most: int = _PAIRS) -> np.ndarray:
    """Cosines of pairs of different texts, float64 `[pairs]`: all of them, or `most` drawn; the same pairs for the same N.

    Args:
        vectors: unit vectors `[N, D]`.
        seed: of the draw.
        most: pairs, at most.
    """
    rows, columns = np.triu_indices(len(vectors), k=1)
    if len(rows) > most:
        chosen = np.random.default_rng(seed).choice(len(rows), most, replace=False)
        rows, columns = rows[chosen], columns[chosen]
    return np.einsum("nd,nd->n", vectors[rows], vectors[columns])


def overlap(first: np.ndarray, second: np.ndarray) -> Numbers:
    """Errors of two views of the same items.

    Args:
        first: bool `[N]`, whether the first view is wrong.
        second: the same of the second one.

    Returns:
        The shares "hs", "rw" and "both", what "by_chance" would be wrong in both, and "jaccard" of the two sets of errors.
    """
    both, either = (first & second).mean(), (first | second).mean()
    shares = {"hs": first.mean(), "rw": second.mean(), "both": both, "by_chance": first.mean() * second.mean()}
    return {key: rounded(float(value)) for key, value in shares.items()} | {
        "jaccard": rounded(float(both / either)) if either else 1.0
    }


def misranked(cosines: np.ndarray, gold: np.ndarray, share: float = _WORST) -> np.ndarray:
    """bool `[N]`: the share of pairs whose rank by cosine is furthest from their rank by score."""
    distance = np.abs(rankdata(cosines) - rankdata(gold))
    wrong = np.zeros(len(distance), bool)
    wrong[np.argsort(-distance, kind="stable")[: round(share * len(distance))]] = True
    return wrong


def _measure(model: UnifiedLM, material: Material, show_progress: bool) -> Numbers:
    content: _Content = material.content
    parts = embed_parts(model, content.texts, show_progress)
    views = {method: parts.vectors(method) for method in ("hs", "rw")}
    clusters = {
        method: [k_means(vectors, content.clusters, seed) for seed in range(_SEEDS)] for method, vectors in views.items()
    }
    found = [agreement(a, b) for a in clusters["hs"] for b in clusters["rw"]]
    again = {
        method: [agreement(a, b)["ami"] for i, a in enumerate(of) for b in of[:i]] for method, of in clusters.items()
    }  # how far k-means agrees with itself from other first centers: no two views can agree more
    result: Numbers = {
        "attention": model.attention,
        "gate": model.embedder.routers.meaning,
        "clusters": {key: rounded(float(np.mean([one[key] for one in found]))) for key in found[0]},
        "ami_with_itself": {method: rounded(float(np.mean(values))) for method, values in again.items()},
        "pair_spearman": rounded(rank_correlation(*(pair_similarities(vectors) for vectors in views.values()))),
        "errors": {},
    }
    if content.sts is not None:
        left, right = (embed_parts(model, side, show_progress) for side in (content.sts.left, content.sts.right))
        cosines = [(left.vectors(method) * right.vectors(method)).sum(axis=1) for method in views]
        result["errors"]["similarity"] = overlap(*(misranked(one, content.sts.scores) for one in cosines))
    if content.retrieval is not None:
        sides = [embed_parts(model, side, show_progress) for side in (content.retrieval.queries, content.retrieval.documents)]
        misses = []
        for method in views:
            queries, documents = (side.vectors(method) for side in sides)
            best = torch.from_numpy(queries @ documents.T).argmax(dim=1).tolist()
            misses.append(np.asarray([at not in own for at, own in zip(best, content.retrieval.relevant, strict=True)]))
        result["errors"]["retrieval"] = overlap(*misses)
    return result


def _draw(arms: Mapping[str, Numbers], material: Mapping[str, Any], path: Path) -> Path:
    kinds = list(next(iter(arms.values()))["errors"])
    figure, axes = subplots(1, 1 + len(kinds), 5.2 + 3.4 * len(kinds), 3.8)
    measures = ("ami", "nmi", "jaccard", "exact", "pair_spearman")
    bar = 0.82 / len(arms)
    for index, numbers in enumerate(arms.values()):
        heights = [numbers["clusters"].get(name, numbers["pair_spearman"]) for name in measures]
        at = np.arange(len(measures)) + (index - (len(arms) - 1) / 2) * bar
        drawn = axes[0][0].bar(at, heights, width=bar * 0.92, color=PALETTE[index % len(PALETTE)])
        axes[0][0].bar_label(drawn, fmt="%.2f", fontsize=7, padding=1)
    axes[0][0].set_xticks(range(len(measures)), ["AMI", "NMI", "Jaccard", "exact", "ρ of pairs"])
    finish(axes[0][0], f"agreement, {material['num_texts']} texts of {material['texts']}", "", "")
    for axis, kind in zip(axes[0][1:], kinds, strict=True):
        keys = ("hs", "rw", "both", "by_chance")
        for index, numbers in enumerate(arms.values()):
            at = np.arange(len(keys)) + (index - (len(arms) - 1) / 2) * bar
            axis.bar(at, [numbers["errors"][kind][key] for key in keys], width=bar * 0.92, color=PALETTE[index % len(PALETTE)])
        axis.set_xticks(range(len(keys)), ["HS", "RW", "both", "by chance"])
        finish(axis, f"wrong: {kind}", "", "share")
    arm_legend(figure, list(arms))
    return save(figure, path)


def _tabulate(arms: Mapping[str, Numbers], material: Mapping[str, Any]) -> ResultTable:
    rows = [[label, "clusters", name, value] for label, numbers in arms.items() for name, value in numbers["clusters"].items()]
    rows += [[label, "pairs", "Spearman", numbers["pair_spearman"]] for label, numbers in arms.items()]
    rows += [
        [label, f"errors of {kind}", name, value]
        for label, numbers in arms.items()
        for kind, shares in numbers["errors"].items()
        for name, value in shares.items()
    ]
    return ResultTable(
        title="Hidden states against routing",
        columns=("model", "of", "measure", "value"),
        rows=rows,
        note=f"{material['clusters']} clusters of {material['num_texts']} texts of {material['texts']}, mean over {_SEEDS} "
        f"k-means of each. Wrong in similarity: the {_WORST:.0%} of pairs that are furthest from their rank; in retrieval: the "
        "first hit.",
    )


COMPLEMENTARITY = Analysis(
    name="complementarity",
    summary="how far clusters, similarities and errors of hidden states and of routing agree",
    version=1,
    prepare=_prepare,
    measure=_measure,
    draw=_draw,
    tabulate=_tabulate,
)
