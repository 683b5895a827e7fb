"""Cache of validated rows: parsed once, then memory-mapped.

A shard holds the records of one file (or one Hub split) as an Arrow file in the cache. Its key is a hash of the content and of
the settings that affect parsing. A shard exists only if every row in it is valid.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from unified_lm.core.cached_folder import cached_folder
from unified_lm.core.errors import DataError
from unified_lm.core.files import cache_dir, write_json
from unified_lm.data.rows.parse import RowParser
from unified_lm.data.rows.readers import Rows
from unified_lm.data.rows.records import (
    ChatRecord,
    GroundedRecord,
    PairRecord,
    PreferenceRecord,
    Record,
    RecordKind,
    Text,
    TextRecord,
)
from unified_lm.data.rows.violations import EmptyTextError, RowError

logger = logging.getLogger(__name__)

# Increase when a parser or the layout below changes, so that shards of older versions are rebuilt.
VERSION = 6
_ROWS_PER_BATCH = 1024
_ROWS_BETWEEN_MESSAGES = 500_000

_TEXT = pa.struct([("text", pa.string()), ("instruction", pa.string())])
# Location of the row in its file, for messages about records that a later stage rejects.
_LOCATION = "location"
_PAIR = [("query", _TEXT), ("positives", pa.list_(_TEXT)), ("negatives", pa.list_(_TEXT))]
_SCHEMAS: dict[RecordKind, pa.Schema] = {
    RecordKind.PAIR: pa.schema(_PAIR),
    RecordKind.CHAT: pa.schema(
        [
            ("turns", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
            ("unlearned", pa.list_(pa.int32())),
        ]
    ),
    RecordKind.TEXT: pa.schema([("text", pa.string())]),
    RecordKind.PREFERENCE: pa.schema([("prompt", pa.string()), ("completion", pa.string()), ("desirable", pa.bool_())]),
    RecordKind.GROUNDED: pa.schema([*_PAIR, ("answers", pa.list_(pa.string()))]),
}


def _text_row(text: Text) -> dict[str, str]:
    return {"text": text.text, "instruction": text.instruction}


def _encode(record: Record) -> dict[str, Any]:
    if isinstance(record, PairRecord):
        return {
            "query": _text_row(record.query),
            "positives": [_text_row(text) for text in record.positives],
            "negatives": [_text_row(text) for text in record.negatives],
        }
    if isinstance(record, ChatRecord):
        turns = {"turns": [{"role": role, "content": content} for role, content in record.turns]}
        # Only where there are any: the hash of a conversation that is learned as a whole stays what it was.
        return turns | ({"unlearned": list(record.unlearned)} if record.unlearned else {})
    if isinstance(record, TextRecord):
        return {"text": record.text}
    if isinstance(record, GroundedRecord):
        return {**_encode(record.pair), "answers": list(record.answers)}
    return {"prompt": record.prompt, "completion": record.completion, "desirable": record.desirable}


def _texts(rows: list[dict[str, str]]) -> tuple[Text, ...]:
    return tuple(Text(**row) for row in rows)


def _pair(row: dict[str, Any]) -> PairRecord:
    return PairRecord(Text(**row["query"]), _texts(row["positives"]), _texts(row["negatives"]))


_DECODERS: dict[RecordKind, Callable[[dict[str, Any]], Record]] = {
    RecordKind.PAIR: _pair,
    RecordKind.CHAT: lambda row: ChatRecord(
        tuple((turn["role"], turn["content"]) for turn in row["turns"]), tuple(row["unlearned"] or ())
    ),
    RecordKind.TEXT: lambda row: TextRecord(row["text"]),
    RecordKind.PREFERENCE: lambda row: PreferenceRecord(**row),
    RecordKind.GROUNDED: lambda row: GroundedRecord(_pair(row), tuple(row["answers"])),
}


class Shard:
    """Random access to the records of one shard folder.

    Attributes:
        content: hash of all records in order; independent of their file format and of their locations.
        rejected: number of rejected rows, by reason.
        columns: those of the columns that the user named which a row had.
        ignored: number of rows with a value under a key that is not read, by key.
    """

    def __init__(self, directory: Path, kind: RecordKind, origin: str) -> None:
        meta = json.loads((directory / "meta.json").read_text(encoding="utf-8"))
        self._path = directory / "records.arrow"
        self._kind = kind
        self._origin = origin
        self._num_rows: int = meta["rows"]
        self.content: str = meta["content"]
        self.rejected: Counter[str] = Counter(meta["rejected"])
        self.ignored: Counter[str] = Counter(meta["ignored"])
        self.columns = frozenset(meta["columns"])

    @cached_property
    def _batches(self) -> list[pa.RecordBatch]:
        reader = pa.ipc.open_file(pa.memory_map(str(self._path)))
        # Views of the mapping: a row is read from disk only when it is indexed.
        return [reader.get_batch(i) for i in range(reader.num_record_batches)]

    def __getstate__(self) -> dict[str, Any]:
        """The state without the memory-mapped batches, since pickling them would copy all rows."""
        return {name: value for name, value in vars(self).items() if name != "_batches"}

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, index: int) -> Record:
        row = self._row(index).to_pylist()[0]
        del row[_LOCATION]
        return _DECODERS[self._kind](row)

    def location(self, index: int) -> str:
        """Origin of a record: ``rows.jsonl, line 7``."""
        return f"{self._origin}, {self._row(index)[_LOCATION][0].as_py()}"

    def _row(self, index: int) -> pa.RecordBatch:
        # All batches but the last have the same size, so no search for the batch is needed.
        batch, row = divmod(index, _ROWS_PER_BATCH)
        return self._batches[batch].slice(row, 1)


Skip = Literal["none", "empty", "all"]
_Located = tuple[str, dict[str, Any]]


def shard_key(content: str, parser: RowParser, skip: Skip) -> str:
    """The cache key of the parsed form of a content."""
    settings = [VERSION, content, parser.kind.value, sorted(parser.columns.items()), sorted(parser.ignore), skip]
    return blake2b(json.dumps(settings).encode(), digest_size=16).hexdigest()


def open_shard(key: str, origin: str, rows: Callable[[], Rows], parser: RowParser, skip: Skip) -> Shard:
    """Open the shard of a key, after parsing and validating the rows if it is not cached yet, or damaged.

    Args:
        key: from `shard_key`.
        origin: the file or data set, for error messages.
        rows: starts reading.
        parser: parses rows into records.
        skip: rows to count instead of raising: "none", "empty" (those with an empty text) or "all" that break their format.

    Raises:
        DataError: a row violates its format, or no row is left.
    """
    directory = cache_dir("records", key)
    try:
        cached_folder(directory, f"parsed rows of {origin}", lambda target: _write(target, origin, rows(), parser, skip))
    except OSError as error:
        raise DataError(f"cannot write the cache of parsed rows, {directory}: {error}. Set UNIFIED_LM_CACHE.") from error
    return Shard(directory, parser.kind, origin)


def _write(target: Path, origin: str, rows: Rows, parser: RowParser, skip: Skip) -> None:
    """Validate all rows and write them to the folder of a shard."""
    schema = _SCHEMAS[parser.kind].append(pa.field(_LOCATION, pa.string()))
    digest = blake2b(parser.kind.value.encode(), digest_size=16)
    rejected: Counter[str] = Counter()
    num_rows = 0
    parser.ignored.clear()
    parser.used.clear()
    with pa.OSFile(str(target / "records.arrow"), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for batch in _batched(valid_rows(origin, rows, parser, skip, rejected)):
            # The hash covers records only: the same records from another format or location continue a run unchanged.
            for _, row in batch:
                digest.update(repr(row).encode())
            writer.write_batch(
                pa.RecordBatch.from_pylist([{**row, _LOCATION: location} for location, row in batch], schema=schema)
            )
            num_rows += len(batch)
    if num_rows == 0:
        why = ", ".join(f"{count} x {reason}" for reason, count in rejected.items())
        raise DataError(
            f"{origin}: every row was rejected ({why})." if why else f"{origin} is empty: expected at least one row."
        )
    write_json(
        target / "meta.json",
        {
            "rows": num_rows,
            "content": digest.hexdigest(),
            "rejected": rejected,
            "ignored": parser.ignored,
            "columns": sorted(parser.used),
        },
    )


def valid_rows(origin: str, rows: Rows, parser: RowParser, skip: Skip, rejected: Counter[str]) -> Iterator[_Located]:
    """Location and parsed fields of every row that is usable; arguments as in `open_shard`, `rejected` counts the others.

    Raises:
        DataError: a row violates its format, and `skip` does not allow for it.
    """
    for number, (location, row) in enumerate(rows, 1):
        if number % _ROWS_BETWEEN_MESSAGES == 0:
            logger.info("checking %s: %d rows so far (only the first time; cached afterwards)", origin, number)
        try:
            yield location, _encode(parser(row))
        except EmptyTextError as error:
            if skip == "none":
                raise DataError(f"{origin}, {location}, {error}") from error
            rejected[error.reason] += 1
        except RowError as error:
            if skip == "all":
                rejected[error.reason] += 1
                continue
            raise DataError(f"{origin}, {location}, {error}") from error


def _batched(rows: Iterator[_Located]) -> Iterator[list[_Located]]:
    batch: list[_Located] = []
    for row in rows:
        batch.append(row)
        if len(batch) == _ROWS_PER_BATCH:
            yield batch
            batch = []
    if batch:
        yield batch
