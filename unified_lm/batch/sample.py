"""A sample: the unit that has its own attention mask."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from unified_lm.batch.plan import Block

IGNORE = -100
"""The label of a position that is not supervised."""

MISSING = -1
"""The text id of a place of a group that no text fills: it holds a token that is embedded and compared with nothing."""


@dataclass(frozen=True, kw_only=True)
class SequenceLabel:
    """What an objective over whole sequences knows about a sample beside its labels.

    Attributes:
        desirable: whether the labeled tokens are to become more likely, or less. None for a control: a sample that is only
            scored, without a gradient, for what its objective compares the others with.
        reference: log-probability of the labeled tokens under the reference model, in nats, where it is known beforehand.
    """

    desirable: bool | None = None
    reference: float | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """Token ids with everything that a forward and an objective need to know about them.

    Attributes:
        input_ids: int64 `[T]`, what the model reads.
        bidirectional: `[start, stop)`, the span inside which every token sees every other. Empty: causal throughout.
            The whole sample: an encoder. Partial: tokens of the span see the whole span and all that precedes it, all
            other tokens are causal.
        blocks: stretches that see nothing outside themselves, in order and apart from one another. Tokens outside them are
            causal and see all that precedes. Empty: none. A sample has a bidirectional span, or blocks, or neither.
        pool: `[start, stop)`, the tokens whose states are pooled into an embedding; None where none is wanted.
        labels: int64 `[T]`, the token expected *at* each position (predicted from the state one position earlier), or
            `IGNORE`. A label at position 0 has no predecessor and is never allowed. None where nothing is supervised.
        token_weights: float32 `[T]`, the weight of each label in its objective's sum; None means 1 everywhere.
        stream: name of the stream that the sample belongs to.
        group: index of its group within this step's batch of the stream, over all ranks.
        slot: place inside the group: 0 query, 1 positive, 2 and up hard negatives. 0 for samples that stand alone.
        text_id: a 63-bit hash of the embedded text, for masking equal texts among the negatives; 0 where unused, `MISSING`
            where there is no text.
        truncated: whether the text was cut to its limit.
        sequence: what an objective over whole sequences knows about it; None elsewhere.
    """

    input_ids: np.ndarray
    stream: str
    bidirectional: tuple[int, int] = (0, 0)
    blocks: tuple[Block, ...] = ()
    pool: tuple[int, int] | None = None
    labels: np.ndarray | None = None
    token_weights: np.ndarray | None = None
    group: int = 0
    slot: int = 0
    text_id: int = 0
    truncated: bool = False
    sequence: SequenceLabel | None = None

    def __post_init__(self) -> None:
        length = len(self.input_ids)
        assert length > 0, "a sample has at least one token"
        start, stop = self.bidirectional
        assert 0 <= start <= stop <= length, f"bidirectional span {self.bidirectional} outside [0, {length})"
        borders = [0, *(border for block in self.blocks for border in (block.start, block.stop)), length]
        assert borders == sorted(borders), f"blocks {self.blocks} overlap, are out of order or outside [0, {length})"
        assert all(block.start < block.stop for block in self.blocks), f"blocks {self.blocks} are empty"
        assert not (self.blocks and stop > start), "a sample has a bidirectional span or blocks, not both"
        if self.pool is not None:
            assert 0 <= self.pool[0] < self.pool[1] <= length, f"pool span {self.pool} is empty or outside [0, {length})"
        if self.labels is not None:
            assert len(self.labels) == length, f"{len(self.labels)} labels for {length} tokens"
            assert self.labels[0] == IGNORE, "position 0 has no predecessor and is never supervised"

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def is_control(self) -> bool:
        """Whether it is only scored, never trained on (`SequenceLabel.desirable`)."""
        return self.sequence is not None and self.sequence.desirable is None

    @property
    def num_supervised(self) -> int:
        """The number of positions with a label."""
        return 0 if self.labels is None else int((self.labels != IGNORE).sum())
