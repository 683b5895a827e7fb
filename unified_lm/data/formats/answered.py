"""Formats of prompts and answers: conversations, and completions that are desirable or not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from unified_lm.batch.sample import IGNORE, Sample, SequenceLabel
from unified_lm.config.streams import StreamConfig
from unified_lm.core.errors import DataError
from unified_lm.data.formats.answered_config import ChatStream, PreferenceStream
from unified_lm.data.formats.base import Format, hash_text
from unified_lm.data.formats.mismatch import mismatched_partners
from unified_lm.data.prompts.encoding import Encoded, Rejection
from unified_lm.data.rows.records import ChatRecord, PreferenceRecord
from unified_lm.data.token_cache import Item, Role, Row, TokenTable, chunks


class Chat(Format):
    """Conversations; every answer is learned with its end token (a cut one without), nothing else."""

    Config: ClassVar[type[StreamConfig]] = ChatStream
    config: ChatStream

    def limits(self) -> dict[str, Any]:
        """See `Format.limits`."""
        return {"tokens": self.config.max_tokens, "cut_answers": "open"}

    def rows(self, source: Any, rejected: Counter[str]) -> Iterator[Row]:
        """See `Format.rows`."""
        for chunk in chunks(source):
            records: list[ChatRecord] = [record for _, record in chunk]
            unlearned = [record.unlearned for record in records]
            encoded = self.encoder.chat([record.turns for record in records], self.config.max_tokens, unlearned)
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
        return self._labeled_sample(encoded, group, ids, labels)


class Preference(Chat):
    """A prompt with a completion that is desirable or not (slot 0), and with the completion of another prompt (slot 1).

    The second sample is a control: scored, never trained on. Which completion it has depends on the rows of the source alone
    (`data/formats/mismatch.py`), so that what is known about a sample can be stored.
    """

    Config: ClassVar[type[StreamConfig]] = PreferenceStream

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
        label = SequenceLabel(desirable=desirable)
        return [replace(sample, sequence=label), replace(control, slot=1, sequence=SequenceLabel())]
