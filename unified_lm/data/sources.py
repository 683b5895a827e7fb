"""Sources of rows: files, folders, Hub data sets and built-in data. Every row is validated before training starts.

Opening a source for the first time parses and validates all rows and caches them as memory-mapped Arrow files; later, they are
found by content hash. A source therefore holds no rows in memory, whatever its size.
"""

from __future__ import annotations

import json
import logging
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from itertools import accumulate
from pathlib import Path

import numpy as np

from unified_lm.config.schema import SourceConfig
from unified_lm.core import distributed
from unified_lm.core.errors import DataError, did_you_mean
from unified_lm.core.files import cache_dir
from unified_lm.core.random import derive_seed
from unified_lm.core.reading_once import once
from unified_lm.core.typed import unusable_text
from unified_lm.core.user_files import user_path
from unified_lm.data.pydocs.dataset import pydocs_file
from unified_lm.data.rows.hub_datasets import hub_rows
from unified_lm.data.rows.parse import RowParser
from unified_lm.data.rows.readers import Rows, data_files, extension, read_rows
from unified_lm.data.rows.record_cache import Shard, Skip, open_shard, shard_key
from unified_lm.data.rows.records import GroundedRecord, PairRecord, Record, RecordKind, Text
from unified_lm.data.rows.splits import files_of_split

logger = logging.getLogger(__name__)

HELD_OUT_SEED = 42
"""Seed that selects and orders held-out rows; fixed, so that runs with different seeds are evaluated on the same rows."""

INSTRUCTED = (RecordKind.PAIR, RecordKind.GROUNDED)
"""The kinds of rows whose texts have instructions."""
_READ_BYTES = 1 << 20


class RecordSource:
    """Random access to the validated rows of one source.

    Attributes:
        name: name for logs: file name, `folder/file`, Hub name, or "pydocs/pairs/train".
        kind: kind of all records.
        fingerprint: hash of the rows and of the settings that select or change them; the same in every process.
        rejected: number of rejected rows by reason, among all rows read, regardless of `limit`.
        ignored: number of rows by key that they have and that is not read, likewise.
    """

    def __init__(
        self, name: str, kind: RecordKind, shards: Sequence[Shard], config: SourceConfig, chosen: np.ndarray | None
    ) -> None:
        """Combine shards; `chosen` is int64 `[rows]`, ascending indices into their concatenation, or None for all rows."""
        self.name = name
        self.kind = kind
        self._shards = shards
        self._ends = list(accumulate(len(shard) for shard in shards))
        self._chosen = chosen
        self._query_instruction = (config.instruction or "").strip()
        self._document_instruction = (config.document_instruction or "").strip()
        self.rejected: Counter[str] = sum((shard.rejected for shard in shards), Counter())
        self.ignored: Counter[str] = sum((shard.ignored for shard in shards), Counter())
        self.fingerprint = self._hash()

    def _hash(self) -> str:
        digest = blake2b(self.kind.value.encode(), digest_size=16)
        for part in (*(shard.content for shard in self._shards), self._query_instruction, self._document_instruction):
            digest.update(f"{len(part)}:{part}".encode())
        if self._chosen is not None:
            digest.update(self._chosen.astype("<i8").tobytes())
        return digest.hexdigest()

    @property
    def num_rows_read(self) -> int:
        """Number of valid rows, regardless of `limit`."""
        return self._ends[-1]

    def __len__(self) -> int:
        return self._ends[-1] if self._chosen is None else len(self._chosen)

    def __getitem__(self, index: int) -> Record:
        """The record at an index; negative indices count from the end."""
        shard, row = self._find(index)
        return self._instructed(shard[row])

    def location(self, index: int) -> str:
        """Origin of a record, for messages: ``data/rows.jsonl, line 7``."""
        shard, row = self._find(index)
        return shard.location(row)

    def _find(self, index: int) -> tuple[Shard, int]:
        size = len(self)
        if not -size <= index < size:
            raise IndexError(f"row {index} of {self.name}, which has {size}")
        position = int(index) % size
        if self._chosen is not None:
            position = int(self._chosen[position])
        shard = bisect_right(self._ends, position)
        return self._shards[shard], position - (self._ends[shard - 1] if shard else 0)

    def __iter__(self) -> Iterator[Record]:
        return (self[i] for i in range(len(self)))

    def _instructed(self, record: Record) -> Record:
        """Add the source's instructions to texts without an instruction of their own."""
        if not (self._query_instruction or self._document_instruction):
            return record
        if isinstance(record, GroundedRecord):
            return replace(record, pair=self._instructed_pair(record.pair))
        return self._instructed_pair(record) if isinstance(record, PairRecord) else record

    def _instructed_pair(self, record: PairRecord) -> PairRecord:
        document = self._document_instruction
        return PairRecord(
            _with_instruction(record.query, self._query_instruction),
            tuple(_with_instruction(text, document) for text in record.positives),
            tuple(_with_instruction(text, document) for text in record.negatives),
        )

    def summary(self) -> str:
        """One line: name, rows used, rows rejected by reason, keys that are not read."""
        text = f"{self.name}: {len(self):,} rows"
        if len(self) != self.num_rows_read:
            text += f" of {self.num_rows_read:,}"
        if self.rejected:
            reasons = "; ".join(f"{count:,} x {reason}" for reason, count in sorted(self.rejected.items()))
            text += f", {self.rejected.total():,} rejected ({reasons})"
        if self.ignored:
            text += f"; not read: {', '.join(f'{key} ({count:,})' for key, count in sorted(self.ignored.items()))}"
        return text


def _with_instruction(text: Text, instruction: str) -> Text:
    return text if text.instruction or not instruction else replace(text, instruction=instruction)


@dataclass(frozen=True)
class _Part:
    """One file or one Hub split, which becomes one shard."""

    name: str
    origin: str
    content: str
    rows: Callable[[], Rows]


def open_source(config: SourceConfig, kind: RecordKind, seed: int) -> RecordSource:
    """Open everything that `config` names as one source; files of a folder are concatenated in sorted order.

    Args:
        config: the location of the rows.
        kind: the kind of record to read.
        seed: selects the rows kept under `limit`; their order stays that of the source.

    Raises:
        DataError: missing or unreadable data, or a row that violates its format (the message names file, line and field).
    """
    name, _, shards = _open_shards(config, kind)
    source = RecordSource(name, kind, shards, config, _choose(config, sum(map(len, shards)), seed))
    _report(source)
    return source


def open_sources(config: SourceConfig, kind: RecordKind, seed: int) -> list[RecordSource]:
    """Like `open_source`, but one source per file of a folder (for single-dataset batches).

    The sources together contain the rows of `open_source`: `limit` applies to the whole folder, and a file without any
    remaining row yields no source.
    """
    _, names, shards = _open_shards(config, kind)
    chosen = _choose(config, sum(map(len, shards)), seed)
    sources = []
    start = 0
    for name, shard in zip(names, shards, strict=True):
        stop = start + len(shard)
        own = None if chosen is None else chosen[(chosen >= start) & (chosen < stop)] - start
        if own is None or len(own):
            sources.append(RecordSource(name, kind, [shard], config, own))
            _report(sources[-1])
        start = stop
    return sources


def _report(source: RecordSource) -> None:
    logger.log(logging.WARNING if source.rejected else logging.INFO, source.summary())


def _open_shards(config: SourceConfig, kind: RecordKind) -> tuple[str, list[str], list[Shard]]:
    """Name of the whole source, names of its parts, shards of its parts."""
    _check(config, kind)
    parser = RowParser(kind, config.columns, config.ignore)
    # A blank line in running text is not an error; an empty query or answer is.
    skip_empty = config.on_empty == "skip" or kind is RecordKind.TEXT
    skip: Skip = "all" if config.on_unusable == "skip" else "empty" if skip_empty else "none"
    parts = _parts(config, kind)
    shards = [open_shard(shard_key(p.content, parser, skip), p.origin, p.rows, parser, skip) for p in parts]
    whole = parts[0].name if len(parts) == 1 or config.path is None else user_path(config.path).resolve().name
    if any(map(len, shards)) and not config.streaming:  # the first rows of a set may lack what later ones have
        _check_columns(whole, parser, shards)
    return whole, [part.name for part in parts], shards


def _check_columns(name: str, parser: RowParser, shards: Sequence[Shard]) -> None:
    """Refuse a column that the user named and no row has: a field that rows may lack would be missing in silence."""
    had = frozenset[str]().union(*(shard.columns for shard in shards))
    unread = {key for shard in shards for key in shard.ignored}
    for field, column in parser.columns.items():
        if column not in had:
            raise DataError(
                f"{name}: no usable row has '{column}' to read, which columns={{{field}: {column}}} names."
                f"{did_you_mean(column, unread)} Name a column of the rows, or leave it out."
            )


def _check(config: SourceConfig, kind: RecordKind) -> None:
    named = {key: value for key in ("path", "hub", "builtin") if (value := getattr(config, key)) is not None}
    if len(named) != 1:
        got = " and ".join(f"{key}={value}" for key, value in named.items()) or "none of them"
        raise DataError(f"a source takes its rows from one of path, hub or builtin: got {got}.")
    for key, value in asdict(config).items():  # a recipe's are checked as they are read; a path may be of any bytes
        if key != "path" and (fault := unusable_text(json.dumps(value, ensure_ascii=False, default=str))):
            raise DataError(f"{key} of source {next(iter(named.values()))} {fault}.")
    if config.limit is not None and config.limit < 1:
        raise DataError(f"limit of source {next(iter(named.values()))}: got {config.limit}, expected at least 1 row.")
    if config.on_empty not in ("error", "skip"):
        raise DataError(f"on_empty: got '{config.on_empty}', expected 'error' or 'skip'.")
    if config.flows:
        raise DataError(
            "streaming=true without a limit reads running text along while training, and here all rows are read: remove it, or "
            "read the first rows of a Hub data set with limit=N."
        )
    if (config.instruction or config.document_instruction) and kind not in INSTRUCTED:
        raise DataError(
            f"instruction, document_instruction: only pairs and grounded rows have them, and {kind.value} rows are read."
        )
    for problem in config.problems("source"):
        raise DataError(problem)


def _parts(config: SourceConfig, kind: RecordKind) -> list[_Part]:
    if config.path is not None:
        root = user_path(config.path)
        files = files_of_split(root, data_files(root), config.split)
        names = [str(Path(root.resolve().name, file.relative_to(root))) for file in files]
        # Each rank starts with another file, so that ranks of a machine hash different ones at a time (`core.reading_once`).
        first = distributed.rank() * len(files) // distributed.world_size()
        hashes = {file: _hash_file(file) for file in (*files[first:], *files[:first])}
        return [_file_part(name, file, hashes[file]) for name, file in zip(names, files, strict=True)]
    if config.builtin is not None:
        name, file = pydocs_file(config.subset, config.split_or_train, kind)
        return [_file_part(name, file, _hash_file(file))]
    assert config.hub is not None
    name, content, rows = hub_rows(config)
    return [_Part(name, f"Hub data set {name}", content, rows)]


def _file_part(name: str, path: Path, digest: str) -> _Part:
    # The format is part of the content: the same bytes differ in meaning between .txt and .csv.
    return _Part(name, str(path), f"{extension(path)}:{digest}", lambda: read_rows(path))


def _hash_file(path: Path) -> str:
    """The hash of a file's bytes.

    Raises:
        DataError: the file is empty or cannot be read.
    """

    def read() -> str:
        digest = blake2b(digest_size=16)
        with open(path, "rb") as handle:
            while block := handle.read(_READ_BYTES):
                digest.update(block)
        return digest.hexdigest()

    try:
        if path.stat().st_size == 0:
            raise DataError(f"{path} is empty: expected at least one row.")
        place = blake2b(str(path.resolve()).encode(), digest_size=16).hexdigest()
        return once(cache_dir("hashes", place), [path], read)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}.") from error


def _choose(config: SourceConfig, num_rows: int, seed: int) -> np.ndarray | None:
    """Indices of the rows kept under `limit`, int64, ascending; None for all."""
    if config.limit is None or config.limit >= num_rows:
        return None
    generator = np.random.default_rng(derive_seed(seed, "limit"))
    return np.sort(generator.choice(num_rows, config.limit, replace=False))
