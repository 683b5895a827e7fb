"""Writers of files in the formats that the readers accept; a file is written under a hidden name and renamed when complete."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from unified_lm.core.errors import DataError
from unified_lm.core.outputs import building_file, write_text_file
from unified_lm.data.rows.records import ChatRecord, GroundedRecord, PairRecord, PreferenceRecord, Record, Text
from unified_lm.data.rows.violations import describe

WRITABLE = (".jsonl", ".parquet", ".txt")
READABLE = (".jsonl", ".json", ".parquet", ".csv", ".tsv", ".txt")
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
    if isinstance(record, GroundedRecord):
        return {**record_row(record.pair), "answers": list(record.answers)}
    if isinstance(record, ChatRecord):
        turns = [{"role": role, "content": content} for role, content in record.turns]
        return {"messages": [t | ({"weight": 0} if i in record.unlearned else {}) for i, t in enumerate(turns)]}
    if isinstance(record, PreferenceRecord):
        return {"prompt": record.prompt, "completion": record.completion, "label": record.desirable}
    return {"text": record.text}


def _pair(text: Text) -> list[str]:
    return [text.instruction, text.text]


def check_txt_row(path: Path, row: Mapping[str, Any], where: str) -> None:
    """Check that a .txt file gives a row back as it is: the file has a text on each line, and nothing else.

    Args:
        path: the file to write.
        row: the row.
        where: where the row is, for the message.

    Raises:
        DataError: the row has other columns than "text", or a text with line breaks, or white space around it.
    """
    text = row.get("text")
    if row.keys() != {"text"}:
        problem = f"has the columns [{', '.join(map(str, row))}]"
    elif not isinstance(text, str) or not text.strip():
        problem = f"has {describe(text)} for a text"
    elif "\n" in text or text != text.strip():
        problem = f"has a text that is no line as it is, {describe(text)}"
    else:
        return
    raise DataError(
        f"cannot write {path}: {where} {problem}; a .txt file holds texts of one line, without white space around them, and no "
        "other columns. Name a .jsonl or .parquet file."
    )


class RowWriter:
    """Writes rows to a file, which appears, complete, when the `with` block ends without an error.

    A parquet file has the columns of all its rows; a row without one has null there.

    Args:
        path: ends in .jsonl, .parquet or .txt (see `check_txt_row`).

    Raises:
        DataError: another extension, a row that the format cannot store, or a file that cannot be written.
        OutputError: something that this package did not write is at `path`.
    """

    def __init__(self, path: Path) -> None:
        if path.suffix not in WRITABLE:
            raise DataError(f"cannot write {path}: expected a name that ends in {', '.join(WRITABLE)}.")
        self.path = path
        self.num_rows = 0
        self._open = ExitStack()
        self._rows: list[Mapping[str, Any]] = []
        self._groups: list[pa.Schema] = []

    def __enter__(self) -> RowWriter:
        with ExitStack() as opened:
            building = opened.enter_context(building_file(self.path))
            self._handle = opened.enter_context(open(building, "wb"))
            # Groups wait here, on the disk that an error names: a file has one schema, which is known only with its last row.
            self._waiting = opened.enter_context(tempfile.TemporaryFile(dir=building.parent))
            self._open = opened.pop_all()
        return self

    def write(self, row: Mapping[str, Any]) -> None:
        """Add a row."""
        self.num_rows += 1
        if self.path.suffix == ".parquet":
            self._rows.append(row)
            if len(self._rows) == _ROWS_PER_GROUP:
                self._flush()
            return
        if self.path.suffix == ".txt":
            check_txt_row(self.path, row, f"row {self.num_rows}")
        try:
            line = row["text"] if self.path.suffix == ".txt" else json.dumps(row, ensure_ascii=False)
            self._handle.write(f"{line}\n".encode())
        except (TypeError, ValueError, RecursionError) as error:
            raise DataError(
                f"{self.path}, row {self.num_rows}: {error}; only texts (of valid Unicode), numbers and lists can be written."
            ) from error

    def _flush(self) -> None:
        if not self._rows:
            return
        names = list(dict.fromkeys(name for row in self._rows for name in row))
        with self._one_type_per_column():
            table = pa.table({name: pa.array([row.get(name) for row in self._rows]) for name in names})
            with pa.ipc.new_stream(pa.PythonFile(self._waiting, "w"), table.schema) as stream:
                stream.write_table(table)
        self._groups.append(table.schema)
        self._rows.clear()

    def _write_parquet(self) -> None:
        """Write the groups that wait, with the columns of all of them."""
        self._flush()
        with self._one_type_per_column():
            schema = pa.unify_schemas(self._groups, promote_options="permissive")
        self._waiting.seek(0)
        with pq.ParquetWriter(self._handle, schema) as parquet:
            for _ in self._groups:
                with self._one_type_per_column():
                    table = pa.ipc.open_stream(pa.PythonFile(self._waiting, "r")).read_all()
                absent = {name: pa.nulls(len(table), schema.field(name).type) for name in schema.names}
                columns = [table[name] if name in table.column_names else absent[name] for name in schema.names]
                with self._one_type_per_column():
                    parquet.write_table(pa.table(dict(zip(schema.names, columns, strict=True))).cast(schema))

    @contextmanager
    def _one_type_per_column(self) -> Iterator[None]:
        try:
            yield
        except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
            raise DataError(f"{self.path}: the rows do not have one type per column, as parquet needs: {error}") from error

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            self._open.__exit__(kind, error, trace)
            return
        with self._open:
            if self.path.suffix == ".parquet" and self.num_rows:
                self._write_parquet()


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write all rows to a file and return their number."""
    with RowWriter(path) as writer:
        for row in rows:
            writer.write(row)
    return writer.num_rows


def output_names(names: Sequence[str], suffix: str) -> list[Path]:
    """The files, relative to a folder of outputs, that the rows of some inputs go to: as the inputs are called there.

    Args:
        names: of the inputs, relative to their folder: "s1/a.jsonl.gz".
        suffix: of the outputs: ".jsonl" makes "s1/a.jsonl" of it.

    Raises:
        DataError: two inputs would be written to one file.
    """
    found: dict[str, str] = {}
    for name in names:
        path = Path(name.removesuffix(".gz"))
        # not `with_suffix("")`, for which a name without a known extension (a split of the Hub) ends at its first dot
        stem = path.stem if path.suffix in READABLE else path.name
        output = str(path.parent / f"{stem}{suffix}")
        if output in found:
            raise DataError(
                f"{found[output]} and {name} would both be written to {output}, and only one of them would remain. "
                "Rename one of them, or give them one by one, each with an output of its own."
            )
        found[output] = name
    return [Path(output) for output in found]


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes, in hexadecimal."""
    digest = sha256()
    with open(path, "rb") as handle:
        while block := handle.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def check_report(path: Path) -> None:
    """Check the name of a report: it is YAML, an extension that the readers of data folders ignore.

    Raises:
        DataError: the path has another extension.
    """
    if path.suffix not in (".yaml", ".yml"):
        raise DataError(f"cannot write the report {path}: expected a name that ends in .yaml.")


def write_report(path: Path, content: Mapping[str, Any]) -> None:
    """Write a report as YAML.

    Raises:
        DataError: the path has another extension.
    """
    check_report(path)
    write_text_file(path, yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True, width=120))
