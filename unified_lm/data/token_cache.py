"""Cache of tokenized rows: built once per source, tokenizer, template and limits, then memory-mapped.

A table holds rows; a row holds items (a query and its documents, or one conversation or text); an item holds tokens and spans.
All data is in flat arrays, so that a million rows need no Python objects and several processes use one copy.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from enum import IntEnum
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from unified_lm.core import distributed
from unified_lm.core.cached_folder import cached_folder
from unified_lm.core.files import cache_dir, write_json
from unified_lm.data.prompts.encoding import Encoded

BUILDER_VERSION = 1
"""Part of every key; increase when the same input yields different tokens."""

_PROGRESS_ROWS = 20_000
"""Number of rows above which tokenizing takes seconds and shows a progress bar."""

_ARRAYS = {
    "ids": np.int32,
    "item_stops": np.int64,
    "spans": np.int32,
    "span_stops": np.int64,
    "text_ids": np.int64,
    "truncated": np.bool_,
    "roles": np.int8,
    "row_stops": np.int64,
    "records": np.int64,
}


class Role(IntEnum):
    """The role of an item in its row."""

    QUERY = 0
    POSITIVE = 1
    NEGATIVE = 2
    DESIRABLE = 3
    UNDESIRABLE = 4
    MISMATCHED = 5
    TURN = 6


@dataclass(frozen=True, eq=False)
class Item:
    """One encoded text of a row, with its role and the hash of its text (0 if unused)."""

    encoded: Encoded
    role: Role = Role.QUERY
    text_id: int = 0


@dataclass(frozen=True, eq=False)
class Row:
    """The items of one record, at least one, with the record's index in the source."""

    record: int
    items: Sequence[Item]


class TokenTable:
    """The tokenized rows of one source.

    Attributes:
        rejected: number of records rejected while tokenizing, by reason.
        roles: int8 `[items]`, the `Role` of every item.
        row_starts: int64 `[rows + 1]`, index of the first item of every row.
        records: int64 `[rows]`, index of each row's record in the source.
        truncated: bool `[items]`, whether an item was truncated.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], rejected: Mapping[str, int]) -> None:
        self.rejected = Counter(rejected)
        self.ids = arrays["ids"]
        self.item_starts = np.concatenate([[0], arrays["item_stops"]])
        self.spans = arrays["spans"].reshape(-1, 2)
        self.span_starts = np.concatenate([[0], arrays["span_stops"]])
        self.text_ids = arrays["text_ids"]
        self.truncated = arrays["truncated"]
        self.roles = arrays["roles"]
        self.row_starts = np.concatenate([[0], arrays["row_stops"]])
        self.records = arrays["records"]

    def __len__(self) -> int:
        return len(self.records)

    def items(self, row: int, role: Role | None = None) -> np.ndarray:
        """The indices of a row's items, int64: all of them or those with one role."""
        numbers = np.arange(self.row_starts[row], self.row_starts[row + 1])
        return numbers if role is None else numbers[self.roles[numbers] == role]

    def encoded(self, item: int) -> Encoded:
        """The tokens of an item."""
        spans = self.spans[self.span_starts[item] : self.span_starts[item + 1]]
        return Encoded(
            np.asarray(self.ids[self.item_starts[item] : self.item_starts[item + 1]]),
            tuple((int(start), int(stop)) for start, stop in spans),
            bool(self.truncated[item]),
        )


def table_key(**parts: Any) -> str:
    """Hash of everything that determines the tokens of a table."""
    text = json.dumps({"builder": BUILDER_VERSION, **parts}, sort_keys=True, default=repr)
    return blake2b(text.encode(), digest_size=16).hexdigest()


def cached_table(key: str, rows: Iterable[Row], rejected: Counter[str]) -> TokenTable:
    """The table under `key`, built from `rows` if the cache lacks an intact one.

    With several processes on a machine, the first one builds the table and the others wait for its lock. A damaged table is
    rebuilt with a warning.

    Args:
        key: see `table_key`.
        rows: the rows; consumed only if the table must be built.
        rejected: counter that the producer of `rows` fills; read after the rows are consumed.
    """
    folder = cached_folder(cache_dir("tokens", key), "tokenized rows", lambda target: _write(target, rows, rejected))
    arrays = {name: _map(folder / f"{name}.bin", dtype) for name, dtype in _ARRAYS.items()}
    return TokenTable(arrays, json.loads((folder / "table.json").read_text(encoding="utf-8"))["rejected"])


def _map(path: Path, dtype: Any) -> np.ndarray:
    return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype)


def _write(folder: Path, rows: Iterable[Row], rejected: Counter[str]) -> None:
    """Stream rows into one flat file per array."""
    with ExitStack() as stack:
        files = {name: stack.enter_context(open(folder / f"{name}.bin", "wb")) for name in _ARRAYS}
        tokens = spans = items = 0
        for row in rows:
            for item in row.items:
                tokens += len(item.encoded.ids)
                spans += len(item.encoded.spans)
                values = (item.encoded.ids, tokens, item.encoded.spans, spans, item.text_id, item.encoded.truncated, item.role)
                for (name, dtype), value in zip(_ARRAYS.items(), values):
                    files[name].write(np.asarray(value, dtype=dtype).tobytes())
            items += len(row.items)
            files["row_stops"].write(np.int64(items).tobytes())
            files["records"].write(np.int64(row.record).tobytes())
    write_json(folder / "table.json", {"rejected": rejected})


def chunks(source: Sequence[Any], size: int = 512) -> Iterator[list[tuple[int, Any]]]:
    """Yield the records of a source with their indices, `size` at a time; a long source shows a progress bar."""
    quiet = len(source) < _PROGRESS_ROWS or not distributed.is_rank0()
    with Progress(console=Console(stderr=True), transient=True, disable=quiet) as progress:
        task = progress.add_task(f"tokenizing {getattr(source, 'name', 'rows')}", total=len(source))
        for start in range(0, len(source), size):
            stop = min(start + size, len(source))
            yield [(index, source[index]) for index in range(start, stop)]
            progress.update(task, completed=stop)
