"""What every format is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import Any, ClassVar

import numpy as np

from unified_lm.batch.plan import attention_span
from unified_lm.batch.sample import Sample
from unified_lm.config.streams import StreamConfig
from unified_lm.core.errors import ConfigError
from unified_lm.data.prompts.encoding import Encoded, PromptEncoder
from unified_lm.data.token_cache import Row, TokenTable


class Format(ABC):
    """One shape of data.

    Args:
        name: the stream's name, written into its samples.
        config: the stream's settings, of the class `Config`.
        encoder: template and tokenizer.

    Attributes:
        Config: the description: settings, and what others ask a format about (`StreamConfig`). A subclass inherits it.
    """

    Config: ClassVar[type[StreamConfig]]

    def __init__(self, name: str, config: StreamConfig, encoder: PromptEncoder) -> None:
        if config.attention not in config.attentions:
            raise ConfigError(
                f"streams.{name}: format '{config.format}' cannot use attention '{config.attention}': its tokens would "
                f"see what they must predict, or it has no prompt of its own. Possible: {', '.join(config.attentions)}."
            )
        self.name = name
        self.config = config
        self.encoder = encoder

    @abstractmethod
    def limits(self) -> dict[str, Any]:
        """The settings that change the tokens of `rows`: part of the cache's key."""

    @abstractmethod
    def rows(self, source: Any, rejected: Counter[str]) -> Iterator[Row]:
        """Tokenize every record of a source; what yields no row is counted in `rejected`."""

    @abstractmethod
    def samples(self, table: TokenTable, row: int, group: int, rng: np.random.Generator) -> list[Sample]:
        """The samples of one row in one draw: a whole group, or a single sample.

        Args:
            table: the source's rows.
            row: which one.
            group: its number in the batch.
            rng: the source of every choice.
        """

    def check(self, table: TokenTable, source_name: str) -> None:  # noqa: B027 - most formats have nothing to check
        """Raise DataError where the rows of a source cannot give what the stream's settings ask."""

    def check_together(self, tables: Sequence[TokenTable], source_names: Sequence[str]) -> None:  # noqa: B027 - as above
        """Raise DataError where all sources that are drawn from, together, cannot give what the stream is for."""

    def _bidirectional(self, encoded: Encoded) -> tuple[int, int]:
        if self.config.attention == "bidirectional_prompt":
            return (0, encoded.spans[0][0])
        return attention_span(self.config.attention, len(encoded.ids))

    def _pooled_sample(self, encoded: Encoded, group: int, slot: int, text_id: int) -> Sample:
        return Sample(
            input_ids=encoded.ids.astype(np.int64),
            stream=self.name,
            bidirectional=self._bidirectional(encoded),
            pool=encoded.spans[0],
            group=group,
            slot=slot,
            text_id=text_id,
            truncated=encoded.truncated,
        )

    def _labeled_sample(self, encoded: Encoded, group: int, read: np.ndarray, labels: np.ndarray) -> Sample:
        return Sample(
            input_ids=read,
            stream=self.name,
            bidirectional=self._bidirectional(encoded),
            labels=labels,
            group=group,
            truncated=encoded.truncated,
        )


def hash_text(text: str) -> int:
    """A 63-bit hash of a stripped text, never 0."""
    return max(1, int.from_bytes(blake2b(text.strip().encode(), digest_size=8).digest(), "little") >> 1)
