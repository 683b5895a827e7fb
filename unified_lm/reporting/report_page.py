"""A run, or a chain of runs, as a self-contained HTML page; `report` reads its content."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from unified_lm.core.errors import about
from unified_lm.core.outputs import check_file, write_text_file
from unified_lm.evaluation.result_table import ResultTable
from unified_lm.reporting.curves import build_panels, load_runs, run_folders
from unified_lm.reporting.curves_page import chart_data
from unified_lm.reporting.pages import made_by, page, page_data
from unified_lm.reporting.report import RunReport, read_report
from unified_lm.reporting.report_numbers import HeldOutResult, Score


def write_report(run_dir: Path, target: Path | None = None) -> Path:
    """Write the report of a run, or of a chain with one section per stage.

    Args:
        run_dir: folder of the run, or of the chain.
        target: the file to write; by default `run_dir/report.html`.

    Returns:
        The path of the file.

    Raises:
        DataError: no such run, or a damaged file in it.
        ConfigError: its configuration cannot be read.
        CheckpointError: the manifest of its export is damaged.
    """
    target = target or run_dir / "report.html"
    check_file(target)
    reports = []
    for folder in run_folders(run_dir):
        with about(folder):
            reports.append(read_report(folder))
    runs = load_runs([run_dir])
    panels = build_panels(runs)
    text = page(
        "report.html.jinja",
        filters=_FILTERS,
        title=run_dir.resolve().name,
        reports=reports,
        tiles=_tiles,
        whiskers=_whiskers,
        has_curves=bool(panels),
        several=len(reports) > 1,
        data=page_data(chart_data(panels, runs)),
        made=made_by(),
    )
    write_text_file(target, text)
    return target


# --- summary at the top of a run ------------------------------------------------------------------------------------------


def _tiles(report: RunReport) -> list[tuple[str, str, str]]:
    """(label, number, remark) of the most important numbers."""
    tiles = []
    for result in _headline(report):
        before = "" if result.before is None else f"{_number(result.before.value)} → "
        remark = (
            ""
            if result.change is None or result.change.interval is None
            else f"{_signed(result.change.value)}, {result.verdict}"
        )
        tiles.append((result.title, f"{before}{_number(result.after.value)}", remark))
    if report.cost is not None:
        cost = report.cost
        tiles.append(("steps", f"{cost.num_steps:,}", "finished" if report.is_finished else f"of {report.max_steps:,}"))
        tiles.append(("time in steps", _duration(cost.seconds), f"{_number(cost.tokens_per_second)} tokens/s"))
    return tiles


def _headline(report: RunReport) -> Sequence[HeldOutResult]:
    """One retrieval metric and two losses at most."""
    if report.held_out is None:
        return []
    results = report.held_out.results
    return [*[r for r in results if r.name.startswith("retrieval/")][:1], *[r for r in results if r.lower_is_better][:2]]


def _whiskers(result: HeldOutResult) -> list[dict[str, Any]]:
    """Positions of before and after on a separate axis, in percent; none without intervals, which define the scale."""
    scores = [score for score in (result.before, result.after) if score is not None and score.interval is not None]
    if len(scores) < 2:
        return []
    ends = [end for score in scores for end in _ends(score)]
    low, high = min(ends), max(ends)
    room = (high - low) * 0.04 or abs(high) or 1.0
    low, high = low - room, high + room

    def position(value: float) -> float:
        """Position on the axis, in percent of its width."""
        return round(100 * (value - low) / (high - low), 2)

    return [{"low": position(_ends(s)[0]), "high": position(_ends(s)[1]), "value": position(s.value)} for s in scores]


def _ends(score: Score) -> tuple[float, float]:
    return (score.value, score.value) if score.interval is None else (score.interval.low, score.interval.high)


# --- filters -------------------------------------------------------------------------------------------------------------


def _number(value: Any) -> str:
    """A number with four significant digits (below 1: four decimals, below 0.01: three digits); anything else as it is."""
    if value is None:
        return "—"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return "not finite"
    size = abs(value)
    if size >= 1e15 or 0 < size < 0.01:
        return f"{value:.3g}"
    return f"{value:,.{4 if size < 1 else max(0, 3 - int(math.log10(size)))}f}"


def _signed(value: float) -> str:
    return ("+" if value > 0 else "") + _number(value).replace("-", "−")


def _duration(seconds: float) -> str:
    """Seconds in words: "12 s", "8 min 42 s" or "3 h 05 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _numeric_columns(table: ResultTable) -> list[bool]:
    """Per column, whether it is right-aligned: every column of numbers except the first one."""
    columns = [[row[index] for row in table.rows if row[index] is not None] for index in range(len(table.columns))]
    return [index > 0 and bool(cells) and all(map(_is_number, cells)) for index, cells in enumerate(columns)]


def _scaled(value: float) -> str:
    """A large count with its SI prefix: 12.3 P."""
    for power, prefix in ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M")):
        if abs(value) >= 10**power:
            return f"{value / 10**power:.3g} {prefix}"
    return f"{value:,.0f} "


def _inlined(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


_FILTERS: Mapping[str, Callable[..., Any]] = {
    "number": _number,
    "signed": _signed,
    "duration": _duration,
    "is_number": _is_number,
    "numeric_columns": _numeric_columns,
    "scaled": _scaled,
    "inlined": _inlined,
}
