"""The results of `arms.py`: one row per arm with means, deviations over seeds and intervals over items, as text and picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr

from unified_lm.core.files import write_json, write_text
from unified_lm.evaluation.bootstrap import bootstrap_interval
from unified_lm.reporting.curves import PALETTE

ALIGNMENTS = ("same_token", "next_token")


def summarize(found: Sequence[dict[str, Any]], gold: np.ndarray) -> dict[str, Any]:
    """One column per task: the value of every seed, their mean and standard deviation, and an interval over items.

    Args:
        found: the scores of an arm, one dictionary per seed.
        gold: float64 `[N]`, human scores of the sentence pairs.
    """
    columns: dict[str, Any] = {}
    sts = [np.array(scores["sts"]) for scores in found if "sts" in scores]
    if sts:
        values = [_spearman(gold, cosine) for cosine in sts]
        columns["STS-B dev"] = _column(values, lambda human, *all_: fmean(_spearman(human, c) for c in all_), gold, *sts)
    retrieval = [np.array(scores["retrieval"]) * 100 for scores in found if "retrieval" in scores]
    if retrieval:
        values = [float(queries.mean()) for queries in retrieval]
        columns["pydocs nDCG@10"] = _column(values, lambda *all_: float(np.mean(all_)), *retrieval)
    for name in ("ami", "accuracy"):
        draws = [np.array(scores["labels"][name]) * 100 for scores in found if "labels" in scores]
        if draws:
            columns[f"labels, {name}"] = _column([float(d.mean()) for d in draws], lambda *all_: float(np.mean(all_)), *draws)
    for alignment in ALIGNMENTS:
        words = [scores["words"][alignment] for scores in found if "words" in scores]
        if words:
            ends = {end: 100 * fmean(word[end] for word in words) for end in ("low", "high", "baseline")}
            columns[f"words, {alignment.replace('_', ' ')}"] = {**_spread([100 * word["score"] for word in words]), **ends}
    return columns


def _spearman(gold: np.ndarray, cosine: np.ndarray) -> float:
    return float(spearmanr(gold, cosine).statistic) * 100


def _column(values: list[float], statistic: Callable[..., float], *samples: np.ndarray) -> dict[str, Any]:
    interval = bootstrap_interval(statistic, *samples)
    return {**_spread(values), "low": interval.low, "high": interval.high}


def _spread(values: list[float]) -> dict[str, Any]:
    return {"values": values, "mean": fmean(values), "deviation": stdev(values) if len(values) > 1 else None}


def cell(column: dict[str, Any] | None) -> str:
    """ "54.2 ± 0.3 [52.0, 56.1]"; "-" where there is no number."""
    if column is None:
        return "-"
    deviation = "" if column["deviation"] is None else f" ± {column['deviation']:.1f}"
    return f"{column['mean']:.1f}{deviation} [{column['low']:.1f}, {column['high']:.1f}]"


def write_results(
    table: dict[str, dict[str, Any]], seeds: dict[str, list[int | None]], num_pairs: int, num_queries: int, out: Path
) -> None:
    """Print the table, and write arms.json, arms.md and arms.png.

    Args:
        table: arm -> columns, from `summarize`.
        seeds: arm -> its seeds; None for an arm without training.
        num_pairs: number of sentence pairs.
        num_queries: number of queries, and of documents.
        out: existing folder.
    """
    columns = list(dict.fromkeys(name for row in table.values() for name in row))
    headings = ["arm", "seeds", *columns]
    rows = [
        [arm, ", ".join("-" if seed is None else str(seed) for seed in seeds[arm]), *(cell(row.get(name)) for name in columns)]
        for arm, row in table.items()
    ]
    shown = Table(*headings)
    for row in rows:
        shown.add_row(*row)
    Console().print(shown)
    note = (
        f"Mean ± standard deviation over seeds, [95 % interval over items]. {num_pairs} sentence pairs, "
        f"{num_queries} queries over as many documents. Untrained arms have no seed."
    )
    lines = [headings, ["---"] * len(headings), *rows]
    write_text(out / "arms.md", "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{note}\n")
    write_json(out / "arms.json", {"note": note, "seeds": seeds, "arms": table})
    draw(table, columns, out / "arms.png")
    for name in ("arms.md", "arms.json", "arms.png"):
        print(out / name)


def draw(table: dict[str, dict[str, Any]], columns: Sequence[str], target: Path) -> None:
    """Draw a panel per task: the mean with its interval over items, and a small point for every seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = (1.5 + 2.9 * len(columns), 0.42 * len(table) + 1.3)
    figure, axes = plt.subplots(1, len(columns), figsize=size, sharey=True, layout="constrained", squeeze=False)
    for axis, name in zip(axes.flat, columns, strict=True):
        for row, values in enumerate(table.values()):
            if name not in values:
                continue
            column = values[name]
            axis.plot([column["low"], column["high"]], [row, row], color="#adb5bd", linewidth=2, zorder=1)
            axis.scatter(column["values"], [row] * len(column["values"]), s=14, color=PALETTE[1], zorder=3)
            axis.scatter([column["mean"]], [row], s=46, color=PALETTE[0], zorder=2)
            label = {"xytext": (0, 7), "textcoords": "offset points", "ha": "center", "fontsize": 8}
            axis.annotate(f"{column['mean']:.1f}", (column["mean"], row), **label)
        axis.set_title(name, fontsize=10, loc="left")
        axis.set_ylim(len(table) - 0.4, -0.7)
        axis.margins(x=0.12)
        axis.grid(alpha=0.25, axis="x")
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_yticks(range(len(table)), list(table), fontsize=9)
    figure.supxlabel("blue: mean; orange: each seed; grey: 95 % interval over items", fontsize=8)
    figure.savefig(target, dpi=130)
    plt.close(figure)
