"""From records to token rows, and from a row to the samples of one draw.

A format has two halves: `rows` runs once per source (its result is cached), `samples` runs at every draw and makes the random
choices (which positive, which negatives, what to mask).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from hashlib import blake2b
from typing import Any, ClassVar

import numpy as np

from unified_lm.batch.sample import IGNORE, Sample
from unified_lm.config.schema import MaskingConfig, StreamConfig
from unified_lm.core.errors import ConfigError, DataError, did_you_mean
from unified_lm.core.tables import resolve
from unified_lm.data.masking import Corruptor
from unified_lm.data.mismatch import mismatched_partners
from unified_lm.data.prompt_encoding import Encoded, PromptEncoder, Rejection
from unified_lm.data.records import ChatRecord, PairRecord, PreferenceRecord, RecordKind, TextRecord
from unified_lm.data.token_cache import Item, Role, Row, TokenTable, chunks

ATTENTIONS = ("causal", "bidirectional", "bidirectional_prompt")
CHUNKINGS = ("record", "concatenate")


class Format(ABC):
    """One shape of data.

    Args:
        name: the stream's name, written into its samples.
        config: the stream's settings.
        encoder: template and tokenizer.

    Attributes:
        kind: the records it reads.
        pooled: whether its samples come in groups that are embedded (else they carry labels).
        scored: whether a sample's labels count as a whole, with a control beside each (`Sample.control`).
        attentions: the attention modes that make sense for it.
    """

    kind: ClassVar[RecordKind]
    pooled: ClassVar[bool] = False
    scored: ClassVar[bool] = False
    attentions: ClassVar[tuple[str, ...]] = ATTENTIONS

    def __init__(self, name: str, config: StreamConfig, encoder: PromptEncoder) -> None:
        if config.attention not in ATTENTIONS:
            raise ConfigError(
                f"streams.{name}: unknown attention '{config.attention}'.{did_you_mean(config.attention, ATTENTIONS)}"
            )
        if config.attention not in self.attentions:
            raise ConfigError(
                f"streams.{name}: format '{config.format}' cannot use attention '{config.attention}': its tokens would "
                f"see what they must predict, or it has no prompt of its own. Possible: {', '.join(self.attentions)}."
            )
        self.name = name
        self.config = config
        self.encoder = encoder

    @abstractmethod
    def limits(self) -> dict[str, Any]:
        """The settings that change the tokens of `rows`: part of the cache's key."""

    @abstractmethod
    def rows(self, source: Any, rejected: Counter[str]) -> Iterator[Row]:
        """Tokenise every record of a source; what yields no row is counted in `rejected`."""

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
        if self.config.attention == "causal":
            return (0, 0)
        return (0, len(encoded.ids) if self.config.attention == "bidirectional" else encoded.spans[0][0])

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

    def _labelled_sample(self, encoded: Encoded, group: int, read: np.ndarray, labels: np.ndarray) -> Sample:
        return Sample(
            input_ids=read,
            stream=self.name,
            bidirectional=self._bidirectional(encoded),
            labels=labels,
            group=group,
            truncated=encoded.truncated,
        )


class Pairs(Format):
    """Query in slot 0, one of its positives in slot 1, hard negatives from slot 2 on."""

    kind = RecordKind.PAIR
    pooled = True
    attentions = ("causal", "bidirectional")

    def limits(self) -> dict[str, Any]:
        """See `Format.limits`."""
        return {"query": self.config.max_query_tokens, "document": self.config.max_document_tokens}

    def rows(self, source: Any, rejected: Counter[str]) -> Iterator[Row]:
        """See `Format.rows`."""
        for chunk in chunks(source):
            records: list[PairRecord] = [record for _, record in chunk]
            documents = [text for record in records for text in (*record.positives, *record.negatives)]
            queries = self._embed([record.query for record in records], self.config.max_query_tokens, source.name)
            encoded = iter(self._embed(documents, self.config.max_document_tokens, source.name))
            for (number, record), query in zip(chunk, queries, strict=True):
                roles = [Role.POSITIVE] * len(record.positives) + [Role.NEGATIVE] * len(record.negatives)
                texts = (*record.positives, *record.negatives)
                parts = [(record.query, Role.QUERY, query), *zip(texts, roles, encoded)]
                row = Row(number, [Item(e, role, hash_text(t.text)) for t, role, e in parts if isinstance(e, Encoded)])
                failed = [(role, e) for _, role, e in parts if isinstance(e, Rejection)]
                if {Role.QUERY, Role.POSITIVE} <= {item.role for item in row.items}:
                    rejected.update(f"{role.name.lower()}: {reason.value}" for role, reason in failed)
                    yield row
                else:
                    rejected[f"{failed[0][0].name.lower()}: {failed[0][1].value}"] += 1

    def _embed(self, texts: Sequence[Any], limit: int, source_name: str) -> list[Encoded | Rejection]:
        try:
            return self.encoder.embed([(text.text, text.instruction) for text in texts], limit)
        except DataError as error:
            raise DataError(f"{source_name}: {error}") from error

    def check(self, table: TokenTable, source_name: str) -> None:
        """Raise DataError when a row has fewer hard negatives than `num_hard_negatives`."""
        wanted = self.config.num_hard_negatives
        if not wanted or not len(table):
            return
        found = np.add.reduceat((table.roles == Role.NEGATIVE).astype(np.int64), table.row_starts[:-1])
        short = np.flatnonzero(found < wanted)
        if len(short):
            record = int(table.records[short[0]])
            raise DataError(
                f"{source_name}, row {record + 1}: {int(found[short[0]])} hard negatives, but "
                f"streams.{self.name}.num_hard_negatives asks for {wanted} ({len(short)} of {len(table)} rows have fewer). "
                "Mine more negatives, or lower the setting."
            )

    def samples(self, table: TokenTable, row: int, group: int, rng: np.random.Generator) -> list[Sample]:
        """See `Format.samples`."""
        positives, negatives = table.items(row, Role.POSITIVE), table.items(row, Role.NEGATIVE)
        chosen = [table.items(row, Role.QUERY)[0], positives[rng.integers(len(positives))]]
        if self.config.num_hard_negatives:
            chosen += list(rng.choice(negatives, size=self.config.num_hard_negatives, replace=False))
        return [
            self._pooled_sample(table.encoded(item), group, slot, int(table.text_ids[item])) for slot, item in enumerate(chosen)
        ]


class Chat(Format):
    """Conversations; every answer and its end token is learned, nothing else."""

    kind = RecordKind.CHAT
    attentions = ("causal", "bidirectional_prompt")

    def limits(self) -> dict[str, Any]:
        """See `Format.limits`."""
        return {"tokens": self.config.max_tokens}

    def rows(self, source: Any, rejected: Counter[str]) -> Iterator[Row]:
        """See `Format.rows`."""
        for chunk in chunks(source):
            records: list[ChatRecord] = [record for _, record in chunk]
            encoded = self.encoder.chat([record.turns for record in records], self.config.max_tokens)
            for (number, _), result in zip(chunk, encoded, strict=True):
                if isinstance(result, Rejection):
                    rejected[result.value] += 1
                else:
                    yield Row(number, [Item(result)])

    def samples(self, table: TokenTable, row: int, group: int, rng: np.random.Generator) -> list[Sample]:
        """See `Format.samples`."""
        return [self._answer_sample(table.encoded(int(table.row_starts[row])), group)]

    def _answer_sample(self, encoded: Encoded, group: int) -> Sample:
        ids = encoded.ids.astype(np.int64)
        labels = np.full(len(ids), IGNORE, dtype=np.int64)
        for start, stop in encoded.spans:
            labels[start:stop] = ids[start:stop]
        return self._labelled_sample(encoded, group, ids, labels)


class Preference(Chat):
    """A prompt with a completion that is desirable or not (slot 0), and with the completion of another prompt (slot 1).

    The second sample is a control: scored, never trained on. Which completion it has depends on the rows of the source alone
    (`data/mismatch.py`), so that what is known about a sample can be stored.
    """

    kind = RecordKind.PREFERENCE
    scored = True

    def rows(self, source: Any, rejected: Counter[str]) -> Iterator[Row]:
        """See `Format.rows`."""
        partners = mismatched_partners([hash_text(record.prompt) for record in source], source.name)
        for chunk in chunks(source):
            records: list[PreferenceRecord] = [record for _, record in chunk]
            others = [source[int(partners[number])].completion for number, _ in chunk]
            own = self._encode(records, [record.completion for record in records])
            crossed = self._encode(records, others)
            for (number, record), sample, control in zip(chunk, own, crossed, strict=True):
                if isinstance(sample, Rejection):
                    rejected[sample.value] += 1
                elif isinstance(control, Rejection):
                    rejected[f"mismatched: {control.value}"] += 1
                else:
                    role = Role.DESIRABLE if record.desirable else Role.UNDESIRABLE
                    yield Row(number, [Item(sample, role), Item(control, Role.MISMATCHED)])

    def _encode(self, records: Sequence[PreferenceRecord], completions: Sequence[str]) -> list[Encoded | Rejection]:
        turns = [(("user", r.prompt), ("assistant", text)) for r, text in zip(records, completions, strict=True)]
        return self.encoder.chat(turns, self.config.max_tokens)

    def check_together(self, tables: Sequence[TokenTable], source_names: Sequence[str]) -> None:
        """Raise DataError when the rows are all desirable or all undesirable: nothing could be told apart."""
        found = {role for table in tables for role in np.unique(table.roles)} & {Role.DESIRABLE, Role.UNDESIRABLE}
        if len(found) < 2:
            (role,) = found
            other = Role.UNDESIRABLE if role == Role.DESIRABLE else Role.DESIRABLE
            raise DataError(
                f"streams.{self.name}: all {sum(map(len, tables)):,} rows are {Role(role).name.lower()} "
                f"({', '.join(source_names)}). Learning from preferences takes both kinds: add a source with "
                f"{other.name.lower()} rows, or see that the column 'label' says what it should."
            )

    def samples(self, table: TokenTable, row: int, group: int, rng: np.random.Generator) -> list[Sample]:
        """See `Format.samples`."""
        item = int(table.row_starts[row])
        sample, control = (self._answer_sample(table.encoded(number), group) for number in (item, item + 1))
        desirable = bool(table.roles[item] == Role.DESIRABLE)
        return [replace(sample, desirable=desirable), replace(control, slot=1, control=True)]


class Text(Format):
    """Running text: every token but the first is learned."""

    kind = RecordKind.TEXT
    attentions: ClassVar[tuple[str, ...]] = ("causal",)

    def __init__(self, name: str, config: StreamConfig, encoder: PromptEncoder) -> None:
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
        room = self._room
        for chunk in chunks(source):
            texts = [record.text.strip() for _, record in chunk]
            for (number, _), text, ids in zip(chunk, texts, self.encoder.running_text(texts), strict=True):
                if text:
                    yield number, Encoded(np.concatenate([self.leading, ids[:room]]), truncated=len(ids) > room)
                else:
                    rejected[Rejection.EMPTY.value] += 1

    def _concatenated(self, source: Any) -> Iterator[tuple[int, Encoded]]:
        """Rows joined by newlines and cut into pieces of the limit; the last piece may be shorter. Attention crosses rows."""
        room = self._room
        held, first = np.zeros(0, dtype=np.int32), 0
        for chunk in chunks(source):
            texts: list[TextRecord] = [record for _, record in chunk]
            for (number, _), ids in zip(
                chunk, self.encoder.running_text([f"{t.text.strip()}\n" for t in texts], continued=True)
            ):
                held = np.concatenate([held, ids])
                while len(held) >= room:
                    yield first, Encoded(np.concatenate([self.leading, held[:room]]))
                    held, first = held[room:], number
        if len(held):
            yield first, Encoded(np.concatenate([self.leading, held]))

    def samples(self, table: TokenTable, row: int, group: int, rng: np.random.Generator) -> list[Sample]:
        """See `Format.samples`."""
        encoded = table.encoded(int(table.row_starts[row]))
        ids = encoded.ids.astype(np.int64)
        labels = ids.copy()
        labels[0] = IGNORE
        return [self._labelled_sample(encoded, group, ids, labels)]


class MaskedText(Text):
    """Text with hidden tokens, predicted from the position before them (MNTP)."""

    attentions = ("causal", "bidirectional")

    def __init__(self, name: str, config: StreamConfig, encoder: PromptEncoder) -> None:
        super().__init__(name, config, encoder)
        self.corruptor = Corruptor(config.masking or MaskingConfig(), encoder.tokenizer, encoder.special_ids)

    def _usable(self, ids: np.ndarray) -> bool:
        return len(self.corruptor.maskable(ids)) > 0

    def samples(self, table: TokenTable, row: int, group: int, rng: np.random.Generator) -> list[Sample]:
        """See `Format.samples`."""
        encoded = table.encoded(int(table.row_starts[row]))
        return [self._labelled_sample(encoded, group, *self.corruptor.corrupt(encoded.ids, rng))]


class Views(Format):
    """The same text twice, slots 0 and 1: only dropout tells the two apart (SimCSE)."""

    kind = RecordKind.TEXT
    pooled = True
    attentions = ("causal", "bidirectional")

    def limits(self) -> dict[str, Any]:
        """See `Format.limits`."""
        return {"tokens": self.config.max_tokens}

    def rows(self, source: Any, rejected: Counter[str]) -> Iterator[Row]:
        """See `Format.rows`."""
        for chunk in chunks(source):
            texts = [record.text for _, record in chunk]
            encoded = self.encoder.embed([(text, "") for text in texts], self.config.max_tokens)
            for (number, _), text, result in zip(chunk, texts, encoded, strict=True):
                if isinstance(result, Rejection):
                    rejected[result.value] += 1
                else:
                    yield Row(number, [Item(result, text_id=hash_text(text))])

    def samples(self, table: TokenTable, row: int, group: int, rng: np.random.Generator) -> list[Sample]:
        """See `Format.samples`."""
        item = int(table.row_starts[row])
        encoded, text_id = table.encoded(item), int(table.text_ids[item])
        return [self._pooled_sample(encoded, group, slot, text_id) for slot in (0, 1)]


FORMATS: dict[str, type[Format]] = {
    "pairs": Pairs,
    "chat": Chat,
    "preference": Preference,
    "text": Text,
    "masked_text": MaskedText,
    "views": Views,
}
"""Formats by name."""


def get_format(name: str) -> type[Format]:
    """The format class of that name or at that dotted path.

    Raises:
        ConfigError: there is none.
    """
    return resolve(name, FORMATS, "format")


def hash_text(text: str) -> int:
    """A 63-bit hash of a stripped text, never 0."""
    return max(1, int.from_bytes(blake2b(text.strip().encode(), digest_size=8).digest(), "little") >> 1)
