"""Training curves of runs from their metrics.jsonl: the panels, and their PNG. `curves_page` draws the HTML page."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unified_lm.core.errors import DataError, did_you_mean
from unified_lm.core.outputs import write_file
from unified_lm.engine.metrics import read_metrics

PALETTE = ("#2a6fdb", "#e8590c", "#2b8a3e", "#9c36b5", "#c2255c", "#0b8a99", "#a07800", "#5c677d")
"""One color per run, distinguishable on a white background."""

TRAINING = "training"
HELD_OUT = "held-out"

_METRICS = "metrics.jsonl"
_SPEED_PANELS = (
    # metric, title, unit, factor, noisy, log_scale
    ("learning_rate", "learning rate", "", 1.0, False, True),
    ("gradient_norm", "gradient norm", "before clipping", 1.0, True, True),
    ("tokens_per_second", "speed", "tokens/s, no padding", 1.0, True, False),
    ("mfu", "MFU", "% of peak", 100.0, True, False),
    ("memory_peak_gib", "peak memory", "GiB, worst rank", 1.0, False, False),
    ("imbalance_compute", "imbalance over ranks", "slowest / mean", 1.0, True, False),
)
LONG_CURVE = 40
"""Minimum number of points of a noisy curve that is smoothed."""
_RETRIEVAL = re.compile(r"retrieval(?:_(?P<mask>\w+))?/(?P<metric>.+)")
_METRIC_TITLES = {"ndcg@10": "nDCG@10"}


@dataclass(frozen=True)
class Run:
    """The metrics of one run.

    Attributes:
        name: name in legends, unique among the runs.
        lines: lines of its metrics.jsonl, oldest first.
    """

    name: str
    lines: list[dict[str, Any]] = field(repr=False)


@dataclass(frozen=True)
class Curve:
    """One line of a panel.

    Attributes:
        run: index of the run.
        kind: distinguishes curves of one run in a panel: "training", "held-out", "bidirectional", "causal".
        steps: optimizer steps, ascending.
        values: one value per step; NaN if it was not finite.
    """

    run: int
    kind: str
    steps: list[int]
    values: list[float]


@dataclass(frozen=True)
class Panel:
    """One plot.

    Attributes:
        title: what it shows.
        unit: unit of the y axis.
        curves: curves of all runs with this metric.
        noisy: whether smoothing makes it easier to read.
        log_scale: whether a logarithmic y axis makes sense.
    """

    title: str
    unit: str
    curves: list[Curve]
    noisy: bool = False
    log_scale: bool = False


def load_runs(folders: Sequence[Path]) -> list[Run]:
    """Read the metrics of runs; the folder of a chain is replaced by its stages.

    Raises:
        DataError: a folder is missing or contains no metrics.
    """
    found: list[Path] = []
    for folder in folders:
        found.extend(path for path in run_folders(folder) if path not in found)
    return [Run(name, read_metrics(path)) for name, path in zip(_names(found), found, strict=True)]


def build_panels(runs: Sequence[Run]) -> list[Panel]:
    """Build the panels: losses by objective (training with held-out), other held-out values, learning rate and speed."""
    losses = _streams(runs)
    panels = [_loss_panel(runs, name) for name in losses]
    if len(losses) > 1:
        total = [curve for curve in _curves(runs, {"loss": TRAINING}) if len(_streams([runs[curve.run]])) > 1]
        panels.append(Panel("total loss", "weighted sum", total, noisy=True, log_scale=True))
    panels += _further_panels(runs) + _retrieval_panels(runs)
    for metric, title, unit, factor, noisy, log_scale in _SPEED_PANELS:
        curves = [
            Curve(c.run, c.kind, c.steps, [value * factor for value in c.values]) for c in _curves(runs, {metric: TRAINING})
        ]
        if metric != "imbalance_compute" or any(value != 1.0 for curve in curves for value in curve.values):
            panels.append(Panel(title, unit, curves, noisy=noisy, log_scale=log_scale))
    return [panel for panel in panels if panel.curves]


def plot_run(run_dir: Path) -> Path:
    """Draw one run as `curves.png` in its folder and return the path."""
    runs = load_runs([run_dir])
    return draw_png(build_panels(runs), runs, run_dir / "curves.png")


def draw_png(panels: Sequence[Panel], runs: Sequence[Run], target: Path) -> Path:
    """Draw panels in a grid and return the path of the file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.6 * columns, 3.1 * rows + 0.5), layout="constrained", squeeze=False)
    for axis, panel in zip(axes.flat, panels, strict=False):
        _draw_panel(axis, panel, len(runs))
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    handles = [plt.Line2D([], [], color=PALETTE[i % len(PALETTE)], label=run.name) for i, run in enumerate(runs)]
    figure.legend(handles=handles, loc="outside upper left", ncols=min(4, len(runs)), frameon=False)
    write_file(target, lambda path: figure.savefig(path, dpi=120))
    plt.close(figure)
    return target


def is_smoothed(panel: Panel, curve: Curve) -> bool:
    """Whether a curve is smoothed: held-out and short curves are not."""
    return panel.noisy and curve.kind == TRAINING and len(curve.steps) >= LONG_CURVE


def smoothed(values: Sequence[float], weight: float) -> list[float]:
    """Exponential moving average with bias correction (Kingma & Ba, 2015, section 3); NaN stays NaN.

    Args:
        values: the values in order.
        weight: weight of the previous average, in [0, 1); 0 changes nothing.
    """
    result, average, mass = [], 0.0, 0.0
    for value in values:
        if math.isnan(value):
            result.append(value)
            continue
        average = weight * average + (1 - weight) * value
        mass = weight * mass + (1 - weight)
        result.append(average / mass)
    return result


# --- runs --------------------------------------------------------------------------------------------------------------


def run_folders(folder: Path) -> list[Path]:
    """The folder of a run itself, or the folders of a chain's stages in order.

    Raises:
        DataError: there is no such folder, or it contains no metrics.
    """
    if (folder / _METRICS).is_file():
        return [folder]
    stages = sorted(path.parent for path in folder.glob(f"*/{_METRICS}"))
    if stages:
        return stages
    if folder.is_dir():
        raise DataError(f"{folder} has no {_METRICS}, nor has a folder inside it: it is neither a run nor a chain of runs.")
    beside = [path.name for path in folder.parent.iterdir() if path.is_dir()] if folder.parent.is_dir() else []
    hint = did_you_mean(folder.name, beside)
    raise DataError(f"no such run: {folder}.{hint if 'mean' in hint or len(beside) <= 12 else ''}")


def _names(folders: Sequence[Path]) -> list[str]:
    """The shortest path suffixes that distinguish the runs; stages of a chain keep the name of the chain."""
    resolved = [folder.resolve() for folder in folders]
    for parts in range(1, max((len(path.parts) for path in resolved), default=1) + 1):
        names = ["/".join(path.parts[-parts:]) for path in resolved]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in resolved]


# --- panels ------------------------------------------------------------------------------------------------------------


def _streams(runs: Sequence[Run]) -> list[str]:
    names = {key.partition("/")[2]: None for run in runs for line in run.lines for key in line if _is_loss(key)}
    return sorted(names)


def _is_loss(key: str) -> bool:
    return key.startswith(("loss/", "heldout/")) and key.count("/") == 1


def _loss_panel(runs: Sequence[Run], stream: str) -> Panel:
    curves = _curves(runs, {f"loss/{stream}": TRAINING, f"heldout/{stream}": HELD_OUT})
    return Panel(f"{stream} loss", "nats", curves, noisy=True, log_scale=True)


def _further_panels(runs: Sequence[Run]) -> list[Panel]:
    """Panels besides losses: what routers do, and further values of an objective on held-out rows ("heldout/STREAM/NAME") with
    the same values of training steps."""
    keys = dict.fromkeys(key for run in runs for line in run.lines for key in line)
    names = [key for key in keys if key.rpartition("/")[2].startswith("router_")]
    names += [key.partition("/")[2] for key in keys if key.startswith("heldout/") and not _is_loss(key)]
    return [
        Panel(
            name.replace("/", " ").replace("_", " "),
            "",
            _curves(runs, {name: TRAINING, f"heldout/{name}": HELD_OUT}),
            noisy=True,
        )
        for name in names
    ]


def _retrieval_panels(runs: Sequence[Run]) -> list[Panel]:
    keys: dict[str, dict[str, str]] = {}
    for run in runs:
        for key in dict.fromkeys(key for line in run.lines for key in line):
            match = _RETRIEVAL.fullmatch(key)
            if match is not None:
                keys.setdefault(match["metric"], {})[key] = match["mask"] or "bidirectional"
    return [
        Panel(f"retrieval {_METRIC_TITLES.get(metric, metric)}", HELD_OUT, _curves(runs, kinds))
        for metric, kinds in keys.items()
    ]


def _curves(runs: Sequence[Run], kinds: dict[str, str]) -> list[Curve]:
    """One curve per run and metric. If a resumed run repeats a step, its later value counts."""
    found = []
    for index, run in enumerate(runs):
        for key, kind in kinds.items():
            points = {line["step"]: _finite(line[key]) for line in run.lines if key in line and "step" in line}
            if points:
                steps = sorted(points)
                found.append(Curve(index, kind, steps, [points[step] for step in steps]))
    return found


def _finite(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else math.nan


def _draw_panel(axis: Any, panel: Panel, num_runs: int) -> None:
    kinds = list(dict.fromkeys(curve.kind for curve in panel.curves))
    for curve in panel.curves:
        color = PALETTE[curve.run % len(PALETTE)]
        first = curve.kind == kinds[0]
        rough = is_smoothed(panel, curve)
        if rough:
            axis.plot(curve.steps, curve.values, color=color, alpha=0.25, linewidth=0.8)
        values = smoothed(curve.values, 0.6 if rough else 0.0)
        style = {"linestyle": "-"} if first else {"linestyle": "--", "markerfacecolor": "white"}
        marker = "o" if len(curve.steps) < 20 else None
        axis.plot(curve.steps, values, color=color, linewidth=1.6, marker=marker, markersize=4, label=curve.kind, **style)
    axis.set_title(panel.title, fontsize=11, loc="left", fontweight="bold")
    axis.set_xlabel("optimizer step", fontsize=9)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_ylabel(panel.unit, fontsize=9)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    if len(kinds) > 1:
        handles, labels = axis.get_legend_handles_labels()
        axis.legend(
            *zip(*dict(zip(labels, zip(handles, labels), strict=True)).values(), strict=True), fontsize=8, frameon=False
        )
