"""A comparison of runs as a terminal table, CSV, JSON, Markdown and a figure."""

from __future__ import annotations

import csv
import io
import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from unified_lm.core.outputs import check_files, write_file, write_json_file, write_text_file
from unified_lm.evaluation.bootstrap import Interval
from unified_lm.reporting.compare import Arm, Comparison, title_of
from unified_lm.reporting.curves import PALETTE
from unified_lm.reporting.report_numbers import lower_is_better

_NAME = "compare"
_SHOWN_KEYS = 4
"""Maximum number of settings in the table; more of them make it unreadable and are written to the files only."""


def comparison_files(folder: Path) -> list[Path]:
    """What `write_comparison` writes into a folder."""
    return [folder / f"{_NAME}.{ending}" for ending in ("csv", "json", "md", "png")]


def write_comparison(comparison: Comparison, folder: Path) -> list[Path]:
    """Write compare.csv (one row per run), compare.json, compare.md and compare.png, and return their paths."""
    files = comparison_files(folder)
    check_files(files)
    write_text_file(files[0], _csv(comparison))
    write_json_file(files[1], to_json(comparison))
    write_text_file(files[2], to_markdown(comparison))
    draw(comparison, files[3])
    return files


def main_metrics(comparison: Comparison) -> list[str]:
    """The metrics in the table: nDCG under both masks, and losses."""
    return [metric for metric in comparison.metrics if "/recall" not in metric]


def to_table(comparison: Comparison) -> Table:
    """One row per arm: its metrics as mean and standard deviation over seeds. `settings_of` describes the arms."""
    headings, rows = _rows(comparison, ())
    table = Table(title=f"difference to {comparison.reference.name} in brackets: 95 % paired bootstrap", title_justify="left")
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def to_markdown(comparison: Comparison) -> str:
    """The same table including the settings, followed by the notes."""
    headings, rows = _rows(comparison, comparison.differing if len(comparison.differing) <= _SHOWN_KEYS else ())
    lines = [_row(headings), _row(["---", *["---:"] * (len(headings) - 1)]), *map(_row, rows), ""]
    lines.append(
        "Mean over seeds (± standard deviation); ↓: lower is better; in brackets the difference to "
        f"`{comparison.reference.name}` with the 95 % interval of a bootstrap over held-out items, paired."
    )
    lines += ["", *(f"- {note}" for note in comparison.notes)]
    return "\n".join(lines).rstrip() + "\n"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def settings_of(comparison: Comparison, arm: Arm) -> str:
    """Describe an arm by the settings in which the arms differ."""
    return " ".join(f"{key}={_cell(arm.setting(key))}" for key in comparison.differing)


def _rows(comparison: Comparison, keys: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    metrics = main_metrics(comparison)
    headings = ["arm", *(_short_key(key) for key in keys), *(title_of(m) + _arrow(m) for m in metrics)]
    rows = [
        [arm.name, *(_cell(arm.setting(key)) for key in keys), *(_score(comparison, arm, metric) for metric in metrics)]
        for arm in comparison.arms
    ]
    return headings, rows


def _arrow(metric: str) -> str:
    return " ↓" if lower_is_better(metric) else ""


def _short_key(key: str) -> str:
    return key.removeprefix("streams.")


def _cell(value: Any) -> str:
    return textwrap.shorten("-" if value is None else str(value), 40)


def _score(comparison: Comparison, arm: Arm, metric: str) -> str:
    mean, deviation = arm.mean(metric), arm.deviation(metric)
    if mean is None:
        return "-"
    text = f"{mean:.3f}" + (f" ± {deviation:.3f}" if deviation is not None else "")
    difference = comparison.difference(arm, metric)
    return text if difference is None else f"{text} ({_signed(difference)})"


def _signed(interval: Interval) -> str:
    return f"{interval.value:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"


def _csv(comparison: Comparison) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        [
            "arm",
            "seed",
            "folder",
            "step",
            *comparison.differing,
            *comparison.metrics,
            *(f"before {m}" for m in comparison.metrics),
        ]
    )
    for arm in comparison.arms:
        for run in arm.runs:
            settings = [json.dumps(run.settings.get(key)) for key in comparison.differing]
            values = [side.get(metric, "") for side in (run.after, run.before) for metric in comparison.metrics]
            writer.writerow([arm.name, run.seed, run.folder, run.step, *settings, *values])
    return out.getvalue()


def to_json(comparison: Comparison) -> dict[str, Any]:
    """The whole comparison as JSON values: differing settings, values of every run, means, deviations and differences."""
    return {
        "differing": list(comparison.differing),
        "metrics": list(comparison.metrics),
        "reference": comparison.reference.name,
        "notes": list(comparison.notes),
        "arms": [_json_arm(comparison, arm) for arm in comparison.arms],
    }


def _json_arm(comparison: Comparison, arm: Arm) -> dict[str, Any]:
    metrics: dict[str, Any] = {}
    for metric in comparison.metrics:
        difference = comparison.difference(arm, metric)
        metrics[metric] = {
            "mean": arm.mean(metric),
            "deviation": arm.deviation(metric),
            "before": arm.before(metric),
            "difference": None if difference is None else [difference.value, difference.low, difference.high],
        }
    runs = [
        {"folder": str(run.folder), "seed": run.seed, "step": run.step, "finished": run.finished, "values": dict(run.after)}
        for run in arm.runs
    ]
    return {"name": arm.name, "settings": {k: arm.setting(k) for k in comparison.differing}, "metrics": metrics, "runs": runs}


def draw(comparison: Comparison, target: Path) -> Path:
    """Draw a panel per metric: one row per arm, small points for seeds, a large point for their mean, a ring for before."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    metrics = main_metrics(comparison)
    height = 0.38 * len(comparison.arms) + 1.5
    figure, axes = plt.subplots(
        1, len(metrics), figsize=(1.6 + 3.0 * len(metrics), height), sharey=True, layout="constrained", squeeze=False
    )
    for axis, metric in zip(axes.flat, metrics, strict=True):
        _draw_metric(axis, comparison, metric)
    axes[0, 0].set_yticks(range(len(comparison.arms)), [arm.name for arm in comparison.arms], fontsize=9)
    axes[0, 0].invert_yaxis()
    several = any(len(arm.runs) > 1 for arm in comparison.arms)
    legend = "ring: before training; dot: after" + (", mean over seeds (small points)" if several else ", one seed")
    figure.supxlabel(legend, fontsize=8)
    write_file(target, lambda path: figure.savefig(path, dpi=130))
    plt.close(figure)
    return target


def _draw_metric(axis: Any, comparison: Comparison, metric: str) -> None:
    for row, arm in enumerate(comparison.arms):
        mean, before = arm.mean(metric), arm.before(metric)
        if mean is None:
            continue
        color = PALETTE[1] if arm is comparison.reference else PALETTE[0]
        if before is not None:
            axis.plot([before, mean], [row, row], color="#adb5bd", linewidth=1, zorder=1)
            axis.scatter([before], [row], s=28, facecolors="white", edgecolors="#868e96", zorder=2)
        values = arm.values(metric)
        if len(values) > 1:
            axis.scatter(values, [row] * len(values), s=12, color=color, alpha=0.5, zorder=3)
        axis.scatter([mean], [row], s=42, color=color, zorder=4)
        axis.annotate(f"{mean:.3f}", (mean, row), xytext=(0, 6), textcoords="offset points", ha="center", fontsize=8)
    axis.set_title(title_of(metric) + ("\n(lower is better)" if lower_is_better(metric) else ""), fontsize=10, loc="left")
    axis.set_ylim(-0.7, len(comparison.arms) - 0.4)
    axis.margins(x=0.15)
    axis.grid(alpha=0.25, axis="x")
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
