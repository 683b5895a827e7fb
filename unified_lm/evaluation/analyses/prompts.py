"""How much do vectors depend on the prompt? Li and Zhou 2024 (arXiv:2410.10814), section 4.3: nine prompts.

Every prompt embeds the same sentence pairs, from its last token under causal attention, as the paper does. Two questions: how
far scores spread over prompts, and how well the similarities of the same pairs under two prompts are correlated.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import numpy as np

from unified_lm.core.errors import ConfigError
from unified_lm.data.prompts.templates import QUOTED
from unified_lm.evaluation.analyses.base import Analysis, AnalysisSettings, Material, Numbers, rounded
from unified_lm.evaluation.analyses.figure import HEAT, PALETTE, finish, heat_legend, save, subplots
from unified_lm.evaluation.analyses.routed import embed_parts, prompted
from unified_lm.evaluation.analyses.standardize import rank_correlation
from unified_lm.evaluation.analyses.texts import ScoredPairs, fingerprint, read_scored_pairs
from unified_lm.evaluation.result_table import ResultTable
from unified_lm.inference.unified import UnifiedLM
from unified_lm.models.moee import METHODS

PROMPTS = tuple(name for name in QUOTED if name != "quoted")
"""The nine prompts of the paper; "quoted" is none."""


def _prepare(settings: AnalysisSettings) -> Material:
    if settings.sts is None:
        raise ConfigError("prompts needs scored sentence pairs: --sts.")
    pairs = read_scored_pairs(settings.sts, settings.num_pairs)
    description = {"pairs": pairs.name, "num_pairs": len(pairs.left), "prompts": list(PROMPTS)}
    return Material(description, fingerprint(vars(pairs), pairs.scores.tolist(), PROMPTS), pairs)


def _measure(model: UnifiedLM, material: Material, show_progress: bool) -> Numbers:
    pairs: ScoredPairs = material.content
    gate = model.embedder.routers.meaning  # refuses a dense model first
    cosines: dict[str, dict[str, np.ndarray]] = {method: {} for method in METHODS}
    for prompt in PROMPTS:
        behind = prompted(model, prompt)
        left, right = (embed_parts(behind, side, show_progress) for side in (pairs.left, pairs.right))
        for method, of_prompts in cosines.items():
            of_prompts[prompt] = (left.vectors(method) * right.vectors(method)).sum(axis=1)
    spearman = {
        method: {p: rounded(rank_correlation(c, pairs.scores)) for p, c in of.items()} for method, of in cosines.items()
    }
    return {
        "gate": gate,
        "spearman": spearman,
        "deviation": {method: rounded(float(np.std(list(of.values()), ddof=1))) for method, of in spearman.items()},
        "across_prompts": {
            "hs-hs": _across(cosines["hs"], cosines["hs"]),
            "rw-rw": _across(cosines["rw"], cosines["rw"]),
            "hs-rw": _across(cosines["hs"], cosines["rw"]),
        },
        "matrix": {
            method: [[rounded(rank_correlation(a, b)) for b in cosines[method].values()] for a in cosines[method].values()]
            for method in ("hs", "rw")
        },
    }


def _across(first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray]) -> float:
    """Mean Spearman of the similarities of the same pairs under two different prompts."""
    pairs = combinations(first, 2) if first is second else permutations(first, 2)
    return rounded(float(np.mean([rank_correlation(first[a], second[b]) for a, b in pairs])))


def _draw(arms: Mapping[str, Numbers], material: Mapping[str, Any], path: Path) -> Path:
    figure, axes = subplots(1, 1 + 2 * len(arms), 4.4 + 6.2 * len(arms), 4.4)
    box = axes[0][0]
    width = 0.8 / len(arms)
    for index, numbers in enumerate(arms.values()):
        values = [list(of.values()) for of in numbers["spearman"].values()]
        at = np.arange(len(values)) + (index - (len(arms) - 1) / 2) * width
        color = PALETTE[index % len(PALETTE)]
        box.boxplot(values, positions=at, widths=width * 0.85, patch_artist=True, boxprops={"facecolor": color, "alpha": 0.5},
                    medianprops={"color": "black"}, flierprops={"markersize": 3})  # fmt: skip
    box.set_xticks(range(len(METHODS)), METHODS, rotation=15)
    finish(box, f"{len(PROMPTS)} prompts, {material['num_pairs']} pairs of {material['pairs']}", "", "Spearman correlation")
    image, heat = None, list(axes[0][1:])
    names = [name.removeprefix("moee_") for name in PROMPTS]
    for axis, (label, numbers, method) in zip(heat, [(a, n, m) for a, n in arms.items() for m in ("hs", "rw")], strict=True):
        image = axis.imshow(numbers["matrix"][method], vmin=0, vmax=1, cmap=HEAT)
        axis.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
        axis.set_yticks(range(len(names)), names, fontsize=7)
        axis.set_title(f"{label}, {method}", fontsize=9.5, loc="left")
    heat_legend(figure, image, heat, "Spearman of similarities across prompts")
    return save(figure, path)


def _tabulate(arms: Mapping[str, Numbers], material: Mapping[str, Any]) -> ResultTable:
    rows: list[list[Any]] = [
        [label, method, np.mean(list(of.values())).item(), min(of.values()), max(of.values()), numbers["deviation"][method],
         numbers["across_prompts"].get(f"{method}-{method}")]
        for label, numbers in arms.items()
        for method, of in numbers["spearman"].items()
    ]  # fmt: skip
    return ResultTable(
        title="Stability over prompts",
        columns=("model", "method", "mean Spearman", "lowest", "highest", "deviation", "Spearman across prompts"),
        rows=rows,
        note=f"{len(PROMPTS)} prompts, {material['num_pairs']} pairs of {material['pairs']}, causal attention, last token. "
        "Across prompts: mean correlation of the similarities of the same pairs under two prompts.",
    )


PROMPT_STABILITY = Analysis(
    name="prompts",
    summary="how far the scores and similarities of a mixture of experts depend on the paper's nine prompts",
    version=1,
    prepare=_prepare,
    measure=_measure,
    draw=_draw,
    tabulate=_tabulate,
)
