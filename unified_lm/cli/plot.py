"""`unified-lm plot RUN... [--out DIR]`: curves of runs as PNG and as one HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from unified_lm.cli.arguments import command_parser
from unified_lm.core.errors import DataError
from unified_lm.core.outputs import check_files
from unified_lm.reporting.curves import build_panels, draw_png, load_runs
from unified_lm.reporting.curves_page import write_page


def plot(argv: Sequence[str]) -> None:
    """Draw runs to two files in `--out`, by default in the folder of a single run, else in the working directory.

    Raises:
        DataError: a run is missing or has no measurements.
    """
    parser = command_parser(
        "plot", "draw loss, learning rate, speed and validation of runs as PNG and HTML", "runs/a runs/b --out plots"
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, or of a chain of runs")
    parser.add_argument(
        "--out",
        type=Path,
        default=None,
        help="folder for curves.png and curves.html; by default that of a single run, else the working directory",
    )
    options = parser.parse_args(list(argv))
    out = options.out or (options.runs[0] if len(options.runs) == 1 else Path())
    check_files([out / "curves.png", out / "curves.html"])
    runs = load_runs(options.runs)
    panels = build_panels(runs)
    if not panels:
        raise DataError(f"nothing to draw: no step has been measured yet in {', '.join(map(str, options.runs))}.")
    print(draw_png(panels, runs, out / "curves.png"))
    print(write_page(panels, runs, out / "curves.html"))
