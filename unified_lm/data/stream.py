"""What every stream is: endless, reproducible, resumable draws of samples."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from unified_lm.batch.sample import Sample
from unified_lm.config.streams import StreamConfig
from unified_lm.core.errors import CheckpointError, ConfigError
from unified_lm.core.random import derive_seed
from unified_lm.data.formats import get_format
from unified_lm.data.prompts.encoding import PromptEncoder
from unified_lm.data.prompts.templates import get_template


@dataclass(frozen=True)
class SourceEntry:
    """What is known about one source of a stream.

    Attributes:
        name: told apart by a number where two are equal.
        rows: usable rows; None where they are read along while training.
        rejected: records and texts left out so far, by reason.
        truncated: texts cut to their limit.
        epochs: finished epochs.
        fingerprint: hash of the rows (read along: of names and sizes of files) and of the settings that select or change them.
        ignored: rows by key that they have and that is not read.
    """

    name: str
    rows: int | None
    rejected: Counter[str]
    truncated: int
    epochs: int
    fingerprint: str
    ignored: Counter[str]


@dataclass(frozen=True)
class StreamStats:
    """What became of a stream's rows.

    Attributes:
        rows: usable rows per source; None where they are read along while training.
        truncated: texts cut to their limit, per source.
        rejected: records and texts left out, by reason, over all sources.
        epochs: finished epochs per source.
    """

    rows: dict[str, int | None]
    truncated: dict[str, int]
    rejected: Counter[str]
    epochs: dict[str, int]


class Stream(ABC):
    """Samples of one format from one or more sources.

    The samples of draw `i` depend on the seed, the stream's name and `i`; the order of a source's epoch on the seed, the source
    and the epoch. Nothing is replayed to resume: a state is a few integers.

    Args:
        name: the stream's name.
        config: its settings; `config.sources` is not read here.
        tokenizer: a fast tokenizer.
        seed: of order and choices.

    Attributes:
        pooled: whether its samples form groups that are embedded (else they carry labels).
        scored: whether its samples count as wholes, each with a control.
        batch_size: groups or samples per step over all ranks.
        draws: batches drawn so far.
        probabilities: float64 `[sources]`, how often each source is drawn.
        cursors: where each source stands: `state_dict()` is JSON, `load_state_dict(state)` goes there.

    Raises:
        ConfigError: settings that contradict each other.
    """

    probabilities: np.ndarray
    cursors: Sequence[Any]

    def __init__(self, name: str, config: StreamConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        self.name = name
        self.config = config
        self.encoder = PromptEncoder(get_template(config.template), tokenizer)
        self.format = get_format(config)(name, config, self.encoder)
        self.pooled = config.pooled
        self.scored = config.scored
        self.batch_size = config.batch_size
        self.seed = seed
        self.draws = 0

    @abstractmethod
    def draw(self, count: int | None = None) -> list[Sample]:
        """One global batch: `count` groups or samples (default: `batch_size`), group after group."""

    @abstractmethod
    def reset(self) -> None:
        """Go back to the first draw."""

    @property
    @abstractmethod
    def entries(self) -> list[SourceEntry]:
        """What is known about every source."""

    @cached_property
    @abstractmethod
    def fingerprint(self) -> str:
        """The hash of everything that decides which samples are drawn, but the seed."""

    @property
    def stats(self) -> StreamStats:
        """Rows, cut texts, rejections and finished epochs."""
        entries = self.entries
        return StreamStats(
            rows={entry.name: entry.rows for entry in entries},
            truncated={entry.name: entry.truncated for entry in entries},
            rejected=sum((entry.rejected for entry in entries), Counter()),
            epochs={entry.name: entry.epochs for entry in entries},
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything that resuming needs, as JSON."""
        return {
            "draws": self.draws,
            "seed": self.seed,
            "fingerprint": self.fingerprint,
            "cursors": [c.state_dict() for c in self.cursors],
        }

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

    def _sources_of_draw(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """int64 `[count]`: the source of every group; groups that are embedded share one, unless `mix_sources` is set."""
        size = 1 if self.config.one_source_per_batch else count
        return np.broadcast_to(rng.choice(len(self.probabilities), size=size, p=self.probabilities), count)

    def _rng_of_draw(self) -> np.random.Generator:
        """The source of every choice of the next draw, which it counts."""
        rng = np.random.default_rng(derive_seed(self.seed, self.name, "draw", self.draws))
        self.draws += 1
        return rng

    def _shares(self, shares: Sequence[float], weights: Sequence[float]) -> np.ndarray:
        """float64 `[sources]`: in proportion to share ** temperature."""
        if min(weights) < 0 or max(weights) == 0:
            raise ConfigError(
                f"streams.{self.name}: source weights are {list(weights)}; none may be negative, one must be positive"
            )
        held = np.array(shares, dtype=np.float64)
        powered = np.where(held > 0, held**self.config.source_temperature, 0.0)
        return powered / powered.sum()


def distinct_names(names: Sequence[str]) -> list[str]:
    """The names, those that are equal followed by their number."""
    return [name if names.count(name) == 1 else f"{name} #{index}" for index, name in enumerate(names)]
