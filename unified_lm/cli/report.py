"""`unified-lm report RUN [--out FILE]`: everything about a run on one HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from unified_lm.cli.arguments import command_parser
from unified_lm.reporting.report_page import write_report


def report(argv: Sequence[str]) -> None:
    """Write the page of a run, or of a chain of runs, and print its path.

    Raises:
        DataError: the run is missing, or one of its files is damaged.
    """
    parser = command_parser(
        "report",
        "write what is known about a run as one HTML page: results, curves, evaluations, data, cost, settings",
        "runs/grit --out grit.html",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run, or of a chain of runs")
    parser.add_argument("--out", type=Path, default=None, metavar="FILE", help="the page (default: RUN/report.html)")
    options = parser.parse_args(list(argv))
    print(write_report(options.run, options.out))
