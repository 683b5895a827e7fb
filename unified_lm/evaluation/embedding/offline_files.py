"""Rows of an offline task's files in any format; errors name file, line and field."""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from unified_lm.core.errors import DataError, did_you_mean
from unified_lm.core.typed import half_pair
from unified_lm.core.user_files import user_path
from unified_lm.data.rows.readers import FORMATS, extension, read_rows, refuse_repeated_columns

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_TRUTHS = {"0": 0, "1": 1, "false": 0, "true": 1}


@dataclass(frozen=True)
class Layout:
    """How to read tables that do not describe themselves.

    Attributes:
        columns: field -> name of its column, or its number, counted from 1, in a table without a header.
        header: whether the first line names the columns.
        delimiter: separator of cells; None infers it from the file extension.
        seen: the columns that rows had, noted while they are read.
    """

    columns: Mapping[str, str | int]
    header: bool = True
    delimiter: str | None = None
    seen: set[str | int] = field(default_factory=set)


class Row:
    """One row, whose fields are read by the names that the task uses."""

    def __init__(self, path: Path, where: str, content: Any, layout: Layout) -> None:
        """Raises DataError when the row is not an object."""
        if not isinstance(content, dict):
            raise DataError(f"{path}, {where}: got {type(content).__name__}, expected an object with named fields.")
        self._path, self._where, self._content, self._layout = path, where, content, layout

    def error(self, field: str, problem: str) -> DataError:
        """The error to raise about a field."""
        return DataError(f"{self._path}, {self._where}, field '{field}': {problem}")

    def value(self, field: str, *aliases: str) -> Any:
        """The value of a field: under its own name, the column given in the description, or an alias.

        Raises:
            DataError: the row has no such field.
        """
        column = self._layout.columns.get(field)
        for name in (field, *aliases) if column is None else (column,):
            if name in self._content:
                return self._unicode(field, self._content[name])
        raise self.error(
            field,
            f"missing. The row has {', '.join(map(str, self._content))}."
            f"{_close(str(column or field), map(str, self._content))} Name its column in task.yaml: columns: {{{field}: ...}}",
        )

    def optional(self, field: str, default: Any) -> Any:
        """The value of a field, or a default if the row lacks it or has null."""
        found = self._content.get(self._layout.columns.get(field, field))
        return default if found is None else self._unicode(field, found)

    def _unicode(self, field: str, found: Any) -> Any:
        for text in found if isinstance(found, list) else [found]:
            if isinstance(text, str) and (place := half_pair(text)) is not None:
                raise self.error(field, f"half of a surrogate pair at character {place}, expected valid Unicode text.")
        return found

    def text(self, field: str, *aliases: str) -> str:
        """A non-empty text."""
        found = self.value(field, *aliases)
        if not isinstance(found, str) or not found.strip():
            raise self.error(field, f"got {_show(found)}, expected a text that is not empty.")
        return found

    def identifier(self, field: str, *aliases: str) -> str:
        """An id: a text or an integer."""
        found = self.value(field, *aliases)
        if isinstance(found, bool) or not isinstance(found, (str, int)) or not str(found).strip():
            raise self.error(field, f"got {_show(found)}, expected an id (text or integer).")
        return str(found).strip()

    def number(self, field: str) -> float:
        """A finite number."""
        return self._number(field, self.value(field))

    def relevance(self, field: str) -> int:
        """A relevance judgment, a whole number; 1 if the row has none."""
        number = self._number(field, self.optional(field, 1))
        if number != int(number):
            raise self.error(field, f"got {number}, expected a whole number.")
        return int(number)

    def _number(self, field: str, found: Any) -> float:
        try:
            number = math.nan if isinstance(found, bool) else float(found)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            raise self.error(field, f"got {_show(found)}, expected a number.")
        return number

    def label(self, field: str) -> str:
        """A class label: a text or an integer."""
        return self.identifier(field)

    def truth(self, field: str) -> int:
        """0 or 1."""
        found = str(self.value(field)).strip().lower()
        if found not in _TRUTHS:
            raise self.error(field, f"got {found!r}, expected 0 or 1.")
        return _TRUTHS[found]

    def texts(self, field: str) -> list[str]:
        """A list of texts, at least one."""
        found = self.value(field)
        items = [found] if isinstance(found, str) else found
        if not isinstance(items, list) or not items or not all(isinstance(item, str) and item.strip() for item in items):
            raise self.error(field, f"got {_show(found)}, expected a list of texts, none of them empty.")
        return items


def read_fields(path: Path, layout: Layout) -> Iterator[Row]:
    """Yield the rows of a file.

    Raises:
        DataError: the file is unreadable, malformed or empty.
    """
    delimiter = layout.delimiter or _DELIMITERS.get(extension(path))
    empty = True
    for where, content in read_rows(path) if delimiter is None else _table(path, delimiter, layout.header):
        empty = False
        row = Row(path, where, content, layout)
        layout.seen.update(content)
        yield row
    if empty:
        raise DataError(f"{path} has no rows.")


def find_file(folder: Path, name: str, given: str | None) -> Path:
    """The file of a task that holds `name` ("test", "corpus"...): the given one, else NAME with any known extension.

    Raises:
        DataError: no such file, or several.
    """
    if given is not None:
        path = folder / user_path(given)
        if not path.is_file():
            raise DataError(f"{folder}: there is no file {path}, which task.yaml gives for '{name}'.")
        return path
    candidates = [path for path in folder.iterdir() if path.is_file() and extension(path) in FORMATS]
    found = sorted(path for path in candidates if path.name.split(".")[0] == name)
    if name == "qrels" and not found:
        found = sorted((folder / "qrels").glob("test.*"))
    if len(found) == 1:
        return found[0]
    there = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
    problem = "no file" if not found else f"{len(found)} files"
    raise DataError(
        f"{folder}: {problem} for '{name}' (there: {there}). Expected one {name}.tsv, .csv, .jsonl or .parquet, or "
        f"files: {{{name}: FILE}} in task.yaml."
    )


def _table(path: Path, delimiter: str, header: bool) -> Iterator[tuple[str, dict[str | int, str]]]:
    """Yield cells by column name, or by number from 1. In tab-separated files, quotes are ordinary characters."""
    csv.field_size_limit(sys.maxsize)
    quoting: Literal[0, 3] = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    try:
        with open(path, encoding="utf-8-sig", newline="\n") as handle:
            reader = csv.reader(handle, delimiter=delimiter, quoting=quoting, strict=True)
            names: list[str | int] | None = list(next(reader, [])) if header else None
            if names is not None:
                refuse_repeated_columns(path, [str(name) for name in names])
            for cells in reader:
                if not cells:
                    continue
                where = f"line {reader.line_num}"
                if names is not None and len(cells) != len(names):
                    raise DataError(f"{path}, {where}: got {len(cells)} cells, expected {len(names)} as in the header.")
                yield where, dict(zip(names or range(1, len(cells) + 1), cells, strict=True))
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: malformed table: {error}.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}).") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}.") from error


def _close(name: str, known: Iterator[str]) -> str:
    hint = did_you_mean(name, known)
    return hint if "Did you" in hint else ""


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:57]}..."
