"""Curves of runs as a self-contained HTML file: embedded JSON data, drawn by an embedded script."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unified_lm.core.outputs import write_text_file
from unified_lm.reporting.curves import Curve, Panel, Run, is_smoothed
from unified_lm.reporting.pages import made_by, page, page_data

_MAX_POINTS = 2000
"""Maximum points per curve on the page; a longer curve keeps the minimum and maximum of every interval, so no spike is lost."""


def write_page(panels: Sequence[Panel], runs: Sequence[Run], target: Path) -> Path:
    """Write the page and return its path."""
    title = ", ".join(run.name for run in runs)
    write_text_file(target, page("curves.html.jinja", title=title, made=made_by(), data=page_data(chart_data(panels, runs))))
    return target


def chart_data(panels: Sequence[Panel], runs: Sequence[Run]) -> dict[str, Any]:
    """The input of `pages/charts.js`, as JSON values."""
    return {"runs": [run.name for run in runs], "panels": [_panel(panel) for panel in panels]}


def _panel(panel: Panel) -> dict[str, Any]:
    return {
        "title": panel.title,
        "unit": panel.unit,
        "logScale": panel.log_scale,
        "kinds": list(dict.fromkeys(curve.kind for curve in panel.curves)),
        "curves": [_curve(curve, smooth=is_smoothed(panel, curve)) for curve in panel.curves],
    }


def _curve(curve: Curve, *, smooth: bool) -> dict[str, Any]:
    steps, values = thin(curve.steps, curve.values, _MAX_POINTS)
    return {
        "run": curve.run,
        "kind": curve.kind,
        "smooth": smooth,
        "steps": steps,
        "values": [None if math.isnan(value) else float(f"{value:.6g}") for value in values],
    }


def thin(steps: Sequence[int], values: Sequence[float], most: int) -> tuple[list[int], list[float]]:
    """At most `most` points of a curve: the minimum and maximum of each of `most / 2` equal intervals, in order."""
    if len(steps) <= most:
        return list(steps), list(values)
    kept: list[int] = []
    stretches = most // 2
    for stretch in range(stretches):
        inside = range(stretch * len(steps) // stretches, (stretch + 1) * len(steps) // stretches)
        finite = [index for index in inside if not math.isnan(values[index])] or list(inside)
        kept.extend(sorted({min(finite, key=values.__getitem__), max(finite, key=values.__getitem__)}))
    return [steps[index] for index in kept], [values[index] for index in kept]
