"""Style of figures: colors that readers with any color vision can distinguish, plain axes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unified_lm.core.outputs import write_file

PALETTE = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#7a7a7a", "#000000")
"""Okabe and Ito (2008), "Color Universal Design", without yellow, which is faint on white."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
"""Markers distinguish arms where colors do not suffice."""

HEAT = "viridis"
"""Color map of heat maps: monotonic in lightness, so that it stays readable in grayscale."""


def subplots(rows: int, columns: int, width: float, height: float, **options: Any) -> tuple[Any, Any]:
    """Create a figure and its axes `[rows][columns]`.

    Args:
        rows: rows of axes.
        columns: columns of axes.
        width: width of the figure, in inches.
        height: height of the figure, in inches.
        options: passed to matplotlib's `subplots`.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(rows, columns, figsize=(width, height), layout="constrained", squeeze=False, **options)


def finish(axis: Any, title: str, x: str, y: str) -> None:
    """Set title, labels and grid of one plot."""
    axis.set_title(title, fontsize=10.5, loc="left", fontweight="bold")
    axis.set_xlabel(x, fontsize=9)
    axis.set_ylabel(y, fontsize=9)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.25)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def arm_legend(figure: Any, labels: list[str], columns: int = 4, extra: Sequence[Any] = ()) -> None:
    """Draw one legend for the arms and the `extra` handles above all plots."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=PALETTE[i % len(PALETTE)], marker=MARKERS[i % len(MARKERS)], markersize=5, label=label)
        for i, label in enumerate(labels)
    ]
    handles += extra
    figure.legend(handles=handles, loc="outside upper left", ncols=min(columns, len(handles)), frameon=False, fontsize=9)


def heat_legend(figure: Any, image: Any, axes: list[Any], label: str) -> None:
    """Draw the color bar of heat maps that share a scale."""
    bar = figure.colorbar(image, ax=axes, pad=0.02)
    bar.set_label(label, fontsize=9)
    bar.ax.tick_params(labelsize=8)


def save(figure: Any, path: Path) -> Path:
    """Write a PNG and free the figure."""
    import matplotlib.pyplot as plt

    write_file(path, lambda building: figure.savefig(building, dpi=140))
    plt.close(figure)
    return path
