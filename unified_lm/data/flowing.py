"""Streams of running text that is read along while training: corpora too long to be counted or tokenized beforehand.

A position is a file, a row and a number of pieces; resuming opens one file and skips to the row. Every epoch reads the files in
another order, and of each file blocks of rows, shuffled within a block. Files therefore should not be sorted by kind.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from unified_lm.batch.sample import Sample
from unified_lm.config.streams import RecordKind, SourceConfig, StreamConfig
from unified_lm.core.errors import CheckpointError, ConfigError, DataError, about
from unified_lm.core.random import derive_seed
from unified_lm.core.user_files import user_path
from unified_lm.data.formats.running_text import Text
from unified_lm.data.prompts.encoding import Encoded
from unified_lm.data.pydocs.dataset import pydocs_file
from unified_lm.data.rows.hub_datasets import hub_parts
from unified_lm.data.rows.parse import RowParser
from unified_lm.data.rows.readers import Rows, data_files, read_rows
from unified_lm.data.rows.record_cache import Skip, valid_rows
from unified_lm.data.rows.splits import files_of_split
from unified_lm.data.stream import SourceEntry, Stream, distinct_names
from unified_lm.data.token_cache import table_key

logger = logging.getLogger(__name__)

BLOCK_ROWS = 4096
"""Rows that are read and shuffled at a time: some million tokens of ordinary documents, which are held in memory."""

_ROWS_AT_ONCE = 256
"""Rows that are tokenized at a time: a tokenizer holds much more than ids of them."""


@dataclass(frozen=True)
class Part:
    """One file of a source.

    Attributes:
        origin: for messages.
        rows: starts reading at a row, counted from 0.
    """

    origin: str
    rows: Callable[[int], Rows]


@dataclass(frozen=True)
class Flow:
    """The rows of one source, none of which has been read yet.

    Attributes:
        name: as `RecordSource.name`.
        parts: its files, in sorted order.
        fingerprint: hash of names and sizes of files (on the Hub: of names and the commit) and of the settings that select
            rows. The rows themselves are not hashed: that would read all of them.
        parser: parses rows.
        skip: rows to leave out and count instead of raising, as in `open_shard`.
    """

    name: str
    parts: Sequence[Part]
    fingerprint: str
    parser: RowParser
    skip: Skip


def open_flow(config: SourceConfig, kind: RecordKind) -> Flow:
    """Find the files of a source.

    Raises:
        DataError: no such source, or settings that it cannot honor.
    """
    for problem in config.problems("source"):
        raise DataError(problem)
    parser = RowParser(kind, config.columns, config.ignore)
    skip: Skip = "all" if config.on_unusable == "skip" else "empty"
    if config.hub is not None:
        name, files_of_hub, readers = hub_parts(config)
        parts = [Part(f"Hub data set {name}", reader) for reader in readers]
        content: list[Any] = [name, files_of_hub, len(parts)]
    else:
        name, root, files = _local_files(config, kind)
        parts = [Part(str(file), partial(_rows_from, file)) for file in files]
        content = [[str(file.relative_to(root)), file.stat().st_size] for file in files]
    # Not `skip`: a run that met a row it cannot use may go on with on_unusable=skip, and reads what it would have read.
    settings = [content, BLOCK_ROWS, sorted(parser.columns.items()), sorted(parser.ignore)]
    return Flow(name, parts, blake2b(repr(settings).encode(), digest_size=16).hexdigest(), parser, skip)


def _local_files(config: SourceConfig, kind: RecordKind) -> tuple[str, Path, list[Path]]:
    """Name of the source, the folder that names of files are relative to, and the files."""
    if config.builtin is not None:
        name, file = pydocs_file(config.subset, config.split_or_train, kind)
        return name, file.parent, [file]
    assert config.path is not None
    root = user_path(config.path)
    return root.resolve().name, root if root.is_dir() else root.parent, files_of_split(root, data_files(root), config.split)


def _rows_from(file: Path, start: int) -> Rows:
    return islice(read_rows(file), start, None)


_START: Mapping[str, Any] = {"epoch": 0, "part": 0, "row": 0, "given": 0, "held": [], "rejected": {}, "truncated": 0}


class FlowCursor:
    """Where the reading of one source stands: gives pieces, epoch after epoch.

    Args:
        flow: the source.
        format: makes pieces of texts.
        seed: of the order of files and rows.
    """

    def __init__(self, flow: Flow, format: Text, seed: int) -> None:
        self.flow = flow
        self._format = format
        self._seed = seed
        self._go_to(_START)

    def _go_to(self, state: Mapping[str, Any]) -> None:
        self.epoch, self._part, self._row = int(state["epoch"]), int(state["part"]), int(state["row"])
        self._given = int(state["given"])
        self._held = np.asarray(state["held"], dtype=np.int32)  # left over from the blocks before this one
        self._rows: Rows | None = None
        self._pieces: list[Encoded] = []
        self._left = self._held  # after this block
        self._rejected_before = Counter(dict(state["rejected"]))  # in the blocks before this one
        self._rejected: Counter[str] = Counter()  # in this block
        self.truncated = int(state["truncated"])
        self._read = 0  # rows of this block
        # Whether this epoch has had a token; of one that was begun by another process nobody knows.
        self._fruitful = any(state[key] for key in ("part", "row", "given"))

    def reset(self) -> None:
        """Go back to the first row of the first epoch."""
        self._go_to(_START)

    @property
    def rejected(self) -> Counter[str]:
        """Records and texts left out so far, by reason; those of a block once it is read."""
        return self._rejected_before + self._rejected

    def take(self) -> Encoded:
        """The next piece.

        Raises:
            DataError: a row that cannot be used, or a source without a usable one.
        """
        while self._given >= len(self._pieces):
            self._next_block()
        piece = self._pieces[self._given]
        self._given += 1
        self.truncated += piece.truncated
        return piece

    def state_dict(self) -> dict[str, Any]:
        """The position, as JSON values: the block that is being given out, and how many of its pieces have been."""
        return {
            "epoch": self.epoch,
            "part": self._part,
            "row": self._row,
            "given": self._given,
            "held": self._held.tolist(),
            "rejected": dict(self._rejected_before),
            "truncated": self.truncated,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at a saved position.

        Raises:
            CheckpointError: the file has no such rows any more.
        """
        self._go_to(state)
        if not self._given:
            return
        self._read_block()
        if self._given > len(self._pieces):
            part = self.flow.parts[self._order()[self._part]]
            raise CheckpointError(
                f"{part.origin} has given {self._given} pieces of the rows from {self._row + 1} on, and has "
                f"{len(self._pieces)} now: its rows have changed, so the data order cannot be continued. Put the file back, or "
                "start a new run from the checkpoint's weights."
            )

    def _next_block(self) -> None:
        """Go on to the next block that can be read, in the next file or epoch if this one is at its end."""
        self._row, self._held, self._given = self._row + self._read, self._left, 0
        self._rejected_before, self._rejected = self.rejected, Counter()
        self._read_block()
        if self._read:
            return
        self._part, self._row, self._rows = self._part + 1, 0, None
        if self._part == len(self.flow.parts):
            if not self._fruitful:
                reasons = ", ".join(f"{count} x {reason}" for reason, count in self.rejected.items())
                raise DataError(f"{self.flow.name} has no usable row ({reasons or 'it is empty'})")
            self.epoch, self._part, self._fruitful = self.epoch + 1, 0, False

    def _read_block(self) -> None:
        part = self.flow.parts[self._order()[self._part]]
        if self._rows is None:
            self._rows = iter(part.rows(self._row))
        rows = list(islice(self._rows, BLOCK_ROWS))
        self._read = len(rows)
        usable = valid_rows(part.origin, iter(rows), self.flow.parser, self.flow.skip, self._rejected)
        texts = [str(fields["text"]) for _, fields in usable]
        order = self._rng("block", self._part, self._row).permutation(len(texts))
        self._pieces, self._left = [], self._held
        for start in range(0, len(texts), _ROWS_AT_ONCE):
            some = [texts[i] for i in order[start : start + _ROWS_AT_ONCE]]
            pieces, self._left = self._format.pieces(some, self._left, self._rejected)
            self._pieces += pieces
        self._fruitful |= bool(self._pieces) or len(self._left) > len(self._held)

    def _order(self) -> np.ndarray:
        """int64 `[files]`: the order in which this epoch reads them."""
        return self._rng("files").permutation(len(self.flow.parts))

    def _rng(self, *what: object) -> np.random.Generator:
        return np.random.default_rng(derive_seed(self._seed, self.flow.fingerprint, self.epoch, *what))


class FlowingStream(Stream):
    """A stream of running text that is read along while training.

    Every rank reads and tokenizes the whole step, one step ahead (`data/prefetch.py`).

    Args:
        name: the stream's name.
        config: its settings; `config.sources` is not read here.
        flows: what it reads.
        tokenizer: a fast tokenizer.
        seed: of order and choices.
        weights: per source its relative share of draws.
    """

    def __init__(
        self,
        name: str,
        config: StreamConfig,
        flows: Sequence[Flow],
        tokenizer: PreTrainedTokenizerBase,
        seed: int,
        weights: Sequence[float],
    ) -> None:
        super().__init__(name, config, tokenizer, seed)
        assert isinstance(self.format, Text), "only running text can flow (StreamConfig.can_flow)"
        text = self.format
        if type(text).samples is not Text.samples:
            raise ConfigError(
                f"streams.{name}.sources.0.streaming: the format {config.format} overrides `samples`, which has whole rows, "
                "and rows that are read along are pieces. Override `sample`, or leave streaming out."
            )
        self.cursors = [FlowCursor(flow, text, derive_seed(seed, name, "order", index)) for index, flow in enumerate(flows)]
        self.source_names = distinct_names([flow.name for flow in flows])
        self.probabilities = self._shares(weights, weights)

    def draw(self, count: int | None = None) -> list[Sample]:
        """See `Stream.draw`; samples choose their source one by one."""
        count = self.batch_size if count is None else count
        rng = self._rng_of_draw()
        return list(self._samples(self._sources_of_draw(count, rng), rng))

    def _samples(self, chosen: np.ndarray, rng: np.random.Generator) -> Iterator[Sample]:
        assert isinstance(self.format, Text)
        for group, index in enumerate(chosen.tolist()):
            with about(f"streams.{self.name}"):
                taken = self.cursors[index].take()
            yield self.format.sample(taken, group, rng)

    @property
    def entries(self) -> list[SourceEntry]:
        """See `Stream.entries`; numbers of what has been read so far."""
        return [
            SourceEntry(
                name, None, cursor.rejected, cursor.truncated, cursor.epoch, cursor.flow.fingerprint, cursor.flow.parser.ignored
            )
            for name, cursor in zip(self.source_names, self.cursors, strict=True)
        ]

    def reset(self) -> None:
        """See `Stream.reset`."""
        self.draws = 0
        for cursor in self.cursors:
            cursor.reset()

    @cached_property
    def fingerprint(self) -> str:
        """See `Stream.fingerprint`; of the rows it has names and sizes of files."""
        own = {key: value for key, value in asdict(self.config).items() if key not in ("sources", "objective")}
        return table_key(
            name=self.name,
            flows=[cursor.flow.fingerprint for cursor in self.cursors],
            tokenizer=self.encoder.fingerprint,
            leading=self.encoder.leading_ids,
            settings=own,
            probabilities=self.probabilities.round(9).tolist(),
        )
