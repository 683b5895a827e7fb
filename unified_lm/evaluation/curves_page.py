"""Curves of runs as one HTML file that needs no network: the data as JSON inside, drawn by the script inside."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unified_lm.core.files import write_text
from unified_lm.core.version import code_version
from unified_lm.evaluation.curves import Curve, Panel, Run, is_smoothed

_TEMPLATE = Path(__file__).with_name("curves_page.html")
_MAX_POINTS = 2000
"""Of a curve on the page; a longer one keeps the lowest and the highest value of each stretch, so that no spike is lost."""


def write_page(panels: Sequence[Panel], runs: Sequence[Run], target: Path) -> Path:
    """Write the page and return its path."""
    data = {
        "runs": [run.name for run in runs],
        "panels": [_panel(panel) for panel in panels],
    }
    names = ", ".join(run.name for run in runs)
    made = f"unified_lm {code_version()['unified_lm']}"
    # "</" would end the script element; the escaped form means the same in JSON.
    encoded = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    page = _TEMPLATE.read_text(encoding="utf-8")
    for mark, text in (("{{title}}", html.escape(names)), ("{{made}}", html.escape(made)), ("{{data}}", encoded)):
        page = page.replace(mark, text)
    write_text(target, page)
    return target


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
    """At most `most` points of a curve: the lowest and the highest of each of `most / 2` equal stretches, in order."""
    if len(steps) <= most:
        return list(steps), list(values)
    kept: list[int] = []
    stretches = most // 2
    for stretch in range(stretches):
        inside = range(stretch * len(steps) // stretches, (stretch + 1) * len(steps) // stretches)
        finite = [index for index in inside if not math.isnan(values[index])] or list(inside)
        kept.extend(sorted({min(finite, key=values.__getitem__), max(finite, key=values.__getitem__)}))
    return [steps[index] for index in kept], [values[index] for index in kept]
