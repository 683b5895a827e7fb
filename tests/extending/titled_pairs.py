"""Formats from outside the package: one file."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from unified_lm.batch import Sample
from unified_lm.config.streams import StreamConfig
from unified_lm.data.formats.answered import Chat
from unified_lm.data.formats.embedded import Pairs
from unified_lm.data.formats.embedded_config import PairsStream
from unified_lm.data.token_cache import TokenTable


@dataclass(frozen=True, kw_only=True)
class SwappedPairsStream(PairsStream):
    """Settings of `SwappedPairs`."""

    swap_probability: float = 0.5
    """How often query and positive change places."""


class SwappedPairs(Pairs):
    """Pairs whose query and positive sometimes change places."""

    Config: ClassVar[type[StreamConfig]] = SwappedPairsStream
    config: SwappedPairsStream

    def samples(self, table: TokenTable, row: int, group: int, rng: np.random.Generator) -> list[Sample]:
        """See `Format.samples`."""
        query, positive, *negatives = super().samples(table, row, group, rng)
        if rng.random() < self.config.swap_probability:
            query, positive = replace(positive, slot=0), replace(query, slot=1)
        return [query, positive, *negatives]


class MyChat(Chat):
    """A chat that changes nothing: it must export like one."""


class MyPairs(Pairs):
    """Pairs that change nothing: they must export like them."""


class Unpooled(Pairs):
    """Says that it is embedded, and pools nothing."""

    def samples(self, table: TokenTable, row: int, group: int, rng: np.random.Generator) -> list[Sample]:
        """Samples without a pool span."""
        return [replace(sample, pool=None) for sample in super().samples(table, row, group, rng)]


@dataclass(frozen=True, kw_only=True)
class LimitlessStream(PairsStream):
    """Has no limit in tokens."""

    limit_keys: ClassVar[tuple[str, ...]] = ()


class Limitless(Pairs):
    """Pairs of any length."""

    Config: ClassVar[type[StreamConfig]] = LimitlessStream
