"""Writers of files in the formats that the readers accept; a file is written under a hidden name and renamed when complete."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from unified_lm.core.errors import DataError
from unified_lm.core.files import sync, write_text
from unified_lm.data.rows.records import ChatRecord, PairRecord, PreferenceRecord, Record, Text

WRITABLE = (".jsonl", ".parquet", ".txt")
_ROWS_PER_GROUP = 4096
_READ_BYTES = 1 << 20


def record_row(record: Record) -> dict[str, Any]:
    """The row that the readers parse back into an equal record; texts to embed are always ``[instruction, text]``."""
    if isinstance(record, PairRecord):
        return {
            "query": _pair(record.query),
            "pos": [_pair(text) for text in record.positives],
            "neg": [_pair(text) for text in record.negatives],
        }
    if isinstance(record, ChatRecord):
        turns = [{"role": role, "content": content} for role, content in record.turns]
        return {"messages": [t | ({"weight": 0} if i in record.unlearned else {}) for i, t in enumerate(turns)]}
    if isinstance(record, PreferenceRecord):
        return {"prompt": record.prompt, "completion": record.completion, "label": record.desirable}
    return {"text": record.text}


def _pair(text: Text) -> list[str]:
    return [text.instruction, text.text]


class RowWriter:
    """Writes rows to a file, which appears, complete, when the `with` block ends without an error.

    Args:
        path: ends in .jsonl, .parquet or .txt (which stores only the field "text", one row per line).

    Raises:
        DataError: another extension, a row that the format cannot store, or a file that cannot be written.
    """

    def __init__(self, path: Path) -> None:
        if path.suffix not in WRITABLE:
            raise DataError(f"cannot write {path}: expected a name that ends in {', '.join(WRITABLE)}.")
        self.path = path
        self.num_rows = 0
        self._building = path.with_name(f".{path.name}.{os.getpid()}")
        self._rows: list[Mapping[str, Any]] = []
        self._parquet: pq.ParquetWriter | None = None

    def __enter__(self) -> RowWriter:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._handle = open(self._building, "wb")
        except OSError as error:
            raise DataError(f"cannot write {self.path}: {error.strerror or error}.") from error
        return self

    def write(self, row: Mapping[str, Any]) -> None:
        """Add a row."""
        self.num_rows += 1
        if self.path.suffix == ".parquet":
            self._rows.append(row)
            if len(self._rows) == _ROWS_PER_GROUP:
                self._flush()
            return
        try:
            line = " ".join(row["text"].split()) if self.path.suffix == ".txt" else json.dumps(row, ensure_ascii=False)
        except TypeError as error:
            raise DataError(
                f"{self.path}, row {self.num_rows}: {error}; only texts, numbers and lists can be written."
            ) from error
        self._handle.write(f"{line}\n".encode())

    def _flush(self) -> None:
        if not self._rows:
            return
        try:
            table = pa.Table.from_pylist(list(self._rows), schema=None if self._parquet is None else self._parquet.schema)
        except pa.ArrowException as error:
            raise DataError(f"{self.path}: the rows do not have one type per column, as parquet needs: {error}") from error
        if self._parquet is None:
            self._parquet = pq.ParquetWriter(self._handle, table.schema)
        self._parquet.write_table(table)
        self._rows.clear()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self._flush()
            if self._parquet is not None:
                self._parquet.close()
        finally:
            self._handle.close()
            if kind is not None:
                self._building.unlink(missing_ok=True)
        if kind is None:
            sync(self._building)
            self._building.replace(self.path)


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write all rows to a file and return their number."""
    with RowWriter(path) as writer:
        for row in rows:
            writer.write(row)
    return writer.num_rows


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes, in hexadecimal."""
    digest = sha256()
    with open(path, "rb") as handle:
        while block := handle.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def write_report(path: Path, content: Mapping[str, Any]) -> None:
    """Write a report as YAML, an extension that the readers of data folders ignore.

    Raises:
        DataError: the path has another extension.
    """
    if path.suffix not in (".yaml", ".yml"):
        raise DataError(f"cannot write the report {path}: expected a name that ends in .yaml.")
    write_text(path, yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True, width=120))
