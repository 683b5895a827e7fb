"""Curves of a run: loss per stream, held-out measurements, learning rate and speed, as one PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from unified_lm.engine.metrics import read_metrics

_PANELS = (
    ("loss/", "training loss", "loss"),
    ("heldout/", "held-out loss", "loss"),
    ("retrieval", "held-out retrieval", "nDCG@10, recall@1"),
    ("tokens_per_second", "speed", "tokens per second"),
)


def plot_run(run_dir: Path) -> Path:
    """Draw `metrics.jsonl` of a run as `curves.png` beside it and return its path."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = read_metrics(run_dir)
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), constrained_layout=True)
    for axis, (prefix, title, unit) in zip(axes.flat, _PANELS, strict=True):
        for name, points in sorted(_series(lines, prefix).items()):
            steps, values = zip(*points, strict=True)
            axis.plot(steps, values, marker="o" if len(points) < 20 else None, label=name.removeprefix(prefix).lstrip("/_"))
        axis.set(title=title, xlabel="optimizer step", ylabel=unit)
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[1]:
            axis.legend(fontsize=8)
    figure.suptitle(run_dir.name)
    target = run_dir / "curves.png"
    figure.savefig(target, dpi=110)
    plt.close(figure)
    return target


def _series(lines: list[dict[str, Any]], prefix: str) -> dict[str, list[tuple[int, float]]]:
    series: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        for name, value in line.items():
            if name.startswith(prefix):
                series.setdefault(name, []).append((line["step"], value))
    return series
