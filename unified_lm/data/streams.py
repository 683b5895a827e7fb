"""Streams over tables of tokens, and the streams of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cached_property

import numpy as np
from transformers import PreTrainedTokenizerBase

from unified_lm.batch.sample import Sample
from unified_lm.config.objectives import TokenObjectiveConfig
from unified_lm.config.schema import RunConfig, StreamConfig
from unified_lm.core.errors import ConfigError, DataError, about, did_you_mean
from unified_lm.core.random import derive_seed
from unified_lm.data.cursor import Cursor
from unified_lm.data.flowing import FlowingStream, open_flow
from unified_lm.data.formats.facts import check_samples
from unified_lm.data.sources import HELD_OUT_SEED, RecordSource, open_sources
from unified_lm.data.stream import SourceEntry, Stream, distinct_names
from unified_lm.data.token_cache import TokenTable, cached_table, table_key

_OTHER_FORMATS = {
    "num_hard_negatives": 0,
    "max_query_tokens": 256,
    "max_document_tokens": 256,
    "max_tokens": 512,
    "chunking": "record",
    "masking": None,
}
"""Settings that every stream once had, whatever its format: part of a fingerprint, so that earlier checkpoints resume."""


class TableStream(Stream):
    """A stream whose rows are tokenized before training, and drawn in another order every epoch.

    Args:
        name: the stream's name.
        config: its settings; `config.sources` is not read here.
        sources: validated records.
        tokenizer: a fast tokenizer.
        seed: of order and choices.
        weights: per source its relative share of draws (`SourceConfig.weight`); None: 1 each.

    Attributes:
        references: per source float32 `[rows, 2]`, log-probabilities of each row's samples under the reference model, by slot;
            empty where they are computed while training.

    Raises:
        DataError: no source, a source without a usable row, or rows that lack what the settings ask.
        ConfigError: settings that contradict each other.
    """

    def __init__(
        self,
        name: str,
        config: StreamConfig,
        sources: Sequence[RecordSource],
        tokenizer: PreTrainedTokenizerBase,
        seed: int,
        weights: Sequence[float] | None = None,
    ) -> None:
        if not sources:
            raise DataError(f"streams.{name} has no source; set streams.{name}.sources")
        super().__init__(name, config, tokenizer, seed)
        self.sources = list(sources)
        self.source_names = distinct_names([source.name for source in sources])
        self.references: list[np.ndarray] = []
        self.tables = [self._tokenize(source) for source in self.sources]
        self.cursors = [self._cursor(index) for index in range(len(self.sources))]
        given = [1.0] * len(self.sources) if weights is None else weights
        self.probabilities = self._shares([w * len(table) for w, table in zip(given, self.tables, strict=True)], given)
        drawn = np.flatnonzero(self.probabilities)
        self.format.check_together([self.tables[i] for i in drawn], [self.source_names[i] for i in drawn])
        check_samples(name, config, self.format.samples(self.tables[drawn[0]], 0, 0, np.random.default_rng(0)))

    def draw(self, count: int | None = None) -> list[Sample]:
        """See `Stream.draw`.

        Groups that are embedded come from one source per draw, so that a batch's negatives are of one kind (unless
        `mix_sources` is set); labeled samples choose their source one by one.
        """
        count = self.batch_size if count is None else count
        rng = self._rng_of_draw()
        chosen = self._sources_of_draw(count, rng)
        numbers = np.bincount(chosen, minlength=len(self.sources)).tolist()
        rows = [iter(cursor.take(number)) for cursor, number in zip(self.cursors, numbers, strict=True)]
        return [
            sample
            for group, index in enumerate(chosen.tolist())
            for sample in self._samples(index, next(rows[index]), group, rng)
        ]

    def _samples(self, source: int, row: int, group: int, rng: np.random.Generator) -> list[Sample]:
        samples = self.format.samples(self.tables[source], row, group, rng)
        if not self.references:
            return samples
        known = self.references[source][row]
        return [_with_reference(sample, float(known[sample.slot])) for sample in samples]

    @property
    def num_rows(self) -> int:
        """Usable rows over all sources."""
        return sum(map(len, self.tables))

    @property
    def entries(self) -> list[SourceEntry]:
        """See `Stream.entries`."""
        parts = zip(self.source_names, self.sources, self.tables, self.cursors, strict=True)
        return [
            SourceEntry(
                name,
                rows=len(table),
                rejected=Counter(source.rejected) + table.rejected,
                truncated=int(table.truncated.sum()),
                epochs=cursor.epoch,
                fingerprint=source.fingerprint,
                ignored=source.ignored,
            )
            for name, source, table, cursor in parts
        ]

    def reset(self) -> None:
        """See `Stream.reset`."""
        self.draws = 0
        self.cursors = [self._cursor(index) for index in range(len(self.sources))]

    @cached_property
    def fingerprint(self) -> str:
        """See `Stream.fingerprint`."""
        own = {key: value for key, value in asdict(self.config).items() if key not in ("sources", "objective")}
        for key, default in (("mix_sources", False), ("on_few_negatives", "error")):
            if own.get(key) == default:
                own.pop(key)  # younger than the first checkpoints: without it they still resume
        settings = {**_OTHER_FORMATS, **own}
        return table_key(
            name=self.name, tables=self.table_keys(), settings=settings, probabilities=self.probabilities.round(9).tolist()
        )

    def table_keys(self) -> list[str]:
        """Per source the content hash of everything that decides its tokens."""
        return [self._key(source) for source in self.sources]

    def _key(self, source: RecordSource) -> str:
        return table_key(
            source=source.fingerprint,
            tokenizer=self.encoder.fingerprint,
            template=self.encoder.template.signature,
            leading=self.encoder.leading_ids,
            format=self.config.format,
            limits=self.format.limits(),
        )

    def _tokenize(self, source: RecordSource) -> TokenTable:
        rejected: Counter[str] = Counter()
        table = cached_table(self._key(source), self.format.rows(source, rejected), rejected)
        if not len(table):
            reasons = ", ".join(f"{count} x {reason}" for reason, count in (Counter(source.rejected) + table.rejected).items())
            raise DataError(f"streams.{self.name}: {source.name} has no usable row ({reasons or 'it is empty'})")
        self.format.check(table, source.name)
        return table

    def _cursor(self, index: int) -> Cursor:
        num_rows = len(self.tables[index])

        def order(epoch: int) -> np.ndarray:
            """int64 `[rows]`: a permutation that depends on seed, stream, source and epoch alone."""
            seed = derive_seed(self.seed, self.name, "order", index, self.sources[index].fingerprint, epoch)
            return np.random.default_rng(seed).permutation(num_rows)

        return Cursor(num_rows, order)


def build_streams(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, Stream]:
    """The training streams of a run, by name."""
    streams: dict[str, Stream] = {}
    for name, stream in config.streams.items():
        opened = _open_flowing if stream.is_flowing else _open_tables
        streams[name] = opened(name, stream, tokenizer, config.seed, f"streams.{name}")
    return streams


def build_validation_streams(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, TableStream]:
    """The held-out streams of a run (`config.validation.sources`), by the name of their training stream.

    Settings are those of the training stream; a batch is never larger than the held-out rows, so that no batch has a row twice.
    `Stream.reset` before each validation gives the same batches again.

    Raises:
        ConfigError: held-out sources of a stream that does not exist.
    """
    streams = {}
    for name, sources in config.validation.sources.items():
        if name not in config.streams:
            raise ConfigError(f"validation.sources names the stream '{name}'.{did_you_mean(name, config.streams)}")
        held_out = replace(config.streams[name], sources=sources)
        objective = held_out.objective
        if config.validation.normalization is not None and isinstance(objective, TokenObjectiveConfig):
            objective = replace(objective, normalization=config.validation.normalization, micro_batch_size=None)
            held_out = replace(held_out, objective=objective)
        seed = derive_seed(HELD_OUT_SEED, "validation")
        stream = _open_tables(name, held_out, tokenizer, seed, f"validation.sources.{name}")
        stream.batch_size = min(stream.batch_size, stream.num_rows)
        streams[name] = stream
    return streams


def _open_tables(name: str, config: StreamConfig, tokenizer: PreTrainedTokenizerBase, seed: int, key: str) -> TableStream:
    """Open a stream; errors begin with its `key` in the configuration."""
    kind = config.record_kind
    with about(key):
        opened = [(source, part.weight) for part in config.sources for source in open_sources(part, kind, seed)]
        return TableStream(name, config, [source for source, _ in opened], tokenizer, seed, [weight for _, weight in opened])


def _open_flowing(name: str, config: StreamConfig, tokenizer: PreTrainedTokenizerBase, seed: int, key: str) -> FlowingStream:
    """As `_open_tables`, of rows that are read along while training."""
    with about(key):
        flows = [open_flow(part, config.record_kind) for part in config.sources]
        return FlowingStream(name, config, flows, tokenizer, seed, [part.weight for part in config.sources])


def _with_reference(sample: Sample, reference: float) -> Sample:
    assert sample.sequence is not None, "only samples that are scored as wholes have a reference"
    return replace(sample, sequence=replace(sample.sequence, reference=reference))
