"""The texts in rows of any kind, read from files or the Hub without a schema."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeGuard

from unified_lm.config.schema import SourceConfig
from unified_lm.core.user_files import user_path
from unified_lm.data.rows.hub_datasets import hub_rows
from unified_lm.data.rows.parse import FIELDS
from unified_lm.data.rows.readers import Rows, data_files, read_rows
from unified_lm.data.rows.records import RecordKind

_PAIR_COLUMNS = frozenset(name for names in FIELDS[RecordKind.PAIR].values() for name in names)


def row_texts(row: object, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield every text in a row with its path (``pos[0]``, ``messages[1].content``).

    The instructions in ``[instruction, text]`` and system turns are skipped, since many training and evaluation rows have the
    same ones.
    """
    if isinstance(row, str):
        yield path, row
    elif isinstance(row, Mapping):
        if row.get("role") == "system" or row.get("from") == "system":
            return
        for key, value in row.items():
            inside = f"{path}.{key}" if path else str(key)
            yield from _pair_texts(value, inside) if not path and key in _PAIR_COLUMNS else row_texts(value, inside)
    elif isinstance(row, Sequence):
        for i, value in enumerate(row):
            yield from row_texts(value, f"{path}[{i}]")


def _pair_texts(value: object, path: str) -> Iterator[tuple[str, str]]:
    """Yield the texts of a query, positive or negative column, whose items may be ``[instruction, text]``."""
    if path in FIELDS[RecordKind.PAIR]["query"]:
        yield from row_texts(value[1], path) if _is_instructed(value) else row_texts(value, path)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for i, item in enumerate(value):
            yield from row_texts(item[1] if _is_instructed(item) else item, f"{path}[{i}]")
    else:
        yield from row_texts(value, path)


def _is_instructed(value: object) -> TypeGuard[Sequence[str]]:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and len(value) == 2
        and all(isinstance(part, str) for part in value)
    )


@dataclass(frozen=True)
class RowFile:
    """The rows of a file or of a Hub data set; `path` is the file, None for the Hub."""

    name: str
    rows: Callable[[], Rows]
    path: Path | None = None


def open_rows(named: str) -> list[RowFile]:
    """Open the rows that a command line names: a file, each file of a folder, or ``hub:NAME[:SUBSET[:SPLIT]]``.

    Raises:
        DataError: missing or unreadable data.
    """
    source = SourceConfig.from_text(named)
    if source.hub is not None:
        name, _, rows = hub_rows(replace(source, split=source.split_or_train))
        return [RowFile(name, rows)]
    root = user_path(named)
    return [_row_file(file, root) for file in data_files(root)]


def _row_file(file: Path, root: Path) -> RowFile:
    return RowFile(file.name if root.is_file() else str(file.relative_to(root)), lambda: read_rows(file), file)
