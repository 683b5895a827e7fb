"""Records in a list, with the face of a `RecordSource`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from hashlib import blake2b

from unified_lm.config.schema import StreamConfig
from unified_lm.data.formats import FORMATS
from unified_lm.data.rows.records import ChatRecord, PairRecord, Record, Text, TextRecord
from unified_lm.objectives import ContrastiveConfig, NextTokenConfig

CONTRASTIVE = ContrastiveConfig()
NEXT_TOKEN = NextTokenConfig()


class FakeSource:
    """A source of the records it is given."""

    def __init__(self, records: Sequence[Record], name: str = "fake.jsonl") -> None:
        self.records = list(records)
        self.name = name
        self.kind = None
        self.fingerprint = blake2b(repr((name, self.records)).encode(), digest_size=16).hexdigest()
        self.rejected: Counter[str] = Counter()
        self.ignored: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Record:
        return self.records[index]

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)


def pairs(count: int, negatives: int = 0, prefix: str = "") -> list[Record]:
    """Pairs whose texts tell which row they are of."""
    rows = []
    for i in range(count):
        others = tuple(Text(f"{prefix}negative {i}.{k}") for k in range(negatives))
        rows.append(
            PairRecord(Text(f"{prefix}query {i}", "Find it"), (Text(f"{prefix}document {i} " + "x" * (i % 7)),), others)
        )
    return rows


def chats(count: int) -> list[Record]:
    """Conversations of uneven length."""
    return [ChatRecord((("user", f"question {i}"), ("assistant", f"answer {i} " + "y" * (5 * i % 23)))) for i in range(count)]


def texts(count: int) -> list[Record]:
    """Sentences of uneven length."""
    return [TextRecord(f"sentence {i} " + "word " * (i % 5)) for i in range(count)]


def stream_config(format: str, **settings: object) -> StreamConfig:
    """A stream's settings with the objective that fits its format."""
    objective = settings.pop("objective", CONTRASTIVE if format in ("pairs", "views") else NEXT_TOKEN)
    return FORMATS[format](objective=objective, **settings)  # type: ignore[arg-type]
