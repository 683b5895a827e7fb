"""Answers that are grounded in documents, trained as they are given: from blocks that are read from a cache at inference."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np

from unified_lm.batch.plan import consecutive_blocks
from unified_lm.batch.sample import IGNORE, Sample
from unified_lm.config.streams import StreamConfig
from unified_lm.core.errors import DataError
from unified_lm.core.random import derive_seed
from unified_lm.data.formats.base import Format, hash_text
from unified_lm.data.formats.grounded_config import GroundedStream
from unified_lm.data.prompts.encoding import Encoded, Rejection
from unified_lm.data.prompts.layouts import DOCUMENTS, QUESTION, Layout, get_layout
from unified_lm.data.rows.records import GroundedRecord, Text
from unified_lm.data.token_cache import Item, Role, Row, TokenTable, chunks


class Grounded(Format):
    """A question with its documents, as blocks or in the user's turn; the answer is learned.

    A row's items: the question as an embedded text, the documents likewise (those that hold the answer first), and for each
    layout the turn with the answer.
    """

    Config: ClassVar[type[StreamConfig]] = GroundedStream
    config: GroundedStream

    def limits(self) -> dict[str, Any]:
        """See `Format.limits`."""
        settings = self.config
        layouts = [(name, repr(get_layout(name))) for name in settings.layouts]
        written = settings.num_documents if any(get_layout(name).writes_documents for name in settings.layouts) else 0
        limits = (settings.max_query_tokens, settings.max_document_tokens, settings.max_turn_tokens)
        return {"layouts": layouts, "limits": limits, "written_documents": written}

    def rows(self, source: Any, rejected: Counter[str]) -> Iterator[Row]:
        """See `Format.rows`."""
        for chunk in chunks(source):
            records: list[GroundedRecord] = [record for _, record in chunk]
            queries = self._embed([record.pair.query for record in records], self.config.max_query_tokens, source.name)
            texts = [text for record in records for text in (*record.pair.positives, *record.pair.negatives)]
            documents = iter(self._embed(texts, self.config.max_document_tokens, source.name))
            parts = []
            for record, query in zip(records, queries, strict=True):
                pair = record.pair
                roles = [Role.POSITIVE] * len(pair.positives) + [Role.NEGATIVE] * len(pair.negatives)
                found = [(Role.QUERY, pair.query, query), *zip(roles, (*pair.positives, *pair.negatives), documents)]
                parts.append([Item(e, role, hash_text(text.text)) for role, text, e in found if isinstance(e, Encoded)])
            turns = [self._turns(records, parts, get_layout(name)) for name in self.config.layouts]
            for index, (number, _) in enumerate(chunk):
                answered = [turn[index] for turn in turns]
                roles_found = {item.role for item in parts[index]}
                failed = next((turn.value for turn in answered if isinstance(turn, Rejection)), None)
                if not {Role.QUERY, Role.POSITIVE} <= roles_found:
                    rejected["no usable question, or no usable document with the answer"] += 1
                elif failed:
                    rejected[failed] += 1
                else:
                    yield Row(number, [*parts[index], *(Item(turn, Role.TURN) for turn in answered)])

    def _embed(self, texts: Sequence[Text], limit: int, source_name: str) -> list[Encoded | Rejection]:
        try:
            return self.encoder.embed([(text.text, text.instruction) for text in texts], limit)
        except DataError as error:
            raise DataError(f"{source_name}: {error}") from error

    def _turns(self, records: Sequence[GroundedRecord], parts: Sequence[Sequence[Item]], layout: Layout) -> list[Any]:
        """What follows the blocks, with the answer; documents that are written out are one choice per row."""
        conversations = []
        for record, items in zip(records, parts, strict=True):
            said = layout.say(record.pair.query.text, self._written(items) if layout.writes_documents else ())
            conversations.append((("user", said), ("assistant", record.answers[0])))
        return self.encoder.chat(conversations, self.config.max_turn_tokens, continued=bool(layout.blocks))

    def _written(self, items: Sequence[Item]) -> list[str]:
        """The texts of a row's documents, cut as blocks are, in an order that depends on the row alone."""
        rng = np.random.default_rng(derive_seed("written", *(str(item.text_id) for item in items)))
        documents = [item for item in items if item.role is not Role.QUERY]
        roles = np.array([item.role for item in documents])
        chosen = [documents[number].encoded for number in self._choose(roles, rng)]
        decode = self.encoder.tokenizer.decode
        return [str(decode(text.ids[slice(*text.spans[0])], skip_special_tokens=True)) for text in chosen]

    def _choose(self, roles: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Which documents a prompt has, int64: those with the answer before those without, then in random order."""
        chosen = np.concatenate([rng.permutation(np.flatnonzero(roles == role)) for role in (Role.POSITIVE, Role.NEGATIVE)])
        return rng.permutation(chosen[: self.config.num_documents])

    def samples(self, table: TokenTable, row: int, group: int, rng: np.random.Generator) -> list[Sample]:
        """See `Format.samples`."""
        items = table.items(row)
        number = int(rng.integers(len(self.config.layouts)))
        layout, turn = get_layout(self.config.layouts[number]), table.encoded(int(table.items(row, Role.TURN)[number]))
        documents = items[np.isin(table.roles[items], (Role.POSITIVE, Role.NEGATIVE))]
        blocks = {
            QUESTION: table.items(row, Role.QUERY),
            DOCUMENTS: documents[self._choose(table.roles[documents], rng)],
        }
        read = [table.encoded(int(item)) for part in layout.blocks for item in blocks[part]]
        ids = np.concatenate([*(part.ids for part in read), turn.ids]).astype(np.int64)
        labels = np.full(len(ids), IGNORE, dtype=np.int64)
        first = len(ids) - len(turn.ids)
        for start, stop in turn.spans:
            labels[first + start : first + stop] = ids[first + start : first + stop]
        return [
            Sample(
                input_ids=ids,
                stream=self.name,
                blocks=consecutive_blocks([len(part.ids) for part in read], self.config.attention),
                labels=labels,
                group=group,
                truncated=turn.truncated or any(part.truncated for part in read),
            )
        ]
