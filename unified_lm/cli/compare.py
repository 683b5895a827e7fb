"""`unified-lm compare RUN... [--out DIR]`: runs side by side, by what differs in their configurations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from unified_lm.cli.arguments import command_parser
from unified_lm.reporting.compare import compare as compare_runs
from unified_lm.reporting.compare_output import settings_of, to_table, write_comparison


def compare(argv: Sequence[str]) -> None:
    """Print the table and write compare.csv, .json, .md and .png into `--out`, else into the one folder, else here."""
    parser = command_parser(
        "compare", "put the held-out results of runs side by side, by what differs in them", "runs/a runs/b --out comparison"
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, or of an ablation")
    parser.add_argument(
        "--out",
        type=Path,
        default=None,
        help="folder for compare.csv, .json, .md and .png; the one folder given, else the working directory",
    )
    parser.add_argument("--reference", default=None, metavar="ARM", help="what the others are compared with; the first arm")
    options = parser.parse_args(list(argv))
    comparison = compare_runs(options.runs, options.reference)
    console = Console()
    console.print(to_table(comparison))
    for arm in comparison.arms:
        console.print(f"{arm.name}: {settings_of(comparison, arm)}", markup=False, highlight=False, soft_wrap=True)
    for note in comparison.notes:
        console.print(note, style="dim", highlight=False)
    for file in write_comparison(comparison, options.out or (options.runs[0] if len(options.runs) == 1 else Path())):
        print(file)
