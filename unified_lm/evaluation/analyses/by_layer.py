"""Shared parts of the analyses by layer and position: windows of tokens, and heat maps beside curves over the layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from unified_lm.core.errors import ConfigError
from unified_lm.evaluation.analyses.base import AnalysisSettings, Material, Numbers
from unified_lm.evaluation.analyses.figure import HEAT, MARKERS, PALETTE, arm_legend, finish, heat_legend, subplots
from unified_lm.evaluation.analyses.texts import fingerprint, read_texts

MIN_POSITIONS = 3
"""The first and the last position are plotted separately; fewer than three leave nothing between them."""
MIN_WINDOWS = 2
_LAYER_AXIS = "layer (0: embeddings)"


def window_material(settings: AnalysisSettings) -> Material:
    """Texts whose first tokens are analyzed: whole docstrings, or the user's texts.

    Raises:
        ConfigError: too few positions or windows to measure anything.
    """
    if settings.positions < MIN_POSITIONS:
        raise ConfigError(
            f"--positions {settings.positions}: layers and norms compare the first and the last token with those between them; "
            f"give at least {MIN_POSITIONS}."
        )
    if settings.num_windows < MIN_WINDOWS:
        raise ConfigError(f"--num-windows {settings.num_windows}: a mean over texts needs at least {MIN_WINDOWS}.")
    candidates = 8 * settings.num_windows  # more texts than windows, since some are shorter than a window
    name, texts = read_texts(settings.texts, candidates, subset="text")
    description = {"texts": name, "num_windows": settings.num_windows, "positions": settings.positions}
    content = (texts, settings.num_windows, settings.positions)
    return Material(description, fingerprint(*content), content)


@dataclass(frozen=True)
class Curve:
    """A line over the layers, drawn for every model; the first line of a plot carries the models' markers.

    Attributes:
        key: key of its values in the numbers, `[L + 1]`.
        label: its label in the legend.
        style: line style, in matplotlib's notation.
        width: line width in points.
    """

    key: str
    label: str
    style: str = "-"
    width: float = 1.0


def draw_by_layer(
    arms: Mapping[str, Numbers],
    maps: str,
    titles: Sequence[str],
    scale: Any,
    scale_label: str,
    curves: Sequence[Curve],
    legend: str = "best",
) -> tuple[Any, Any]:
    """Draw a heat map per model on a common scale, and a plot of curves over the layers.

    Args:
        arms: label -> numbers.
        maps: key of the heat-map values in the numbers, `[L + 1, positions]`.
        titles: titles of the heat maps.
        scale: matplotlib's `Normalize`, from values to the color map.
        scale_label: label of the color bar.
        curves: curves of the plot.
        legend: location of the plot's legend.

    Returns:
        The figure, and the axis of the plot, still without title and labels.
    """
    figure, axes = subplots(1, len(arms) + 1, 4.0 * (len(arms) + 1) + 0.8, 4.2)
    for axis, title, numbers in zip(axes[0], titles, arms.values(), strict=False):
        image = axis.imshow(numbers[maps], aspect="auto", origin="lower", cmap=HEAT, norm=scale, interpolation="nearest")
        finish(axis, title, "token position", _LAYER_AXIS)
        axis.grid(False)
    heat_legend(figure, image, list(axes[0][: len(arms)]), scale_label)
    axis = axes[0][-1]
    for index, numbers in enumerate(arms.values()):
        color, marker = PALETTE[index % len(PALETTE)], MARKERS[index % len(MARKERS)]
        for curve in curves:
            values = numbers[curve.key]
            marked = {"marker": marker, "markevery": max(1, len(values) // 10), "markersize": 4} if curve is curves[0] else {}
            axis.plot(range(len(values)), values, color=color, linewidth=curve.width, linestyle=curve.style, **marked)
    for curve in curves:
        axis.plot([], [], color="#333333", linestyle=curve.style, label=curve.label)
    axis.legend(fontsize=8, frameon=False, loc=legend)
    arm_legend(figure, list(arms))
    return figure, axis


def finish_curves(axis: Any, title: str, y: str) -> None:
    """Set title and labels of the plot of `draw_by_layer`."""
    finish(axis, title, _LAYER_AXIS, y)
