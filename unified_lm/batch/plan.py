"""The attention plan of a pack: who sees whom, said once, honored by every kernel.

Legend: `batch/__init__.py`. Offsets are in pack coordinates, spans in sample coordinates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from itertools import accumulate, groupby
from typing import Any

import torch


class AttentionMode(Enum):
    """What one sequence's mask looks like.

    Attributes:
        CAUSAL: every token sees what precedes it.
        BIDIRECTIONAL: every token sees all.
        KEEP_FIRST: the first token sees itself alone, as in causal attention, and every other one sees all.
        SPAN: causal, but for a stretch whose tokens see one another.
        BLOCKS: stretches that see nothing outside themselves (`Block`).
    """

    CAUSAL = "causal"
    BIDIRECTIONAL = "bidirectional"
    KEEP_FIRST = "keep_first"
    SPAN = "span"
    BLOCKS = "blocks"


@dataclass(frozen=True)
class Block:
    """A stretch of a sequence that sees nothing outside itself, as a document that is computed alone and read from a cache.

    Tokens outside all blocks are causal and see everything before them, blocks included.

    Attributes:
        start, stop: its tokens `[start, stop)`, in sample coordinates.
        bidirectional: whether its tokens see the whole block; else they are causal inside it.
        keep_first: whether of a bidirectional block the first token sees itself alone.
    """

    start: int
    stop: int
    bidirectional: bool = False
    keep_first: bool = False

    @property
    def span(self) -> tuple[int, int]:
        """The stretch whose tokens see one another, in sample coordinates; empty for a causal block."""
        return (self.start + self.keep_first, self.stop) if self.bidirectional else (0, 0)


def attention_span(attention: str, length: int) -> tuple[int, int]:
    """The bidirectional span of a sample that is read in one way throughout (`Sample.bidirectional`).

    Args:
        attention: "causal", "bidirectional" or "bidirectional_keep_first".
        length: its tokens.
    """
    starts = {"causal": length, "bidirectional": 0, "bidirectional_keep_first": 1}
    start = starts[attention]
    return (start, length) if start < length else (0, 0)


def seeing_attention(attention: str) -> str:
    """The attention with which a model of this one sees what follows: itself, or "bidirectional" for "causal"."""
    return "bidirectional" if attention == "causal" else attention


def consecutive_blocks(lengths: Sequence[int], attention: str) -> tuple[Block, ...]:
    """Blocks of the given lengths, one after the other from the first token on, each read as `attention_span` says."""
    stops = list(accumulate(lengths))
    whole, keep_first = attention != "causal", attention == "bidirectional_keep_first"
    return tuple(Block(stop - length, stop, whole, keep_first) for length, stop in zip(lengths, stops, strict=True))


@dataclass(frozen=True)
class ModeRun:
    """Neighboring sequences of one mode: what a varlen kernel can take in one call.

    Attributes:
        mode: the mode they share.
        first, last: sequences `[first, last)` of the pack.
        start, stop: tokens `[start, stop)` of the pack.
        cu_seqlens: int32 `[last - first + 1]`, offsets relative to `start`, on the plan's device.
        max_seqlen: the longest of them, in tokens.
    """

    mode: AttentionMode
    first: int
    last: int
    start: int
    stop: int
    cu_seqlens: torch.Tensor
    max_seqlen: int


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """Per-sequence attention of one pack.

    Attributes:
        lengths: tokens of each sequence, `S` host integers.
        spans: per sequence the bidirectional span `[start, stop)` in sample coordinates (see `Sample.bidirectional`).
        blocks: per sequence its blocks, in order; a sequence with blocks has an empty span.
        cu_seqlens: int32 `[S + 1]`, where each sequence starts in the pack, and the total.
        max_seqlen: the longest sequence, in tokens.
        runs: maximal stretches of sequences of equal mode, in pack order.
        kernel_cache: what a kernel derives from the plan once per pack (block masks, gather indices), by its own key.
    """

    lengths: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    blocks: tuple[tuple[Block, ...], ...]
    cu_seqlens: torch.Tensor
    max_seqlen: int
    runs: tuple[ModeRun, ...]
    kernel_cache: dict[Any, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def build(
        cls,
        lengths: Sequence[int],
        spans: Sequence[tuple[int, int]],
        device: torch.device | str = "cpu",
        blocks: Sequence[tuple[Block, ...]] | None = None,
    ) -> AttentionPlan:
        """Make a plan from sequence lengths, bidirectional spans and blocks (all per sequence, in pack order)."""
        blocks = [()] * len(lengths) if blocks is None else blocks
        assert len(lengths) == len(spans) == len(blocks) > 0
        offsets = [0]
        for length in lengths:
            offsets.append(offsets[-1] + length)
        modes = [mode_of(*sequence) for sequence in zip(lengths, spans, blocks, strict=True)]
        runs = []
        for mode, members in groupby(range(len(lengths)), key=modes.__getitem__):
            indices = list(members)
            first, last = indices[0], indices[-1] + 1
            relative = [offset - offsets[first] for offset in offsets[first : last + 1]]
            cu_seqlens = torch.tensor(relative, dtype=torch.int32, device=device)
            runs.append(ModeRun(mode, first, last, offsets[first], offsets[last], cu_seqlens, max(lengths[first:last])))
        return cls(
            lengths=tuple(lengths),
            spans=tuple(spans),
            blocks=tuple(blocks),
            cu_seqlens=torch.tensor(offsets, dtype=torch.int32, device=device),
            max_seqlen=max(lengths),
            runs=tuple(runs),
        )

    @property
    def offsets(self) -> tuple[int, ...]:
        """Host copy of `cu_seqlens`: `S + 1` integers."""
        offsets = [0]
        for length in self.lengths:
            offsets.append(offsets[-1] + length)
        return tuple(offsets)

    @property
    def num_tokens(self) -> int:
        """Tokens in the pack."""
        return sum(self.lengths)

    def mode(self, index: int) -> AttentionMode:
        """The mode of sequence `index`."""
        return mode_of(self.lengths[index], self.spans[index], self.blocks[index])

    def mask(self, index: int, sliding_window: int | None = None) -> torch.Tensor:
        """The mask of sequence `index` alone, bool `[length, length]`; see `sequence_mask`."""
        return sequence_mask(self.lengths[index], self.spans[index], sliding_window, self.blocks[index])

    def to(self, device: torch.device) -> AttentionPlan:
        """The same plan with its tensors on `device` and an empty kernel cache."""
        runs = tuple(replace(run, cu_seqlens=run.cu_seqlens.to(device, non_blocking=True)) for run in self.runs)
        return replace(self, cu_seqlens=self.cu_seqlens.to(device, non_blocking=True), runs=runs, kernel_cache={})

    def dense_mask(self, sliding_window: int | None = None) -> torch.Tensor:
        """The mask as a matrix: the reference that every kernel is tested against, and what `inspect` draws.

        Args:
            sliding_window: limit of the distance, see `visible`. None: no limit.

        Returns:
            bool `[T, T]`, True where the row's token sees the column's token.
        """
        total, offsets = self.num_tokens, self.offsets
        mask = torch.zeros(total, total, dtype=torch.bool)
        for index in range(len(self.lengths)):
            begin, end = offsets[index], offsets[index + 1]
            mask[begin:end, begin:end] = self.mask(index, sliding_window)
        return mask


def mode_of(length: int, span: tuple[int, int], blocks: Sequence[Block] = ()) -> AttentionMode:
    """The mode of a sequence of `length` tokens with the given bidirectional span and blocks.

    A span of one token changes nothing: it is causal.
    """
    if blocks:
        return AttentionMode.BLOCKS
    start, stop = span
    if stop - start <= 1:
        return AttentionMode.CAUSAL
    if stop == length and start <= 1:
        return AttentionMode.KEEP_FIRST if start else AttentionMode.BIDIRECTIONAL
    return AttentionMode.SPAN


def visible(
    query: torch.Tensor,
    key: torch.Tensor,
    start: torch.Tensor | int,
    stop: torch.Tensor | int,
    sliding_window: int | None = None,
    first: torch.Tensor | int = 0,
) -> torch.Tensor:
    """The one definition of who sees whom inside a sequence. Every mask of every kernel is made from it.

    A window means what it means in transformers' mask builders (`masking_utils`, 5.23), and there the two directions differ by
    one: a causal token sees `sliding_window` tokens, itself included, but in bidirectional attention a token sees
    `sliding_window` tokens on either side, itself not counted. So an export read by stock tools gives the same vectors.

    Args:
        query: integer positions of the rows' tokens in their sequence; broadcasts against `key`.
        key: integer positions of the columns' tokens.
        start: first token of the bidirectional span of the query's sequence or block; broadcasts.
        stop: one past its last token.
        sliding_window: the window in tokens; None: no limit.
        first: the first token that the query may see: where its block starts, 0 outside all blocks.

    Returns:
        bool, of the broadcast shape, True where the query sees the key.
    """
    causal = key <= query
    inside = (query >= start) & (query < stop) & (key >= start) & (key < stop)
    if sliding_window is not None:
        distance = query - key
        causal = causal & (distance < sliding_window)
        inside = inside & (distance.abs() <= sliding_window)
    return (causal | inside) & (key >= first)


def sight(length: int, span: tuple[int, int], blocks: Sequence[Block] = ()) -> torch.Tensor:
    """What `visible` asks about every token of a sequence: int64 `[3, length]`, its `start`, `stop` and `first`."""
    found = torch.tensor([*span, 0])[:, None].repeat(1, length)
    for block in blocks:
        found[:, block.start : block.stop] = torch.tensor([*block.span, block.start])[:, None]
    return found


def sequence_mask(
    length: int, span: tuple[int, int], sliding_window: int | None = None, blocks: Sequence[Block] = ()
) -> torch.Tensor:
    """The mask of one sequence alone.

    Args:
        length: tokens of the sequence.
        span: its bidirectional span `[start, stop)`.
        sliding_window: limit of the distance, see `visible`.
        blocks: its blocks.

    Returns:
        bool `[length, length]`, True where the row's token sees the column's token.
    """
    position = torch.arange(length)
    start, stop, first = sight(length, span, blocks)[:, :, None]
    return visible(position[:, None], position[None, :], start, stop, sliding_window, first)


def free_stretches(length: int, blocks: Sequence[Block]) -> list[tuple[int, int]]:
    """The stretches `[start, stop)` of a sequence outside its blocks, none of them empty."""
    borders = [0, *(border for block in blocks for border in (block.start, block.stop)), length]
    return [(start, stop) for start, stop in zip(borders[::2], borders[1::2], strict=True) if start < stop]
