"""`unified-lm compare RUN... [--out DIR]`: compare runs by the differences in their configurations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from unified_lm.cli.arguments import command_parser
from unified_lm.core.outputs import check_files
from unified_lm.reporting.compare import compare as compare_runs
from unified_lm.reporting.compare_output import comparison_files, settings_of, to_table, write_comparison


def compare(argv: Sequence[str]) -> None:
    """Print the table and write compare.csv, .json, .md and .png to `--out` (default: the only folder, else ".")."""
    parser = command_parser(
        "compare",
        "compare the held-out results of runs, by the differences in their settings",
        "runs/a runs/b --out comparison",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, or of an ablation")
    parser.add_argument(
        "--out",
        type=Path,
        default=None,
        help="folder for compare.csv, .json, .md and .png; by default the only folder given, else the working directory",
    )
    parser.add_argument("--reference", default=None, metavar="ARM", help="arm to compare the others with; by default the first")
    options = parser.parse_args(list(argv))
    out = options.out or (options.runs[0] if len(options.runs) == 1 else Path())
    check_files(comparison_files(out))
    comparison = compare_runs(options.runs, options.reference)
    console = Console()
    console.print(to_table(comparison))
    for arm in comparison.arms:
        console.print(f"{arm.name}: {settings_of(comparison, arm)}", markup=False, highlight=False, soft_wrap=True)
    for note in comparison.notes:
        console.print(note, style="dim", highlight=False)
    for file in write_comparison(comparison, out):
        print(file)
