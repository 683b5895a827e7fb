"""Result tables with an optional figure, which evaluations save in a run's folder for its report.

`RUN/evaluation/NAME.json` holds `{"title", "columns", "rows"}`, and may hold "note" (a sentence or two) and "figure" (the name
of a PNG file beside it). Every such table appears in `unified-lm report RUN`; mteb's results are read in mteb's layout.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from unified_lm.core.errors import DataError, did_you_mean
from unified_lm.core.outputs import write_json_file
from unified_lm.core.typed import unusable_text
from unified_lm.core.user_files import read_json

FOLDER = "evaluation"
"""Subfolder of a run that holds its tables."""

Cell = str | int | float | bool | None

_REQUIRED = ("title", "columns", "rows")
_KNOWN = (*_REQUIRED, "note", "figure")
_PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True, kw_only=True)
class ResultTable:
    """One result table.

    Attributes:
        title: what was measured.
        columns: column headings.
        rows: one cell per column; numbers as numbers, None for a missing value.
        note: what a reader must know to interpret the numbers.
        figure: file name of a PNG beside the table's file.
        folder: folder of the table's file; not saved.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""
    figure: str | None = None
    folder: Path = field(default=Path(), compare=False)

    def save(self, path: Path) -> Path:
        """Write the table and return its path. A number that is not finite becomes null."""
        rows = [[None if isinstance(cell, float) and not math.isfinite(cell) else cell for cell in row] for row in self.rows]
        content = {name: value for name, value in {**asdict(self), "rows": rows}.items() if name in _KNOWN and value}
        write_json_file(path, {name: content.get(name, []) for name in _REQUIRED} | content)
        return path

    @property
    def picture(self) -> bytes | None:
        """The content of the figure's file, or None.

        Raises:
            DataError: there is no such file beside the table, or it is not a PNG.
        """
        if self.figure is None:
            return None
        path = self.folder / self.figure
        if Path(self.figure).name != self.figure or not path.is_file():
            raise DataError(f"{self.folder}: figure '{self.figure}' of '{self.title}' is not a file beside its table.")
        content = path.read_bytes()
        if not content.startswith(_PNG):
            raise DataError(f"{path} is not a PNG file. Run the evaluation again, or remove 'figure' from its table.")
        return content


def read_result_table(path: Path) -> ResultTable:
    """Read the file of a table.

    Raises:
        DataError: not JSON; a missing or unknown key or one of the wrong type; or a row of the wrong length.
    """
    content = read_json(path, fix="Run the evaluation again, or remove the file.")
    problem = _problem(content)
    if problem:
        raise DataError(f"{path}: {problem} Expected {{title, columns, rows, note?, figure?}}; see docs/report.md.")
    return ResultTable(**content, folder=path.parent)


def _problem(content: Any) -> str | None:
    """What is wrong with the content of a file; None if it is valid."""
    if not isinstance(content, Mapping):
        return f"holds {type(content).__name__}."
    for key in content:
        if key not in _KNOWN:
            return f"unknown key '{key}'.{did_you_mean(str(key), _KNOWN)}"
    missing = [key for key in _REQUIRED if key not in content]
    if missing:
        return f"has no {', '.join(missing)}."
    for key in ("title", "note", "figure"):
        if key in content and not isinstance(content[key], str):
            return f"{key} is {content[key]!r}, not text."
    columns, rows = content["columns"], content["rows"]
    if not isinstance(columns, list) or not columns or not all(isinstance(column, str) for column in columns):
        return "columns is not a list of strings."
    if not isinstance(rows, list):
        return "rows is not a list."
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, list) or len(row) != len(columns):
            return f"row {number} does not have one cell for each of the {len(columns)} columns."
        if not all(cell is None or isinstance(cell, (str, int, float, bool)) for cell in row):
            return f"row {number} has a cell that is neither text nor number."
    texts = [*(content.get(key, "") for key in ("title", "note", "figure")), *columns, *(cell for row in rows for cell in row)]
    for text in texts:
        if isinstance(text, str) and (fault := unusable_text(text)):
            return f"the text {text!r:.60} {fault}."
    return None


def find_result_tables(run_dir: Path) -> list[ResultTable]:
    """The tables of a run: those in `evaluation/`, by file name, then one per model with mteb results.

    Raises:
        DataError: a damaged file.
    """
    tables = [read_result_table(path) for path in sorted((run_dir / FOLDER).glob("*.json"))]
    revisions = sorted({path.parent for path in run_dir.glob("mteb/results/*/*/*.json")})
    return tables + [table for folder in revisions if (table := _mteb_table(folder)).rows]


def _mteb_table(folder: Path) -> ResultTable:
    """Main scores of a folder of mteb's results, `results/MODEL/REVISION`."""
    rows: list[list[Cell]] = []
    for path in sorted(folder.glob("*.json")):
        if path.name == "model_meta.json":
            continue
        content = read_json(path, fix="Run the task again with --overwrite.")
        try:
            rows += [
                [content["task_name"], split, score["hf_subset"], float(score["main_score"])]
                for split, scores in content["scores"].items()
                for score in scores
            ]
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise DataError(f"{path} is not an mteb result ({error!r}). Run the task again with --overwrite.") from error
    content = {
        "title": f"mteb: {folder.parent.name.replace('__', '/')}",
        "columns": ["task", "split", "subset", "main score"],
        "rows": rows,
        "note": f"Revision {folder.name}. mteb's main score of each task; no interval, since mteb stores no scores by item.",
    }
    if problem := _problem(content):
        raise DataError(f"{folder} holds a result that is none of mteb: {problem} Run the task again with --overwrite.")
    return ResultTable(**content, folder=folder)
