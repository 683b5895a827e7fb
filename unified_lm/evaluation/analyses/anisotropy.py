"""Do a few dimensions dominate every cosine? Timkey and van Schijndel (2021), arXiv:2109.04404.

The cosine of two vectors is a sum over dimensions, `x_i y_i / (|x| |y|)`, so the mean cosine of random pairs (their estimate of
anisotropy) splits exactly into one contribution per dimension. It is near 0 when no direction is preferred.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from unified_lm.core.errors import DataError
from unified_lm.evaluation.analyses.base import Analysis, AnalysisSettings, Material, Numbers, rounded
from unified_lm.evaluation.analyses.figure import MARKERS, PALETTE, arm_legend, finish, save, subplots
from unified_lm.evaluation.analyses.texts import distinct, fingerprint, read_texts
from unified_lm.evaluation.result_table import ResultTable
from unified_lm.inference.unified import UnifiedLM

ROGUE_RATIO = 10.0
"""A dimension is rogue if its mean magnitude is at least this many times that of the median dimension."""

_TOP = 12


def cosine_contributions(vectors: np.ndarray) -> np.ndarray:
    """The contribution of each dimension to the mean cosine over all pairs of distinct rows; contributions sum to the mean.

    All pairs are covered without sampling: for unit rows u, the sum over pairs of u_i v_i is `((sum u_i)^2 - sum u_i^2) / 2`.

    Args:
        vectors: `[N, D]`, N at least 2, no zero row.

    Returns:
        float64 `[D]`.

    Raises:
        DataError: fewer than two rows, or a zero row.
    """
    rows = np.asarray(vectors, np.float64)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    if len(rows) < 2 or not norms.all():
        raise DataError(
            f"{len(rows)} vectors, {int((norms == 0).sum())} of them zero; a mean cosine needs at least 2, none zero."
        )
    unit = rows / norms
    return (unit.sum(axis=0) ** 2 - (unit**2).sum(axis=0)) / (len(rows) * (len(rows) - 1))


def rogue_dimensions(vectors: np.ndarray) -> list[int]:
    """Dimensions whose mean magnitude is at least `ROGUE_RATIO` times the median dimension's, largest first."""
    magnitude = np.abs(np.asarray(vectors, np.float64)).mean(axis=0)
    found = np.flatnonzero(magnitude >= ROGUE_RATIO * np.median(magnitude))
    return [int(i) for i in found[np.argsort(-magnitude[found])]]


def _prepare(settings: AnalysisSettings) -> Material:
    name, texts = read_texts(settings.texts, settings.num_texts)
    content = distinct(texts)
    return Material({"texts": name, "num_texts": len(content)}, fingerprint(content), content)


def _measure(model: UnifiedLM, material: Material, show_progress: bool) -> Numbers:
    vectors = np.asarray(model.encode(material.content, normalize=False, show_progress=show_progress), np.float64)
    return {
        "attention": model.attention,
        "standardized": model.standardizer is not None,
        **describe(vectors),
    }


def describe(vectors: np.ndarray) -> Numbers:
    """All numbers of the analysis, for unnormalized vectors `[N, D]`."""
    mean, std = vectors.mean(axis=0), vectors.std(axis=0)
    magnitude = np.abs(vectors).mean(axis=0)
    median = float(np.median(magnitude))
    parts = cosine_contributions(vectors)
    total = float(parts.sum())
    rogue = rogue_dimensions(vectors)
    order = np.argsort(-parts)[:_TOP]
    centered = vectors - mean
    rest = np.delete(vectors, rogue, axis=1)
    return {
        "num_texts": len(vectors),
        "dimensions": vectors.shape[1],
        "mean_cosine": rounded(total),
        "mean_cosine_without_rogue": rounded(float(cosine_contributions(rest).sum())),
        "mean_cosine_centered": rounded(float(cosine_contributions(centered).sum())),
        "mean_cosine_standardized": rounded(float(cosine_contributions(centered / np.where(std > 0, std, 1)).sum())),
        "median_magnitude": rounded(median),
        "magnitudes_sorted": rounded(-np.sort(-magnitude), 4),
        "rogue": [_dimension(i, mean, std, magnitude, median, parts, total) for i in rogue],
        "rogue_fraction": rounded(float(parts[rogue].sum()) / total),
        "rogue_magnitude_after_centering": rounded(_largest_ratio(centered, rogue)),
        "top": [_dimension(int(i), mean, std, magnitude, median, parts, total) for i in order],
    }


def _largest_ratio(centered: np.ndarray, rogue: list[int]) -> float:
    """Largest mean magnitude of a rogue dimension after centering, relative to the median dimension; 0 without any."""
    magnitude = np.abs(centered).mean(axis=0)
    return float(magnitude[rogue].max() / np.median(magnitude)) if rogue else 0.0


def _dimension(
    i: int, mean: np.ndarray, std: np.ndarray, magnitude: np.ndarray, median: float, parts: np.ndarray, total: float
) -> dict[str, float]:
    return {
        "dimension": i,
        "mean": rounded(float(mean[i])),
        "std": rounded(float(std[i])),
        "magnitude": rounded(float(magnitude[i])),
        "ratio_to_median": rounded(float(magnitude[i]) / median),
        "fraction_of_mean_cosine": rounded(float(parts[i]) / total),
    }


_BARS = (
    ("mean_cosine", "as they are"),
    ("mean_cosine_without_rogue", "rogue dimensions\nleft out"),
    ("mean_cosine_centered", "centered"),
    ("mean_cosine_standardized", "standardized"),
)


def _draw(arms: Mapping[str, Numbers], material: Mapping[str, Any], path: Path) -> Path:
    figure, axes = subplots(1, 3, 14, 4.3, gridspec_kw={"width_ratios": [1, 1.1, 1.2]})
    width = 0.8 / len(arms)
    for index, numbers in enumerate(arms.values()):
        color, marker = PALETTE[index % len(PALETTE)], MARKERS[index % len(MARKERS)]
        magnitudes = numbers["magnitudes_sorted"]
        axes[0][0].plot(range(1, len(magnitudes) + 1), magnitudes, color=color, linewidth=1.5)
        for rank, dimension in enumerate(numbers["rogue"], start=1):
            axes[0][0].plot(rank, dimension["magnitude"], color=color, marker=marker, markersize=5)
            axes[0][0].annotate(str(dimension["dimension"]), (rank, dimension["magnitude"]), fontsize=7.5, color=color,
                                xytext=(6, 4 - 9 * index), textcoords="offset points")  # fmt: skip
        percentages = [100 * dimension["fraction_of_mean_cosine"] for dimension in numbers["top"]]
        axes[0][1].plot(range(1, len(percentages) + 1), percentages, color=color, marker=marker, markersize=4.5, linewidth=1)
        positions = np.arange(len(_BARS)) + (index - (len(arms) - 1) / 2) * width
        cosines = [numbers[key] for key, _ in _BARS]
        bars = axes[0][2].bar(positions, cosines, width=width * 0.94, color=color)
        named = [f"{round(cosine, 2) + 0.0:.2f}" for cosine in cosines]  # + 0.0: prints no negative zero
        axes[0][2].bar_label(bars, labels=named, fontsize=7, padding=2)
    axes[0][0].set_xscale("log")
    axes[0][0].set_yscale("log")
    axes[0][2].axhline(0, color="#555555", linewidth=0.8)
    axes[0][2].set_xticks(range(len(_BARS)), [name for _, name in _BARS])
    finish(axes[0][0], "magnitudes (numbers: rogue dimensions)", "rank of the dimension (log)", "mean |value| (log)")
    finish(axes[0][1], "fraction of the mean cosine", "rank of the dimension", "fraction (%)")
    finish(axes[0][2], "mean cosine of random pairs", "", "mean cosine")
    arm_legend(figure, list(arms))
    return save(figure, path)


def _tabulate(arms: Mapping[str, Numbers], material: Mapping[str, Any]) -> ResultTable:
    rows = []
    for label, numbers in arms.items():
        rogue = ", ".join(str(dimension["dimension"]) for dimension in numbers["rogue"])
        rows.append(
            [label, numbers["attention"], *(numbers[key] for key, _ in _BARS), rogue or "none", numbers["rogue_fraction"]]
        )
    return ResultTable(
        title="Anisotropy: mean cosine of random pairs",
        columns=(
            *("model", "attention", *(name.replace("\n", " ") for _, name in _BARS)),
            *("rogue dimensions", "their fraction of the mean cosine"),
        ),
        rows=rows,
        note=f"All pairs of {material['num_texts']} texts of {material['texts']}. A dimension is rogue if its mean "
        f"magnitude is at least {ROGUE_RATIO:g} times the median dimension's. Its fraction says "
        "little where the mean cosine is near 0.",
    )


ANISOTROPY = Analysis(
    name="anisotropy",
    summary="mean cosine of random pairs, its largest contributions by dimension, rogue dimensions",
    version=2,
    prepare=_prepare,
    measure=_measure,
    draw=_draw,
    tabulate=_tabulate,
)
