"""Formats of running text: every token learned, or hidden ones predicted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np

from unified_lm.batch.sample import IGNORE, Sample
from unified_lm.config.streams import StreamConfig
from unified_lm.core.errors import ConfigError, did_you_mean
from unified_lm.data.formats.base import Format
from unified_lm.data.formats.masking import Corruptor
from unified_lm.data.formats.running_text_config import CHUNKINGS, MaskedTextStream, MaskingConfig, TextStream
from unified_lm.data.prompts.encoding import Encoded, PromptEncoder, Rejection
from unified_lm.data.rows.records import TextRecord
from unified_lm.data.token_cache import Item, Row, TokenTable, chunks


class Text(Format):
    """Running text: every token but the first is learned."""

    Config: ClassVar[type[StreamConfig]] = TextStream
    config: TextStream

    def __init__(self, name: str, config: TextStream, encoder: PromptEncoder) -> None:
        super().__init__(name, config, encoder)
        if config.chunking not in CHUNKINGS:
            raise ConfigError(
                f"streams.{name}: unknown chunking '{config.chunking}'.{did_you_mean(config.chunking, CHUNKINGS)}"
            )
        self.leading = np.asarray(encoder.leading_ids, dtype=np.int32)

    def limits(self) -> dict[str, Any]:
        """See `Format.limits`."""
        return {"tokens": self.config.max_tokens, "chunking": self.config.chunking}

    def rows(self, source: Any, rejected: Counter[str]) -> Iterator[Row]:
        """See `Format.rows`."""
        pieces = self._records(source, rejected) if self.config.chunking == "record" else self._concatenated(source)
        for number, encoded in pieces:
            if self._usable(encoded.ids):
                yield Row(number, [Item(encoded)])
            else:
                rejected[Rejection.SHORT.value] += 1

    def _usable(self, ids: np.ndarray) -> bool:
        return len(ids) >= 2

    @property
    def _room(self) -> int:
        """Tokens of text in one sample.

        Raises:
            ConfigError: the limit leaves none.
        """
        room = self.config.max_tokens - len(self.leading)
        if room < 1:
            raise ConfigError(
                f"streams.{self.name}.max_tokens is {self.config.max_tokens}, and {len(self.leading)} tokens precede every "
                "text; raise the limit."
            )
        return room

    def _records(self, source: Any, rejected: Counter[str]) -> Iterator[tuple[int, Encoded]]:
        for chunk in chunks(source):
            for (number, _), piece in zip(chunk, self._one_by_one([record.text for _, record in chunk], rejected), strict=True):
                if piece is not None:
                    yield number, piece

    def _one_by_one(self, texts: Sequence[str], rejected: Counter[str]) -> Iterator[Encoded | None]:
        """A piece of every text, cut at the limit; None for empty ones, which are counted."""
        room = self._room
        texts = [text.strip() for text in texts]
        for text, ids in zip(texts, self.encoder.running_text(texts), strict=True):
            if text:
                yield Encoded(np.concatenate([self.leading, ids[:room]]), truncated=len(ids) > room)
            else:
                rejected[Rejection.EMPTY.value] += 1
                yield None

    def _concatenated(self, source: Any) -> Iterator[tuple[int, Encoded]]:
        """Rows joined by newlines and cut into pieces of the limit; the last piece may be shorter. Attention crosses rows."""
        room = self._room
        held, first = np.zeros(0, dtype=np.int32), 0
        for chunk in chunks(source):
            texts: list[TextRecord] = [record for _, record in chunk]
            for (number, _), ids in zip(chunk, self._joined([text.text for text in texts]), strict=True):
                held = np.concatenate([held, ids])
                while len(held) >= room:
                    yield first, Encoded(np.concatenate([self.leading, held[:room]]))
                    held, first = held[room:], number
        if len(held):
            yield first, Encoded(np.concatenate([self.leading, held]))

    def _joined(self, texts: Sequence[str]) -> list[np.ndarray]:
        return self.encoder.running_text([f"{text.strip()}\n" for text in texts], continued=True)

    def pieces(self, texts: Sequence[str], held: np.ndarray, rejected: Counter[str]) -> tuple[list[Encoded], np.ndarray]:
        """The samples' tokens of a few texts, as `rows` makes them of a whole source.

        Args:
            texts: in their order.
            held: int32 `[tokens]`, left over from the texts before (`chunking=concatenate`), or empty.
            rejected: counts what yields no piece.

        Returns:
            The pieces, and what is left over for the texts that follow.
        """
        if self.config.chunking == "record":
            found = [piece for piece in self._one_by_one(texts, rejected) if piece is not None]
        else:
            room = self._room
            joined = np.concatenate([held, *self._joined(texts)])
            whole = len(joined) // room * room
            found = [Encoded(np.concatenate([self.leading, piece])) for piece in joined[:whole].reshape(-1, room)]
            held = joined[whole:]
        usable = [piece for piece in found if self._usable(piece.ids)]
        if len(usable) < len(found):
            rejected[Rejection.SHORT.value] += len(found) - len(usable)
        return usable, held

    def samples(self, table: TokenTable, row: int, group: int, rng: np.random.Generator) -> list[Sample]:
        """See `Format.samples`."""
        return [self.sample(table.encoded(int(table.row_starts[row])), group, rng)]

    def sample(self, encoded: Encoded, group: int, rng: np.random.Generator) -> Sample:
        """The sample of one piece in one draw; arguments as in `Format.samples`."""
        ids = encoded.ids.astype(np.int64)
        labels = ids.copy()
        labels[0] = IGNORE
        return self._labeled_sample(encoded, group, ids, labels)


class MaskedText(Text):
    """Text with hidden tokens, predicted from the position before them (MNTP)."""

    Config: ClassVar[type[StreamConfig]] = MaskedTextStream
    config: MaskedTextStream

    def __init__(self, name: str, config: MaskedTextStream, encoder: PromptEncoder) -> None:
        super().__init__(name, config, encoder)
        self.corruptor = Corruptor(config.masking or MaskingConfig(), encoder.tokenizer, encoder.special_ids)

    def _usable(self, ids: np.ndarray) -> bool:
        return len(self.corruptor.maskable(ids)) > 0

    def sample(self, encoded: Encoded, group: int, rng: np.random.Generator) -> Sample:
        """See `Text.sample`."""
        return self._labeled_sample(encoded, group, *self.corruptor.corrupt(encoded.ids, rng))
