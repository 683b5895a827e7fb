"""Common parts of the `unified-lm eval` commands: model options, model lookup, tables and progress bars."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from unified_lm.cli.arguments import add_device_options
from unified_lm.evaluation.result_table import ResultTable
from unified_lm.export.manifest import FILE_NAME
from unified_lm.inference import UnifiedLM
from unified_lm.inference.loading import model_folder
from unified_lm.mining.embedders import folder_hash
from unified_lm.models.embedded import EMBEDDED_MODELS, embedded_directory


@dataclass(frozen=True)
class EvaluatedModel:
    """A model on disk.

    Attributes:
        folder: folder of its files.
        name: its name in results.
        revision: hash of its files.
        beside: default folder for results.
    """

    folder: Path
    name: str
    revision: str
    beside: Path

    @property
    def is_export(self) -> bool:
        """Whether the model is an export of this package."""
        return (self.folder / FILE_NAME).is_file()

    @property
    def in_run(self) -> bool:
        """Whether the model is the export of a run, whose report shows tables saved beside the export."""
        return self.is_export and self.folder.resolve().name == "export"

    def load(self, options: argparse.Namespace, template: str | None = None) -> UnifiedLM:
        """Load the model with the options of `add_model_options`.

        Args:
            options: the parsed arguments.
            template: template for a model that is not an export, if the arguments name none.
        """
        chosen = options.template or (None if self.is_export else template)
        return UnifiedLM.from_pretrained(
            self.folder, device=options.device, dtype=options.dtype, template=chosen, check_weights=True
        )


def find_model(name: str) -> EvaluatedModel:
    """Find a model by folder, embedded model's name or Hub name; a run is replaced by its export.

    Raises:
        CheckpointError: no such model, or a run without an export.
        ModelError: the embedded model's package is not installed.
    """
    if name in EMBEDDED_MODELS and not Path(name).is_dir():
        folder = embedded_directory(name)
        return EvaluatedModel(folder, name, folder_hash(folder), Path())
    folder = model_folder(name, None)
    shown = folder.resolve()
    beside = shown.parent if Path(name).is_dir() else Path()
    run = shown.parent.name if shown.name == "export" else shown.name
    return EvaluatedModel(folder, run if Path(name).is_dir() else name, folder_hash(folder), beside)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the model argument and the options for loading it."""
    add = parser.add_argument
    add("model", help=f"a run or its export folder, any causal model's folder or Hub name, or {', '.join(EMBEDDED_MODELS)}")
    add_device_options(parser)
    add("--template", default=None, help="prompt template, instead of the export's")


def plain_table(table: Table, note: str) -> ResultTable:
    """Convert a printed table to one for the run's report (`evaluation.result_table`)."""
    columns = [list(column.cells) for column in table.columns]
    return ResultTable(
        title=str(table.title),
        columns=[str(column.header) for column in table.columns],
        rows=[[_cell(str(cell)) for cell in row] for row in zip(*columns, strict=True)],
        note=note,
    )


def _cell(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text


@contextmanager
def progress_bar(title: str, total: int | None, console: Console) -> Iterator[Callable[[int], None]]:
    """A progress bar on a terminal, nothing elsewhere; yields a function that advances it."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=total)
        yield lambda count: bar.update(task, advance=count)
