"""Formats whose samples come in groups that are embedded and contrasted: pairs, and two views of a text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np

from unified_lm.batch.sample import MISSING, Sample
from unified_lm.config.streams import StreamConfig
from unified_lm.core.errors import DataError
from unified_lm.data.formats.base import Format, hash_text
from unified_lm.data.formats.embedded_config import PairsStream, ViewsStream
from unified_lm.data.prompts.encoding import Encoded, Rejection
from unified_lm.data.rows.records import PairRecord
from unified_lm.data.token_cache import Item, Role, Row, TokenTable, chunks


class Pairs(Format):
    """Query in slot 0, one of its positives in slot 1, hard negatives from slot 2 on."""

    Config: ClassVar[type[StreamConfig]] = PairsStream
    config: PairsStream

    def limits(self) -> dict[str, Any]:
        """See `Format.limits`."""
        limits = {"query": self.config.max_query_tokens, "document": self.config.max_document_tokens}
        return limits | ({"negatives": self._fewest_negatives} if self._fewest_negatives else {})

    @property
    def _fewest_negatives(self) -> int:
        """A row with fewer hard negatives than this is left out."""
        return self.config.num_hard_negatives if self.config.on_few_negatives == "skip" else 0

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
                found = Counter(item.role for item in row.items)
                if {Role.QUERY, Role.POSITIVE} <= found.keys() and found[Role.NEGATIVE] < self._fewest_negatives:
                    rejected[f"fewer than {self._fewest_negatives} hard negatives"] += 1
                elif {Role.QUERY, Role.POSITIVE} <= found.keys():
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
        if not wanted or not len(table) or self.config.on_few_negatives == "pad":
            return
        found = np.add.reduceat((table.roles == Role.NEGATIVE).astype(np.int64), table.row_starts[:-1])
        short = np.flatnonzero(found < wanted)
        if len(short):
            record = int(table.records[short[0]])
            raise DataError(
                f"{source_name}, row {record + 1}: {int(found[short[0]])} hard negatives, but "
                f"streams.{self.name}.num_hard_negatives asks for {wanted} ({len(short)} of {len(table)} rows have fewer). "
                f"Mine more negatives, lower the setting, leave such rows out (streams.{self.name}.on_few_negatives=skip), or "
                "train on those that they have (=pad)."
            )

    def check_together(self, tables: Sequence[TokenTable], source_names: Sequence[str]) -> None:
        """Raise DataError when hard negatives are asked for and no row of any source has one."""
        if self.config.num_hard_negatives and not any((table.roles == Role.NEGATIVE).any() for table in tables):
            raise DataError(
                f"streams.{self.name}.num_hard_negatives is {self.config.num_hard_negatives}, and no row has a hard negative "
                f"({', '.join(source_names)}). Mine some (`unified-lm data mine`), or set it to 0."
            )

    def samples(self, table: TokenTable, row: int, group: int, rng: np.random.Generator) -> list[Sample]:
        """See `Format.samples`."""
        positives, negatives = table.items(row, Role.POSITIVE), table.items(row, Role.NEGATIVE)
        chosen = [table.items(row, Role.QUERY)[0], positives[rng.integers(len(positives))]]
        wanted = self.config.num_hard_negatives
        if wanted:
            chosen += list(rng.choice(negatives, size=min(wanted, len(negatives)), replace=False))
        samples = [
            self._pooled_sample(table.encoded(item), group, slot, int(table.text_ids[item])) for slot, item in enumerate(chosen)
        ]
        # One token for each negative that a row lacks: groups of one size, whatever the rows have.
        empty = Encoded(table.encoded(int(chosen[0])).ids[:1], ((0, 1),))
        return samples + [self._pooled_sample(empty, group, slot, MISSING) for slot in range(len(samples), 2 + wanted)]


class Views(Format):
    """The same text twice, slots 0 and 1: only dropout tells the two apart (SimCSE)."""

    Config: ClassVar[type[StreamConfig]] = ViewsStream
    config: ViewsStream

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
