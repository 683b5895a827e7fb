"""Streams: endless, reproducible, resumable draws of samples.

The samples of draw `i` depend on the seed, the stream's name and `i`; the order of a source's epoch on the seed, the source and
the epoch. Nothing is replayed to resume: a state is a few integers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from unified_lm.batch.sample import Sample
from unified_lm.config.objectives import TokenObjectiveConfig
from unified_lm.config.schema import RunConfig, StreamConfig
from unified_lm.core.errors import CheckpointError, ConfigError, DataError, about, did_you_mean
from unified_lm.core.random import derive_seed
from unified_lm.data.cursor import Cursor
from unified_lm.data.formats import get_format
from unified_lm.data.formats.facts import check_samples
from unified_lm.data.prompts.encoding import PromptEncoder
from unified_lm.data.prompts.templates import get_template
from unified_lm.data.sources import HELD_OUT_SEED, RecordSource, open_sources
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


@dataclass(frozen=True)
class StreamStats:
    """What became of a stream's rows.

    Attributes:
        rows: usable rows per source.
        truncated: texts cut to their limit, per source.
        rejected: records and texts left out, by reason, over all sources.
        epochs: finished epochs per source.
    """

    rows: dict[str, int]
    truncated: dict[str, int]
    rejected: Counter[str]
    epochs: dict[str, int]


class Stream:
    """Samples of one format from one or more sources.

    Args:
        name: the stream's name.
        config: its settings; `config.sources` is not read here.
        sources: validated records.
        tokenizer: a fast tokenizer.
        seed: of order and choices.
        weights: per source its relative share of draws (`SourceConfig.weight`); None: 1 each.

    Attributes:
        pooled: whether its samples form groups that are embedded (else they carry labels).
        scored: whether its samples count as wholes, each with a control.
        batch_size: groups or samples per step over all ranks.
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
        self.name = name
        self.config = config
        self.sources = list(sources)
        self.encoder = PromptEncoder(get_template(config.template), tokenizer)
        self.format = get_format(config)(name, config, self.encoder)
        self.pooled = config.pooled
        self.scored = config.scored
        self.references: list[np.ndarray] = []
        self.batch_size = config.batch_size
        self.seed = seed
        self.draws = 0
        self.tables = [self._tokenize(source) for source in self.sources]
        self.cursors = [self._cursor(index) for index in range(len(self.sources))]
        self.probabilities = self._source_probabilities([1.0] * len(self.sources) if weights is None else weights)
        drawn = np.flatnonzero(self.probabilities)
        self.format.check_together([self.tables[i] for i in drawn], [self.source_names[i] for i in drawn])
        check_samples(name, config, self.format.samples(self.tables[drawn[0]], 0, 0, np.random.default_rng(0)))

    def draw(self, count: int | None = None) -> list[Sample]:
        """One global batch: `count` groups or samples (default: `batch_size`), group after group.

        Groups that are embedded come from one source per draw, so that a batch's negatives are of one kind (unless
        `mix_sources` is set); labeled samples choose their source one by one.
        """
        count = self.batch_size if count is None else count
        rng = np.random.default_rng(derive_seed(self.seed, self.name, "draw", self.draws))
        self.draws += 1
        size = 1 if self.config.one_source_per_batch else count
        chosen = np.broadcast_to(rng.choice(len(self.sources), size=size, p=self.probabilities), count)
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
    def stats(self) -> StreamStats:
        """Rows, cut texts, rejections and finished epochs."""
        names = self.source_names
        rejected: Counter[str] = Counter()
        for source, table in zip(self.sources, self.tables, strict=True):
            rejected += Counter(source.rejected) + table.rejected
        return StreamStats(
            rows=dict(zip(names, map(len, self.tables), strict=True)),
            truncated={name: int(table.truncated.sum()) for name, table in zip(names, self.tables, strict=True)},
            rejected=rejected,
            epochs={name: cursor.epoch for name, cursor in zip(names, self.cursors, strict=True)},
        )

    @property
    def source_names(self) -> list[str]:
        """Names of the sources, told apart by a number where two are equal."""
        names = [source.name for source in self.sources]
        return [name if names.count(name) == 1 else f"{name} #{index}" for index, name in enumerate(names)]

    def reset(self) -> None:
        """Go back to the first draw."""
        self.draws = 0
        self.cursors = [self._cursor(index) for index in range(len(self.sources))]

    def state_dict(self) -> dict[str, Any]:
        """Everything that resuming needs, as JSON."""
        cursors = [cursor.state_dict() for cursor in self.cursors]
        return {"draws": self.draws, "seed": self.seed, "fingerprint": self.fingerprint, "cursors": cursors}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where a saved stream stopped.

        Raises:
            CheckpointError: the state is of other data, another tokenizer, other settings or another seed.
        """
        for key, ours in (("fingerprint", self.fingerprint), ("seed", self.seed)):
            if state.get(key) != ours:
                raise CheckpointError(
                    f"the checkpoint's stream '{self.name}' has {key} {state.get(key)!r}, this run has {ours!r}: rows, "
                    "tokenizer, limits, weights or seed have changed, so the data order cannot be continued. Undo the change, "
                    "or start a new run from the checkpoint's weights."
                )
        self.draws = state["draws"]
        for cursor, saved in zip(self.cursors, state["cursors"], strict=True):
            cursor.load_state_dict(saved)

    @cached_property
    def fingerprint(self) -> str:
        """The hash of everything that decides which samples are drawn, but the seed."""
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

    def _source_probabilities(self, weights: Sequence[float]) -> np.ndarray:
        """In proportion to (weight * rows) ** temperature."""
        if min(weights) < 0 or max(weights) == 0:
            raise ConfigError(
                f"streams.{self.name}: source weights are {list(weights)}; none may be negative, one must be positive"
            )
        shares = np.array([weight * len(table) for weight, table in zip(weights, self.tables, strict=True)], dtype=np.float64)
        powered = np.where(shares > 0, shares**self.config.source_temperature, 0.0)
        return powered / powered.sum()


def build_streams(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, Stream]:
    """The training streams of a run, by name."""
    return {
        name: _open_stream(name, stream, tokenizer, config.seed, f"streams.{name}") for name, stream in config.streams.items()
    }


def build_validation_streams(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, Stream]:
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
        stream = _open_stream(name, held_out, tokenizer, derive_seed(HELD_OUT_SEED, "validation"), f"validation.sources.{name}")
        stream.batch_size = min(stream.batch_size, stream.num_rows)
        streams[name] = stream
    return streams


def _open_stream(name: str, config: StreamConfig, tokenizer: PreTrainedTokenizerBase, seed: int, key: str) -> Stream:
    """Open a stream; errors begin with its `key` in the configuration."""
    kind = config.record_kind
    with about(key):
        opened = [(source, part.weight) for part in config.sources for source in open_sources(part, kind, seed)]
        return Stream(name, config, [source for source, _ in opened], tokenizer, seed, [weight for _, weight in opened])


def _with_reference(sample: Sample, reference: float) -> Sample:
    assert sample.sequence is not None, "only samples that are scored as wholes have a reference"
    return replace(sample, sequence=replace(sample.sequence, reference=reference))
