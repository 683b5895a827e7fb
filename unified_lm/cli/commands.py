"""Sub-commands that are short enough to stand together."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from unified_lm.config.compose import compose_run
from unified_lm.config.locate import group_options, list_recipes


def recipes(argv: Sequence[str]) -> None:
    """Print every recipe with its description, and the options of every group; takes no arguments."""
    from unified_lm.core.errors import UserError

    if argv:
        raise UserError(f"`unified-lm recipes` takes no arguments, got {' '.join(argv)}.")
    table = Table("recipe=", "what it does", title="recipes", title_justify="left")
    for name, description in list_recipes().items():
        table.add_row(name, description)
    groups = Table("group", "options", title="groups (group=option)", title_justify="left")
    for group, options in group_options().items():
        groups.add_row(f"{group}=", ", ".join([*options, *(["tiny_random"] if group == "model" else [])]))
    console = Console()
    console.print(table)
    console.print(groups)


def export(argv: Sequence[str]) -> None:
    """Export the weights of a checkpoint of a run; the newest one without `--step`."""
    from unified_lm.build.checkpoints import export_checkpoint

    parser = argparse.ArgumentParser(prog="unified-lm export", description="export a checkpoint as a finished run is exported")
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--step", type=int, default=None, help="the checkpoint's step; the newest if left out")
    parser.add_argument("--out", type=Path, default=None, help="folder to write; RUN/export (with --step: RUN/export-STEP)")
    options = parser.parse_args(list(argv))
    name = "export" if options.step is None else f"export-{options.step}"
    print(export_checkpoint(options.run, options.out or options.run / name, Console(stderr=True), options.step))


def inspect(argv: Sequence[str]) -> None:
    """Show real samples, packing statistics and a mask picture of a recipe; `out=DIR` says where the picture goes."""
    from unified_lm.cli.inspect import inspect_run

    folders = [argument.partition("=")[2] for argument in argv if argument.startswith("out=")]
    config = compose_run([argument for argument in argv if not argument.startswith("out=")])
    console = Console()
    for notice in config.notices:
        console.print(notice, style="yellow", markup=False)
    inspect_run(config, console, Path(folders[-1] if folders else "runs/inspect"))
