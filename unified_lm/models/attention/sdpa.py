"""Attention without extra packages, on any device: dense groups for short sequences, torch's fused function for long ones.

Legend: `attention/__init__.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from unified_lm.batch import AttentionMode, AttentionPlan
from unified_lm.batch.plan import free_stretches, sight
from unified_lm.models.attention.grouped import Layout, build_layout, grouped_attention
from unified_lm.models.attention.heads import Heads, own_values
from unified_lm.models.attention.reference import ReferenceKernel

LONGEST_GROUPED = {torch.bfloat16: 512, torch.float16: 512}
"""By dtype: sequences up to this many tokens are computed in dense groups. See `benchmarks/attention.py`."""

LONGEST_GROUPED_OTHERWISE = 256
"""The limit for every other dtype (float32)."""


class SdpaKernel:
    """The default on CPU. Score caps and sinks go through `ReferenceKernel`, sequence by sequence.

    Args:
        longest_grouped: longest sequence to compute in dense groups, in tokens, instead of the measured limit; 0: none.
    """

    name = "sdpa"

    def __init__(self, longest_grouped: int | None = None) -> None:
        self._longest_grouped = longest_grouped
        self._reference = ReferenceKernel()

    def __call__(self, heads: Heads) -> torch.Tensor:
        """Return `[T, H, e]`; see `AttentionKernel`."""
        if heads.softcap is not None or heads.sinks_H is not None:
            return self._reference(heads)
        split = self._split(heads.plan, heads.q_THd)
        if not split.long:
            return self._grouped(heads, split, heads.q_THd, heads.k_TKd, heads.v_TKe)
        outputs = []
        if split.short:
            # Short and long sequences may alternate in a pack; one gather makes the short ones contiguous.
            q, k, v = (x.index_select(0, split.short_tokens) for x in (heads.q_THd, heads.k_TKd, heads.v_TKe))
            outputs.append(self._grouped(heads, split, q, k, v))
        outputs += [_fused(heads, index) for index in split.long]
        return torch.cat(outputs).index_select(0, split.order)

    def _split(self, plan: AttentionPlan, like: torch.Tensor) -> _Split:
        limit = self._longest_grouped
        if limit is None:
            limit = LONGEST_GROUPED.get(like.dtype, LONGEST_GROUPED_OTHERWISE)
        key = ("sdpa split", limit, like.device)
        if key not in plan.kernel_cache:
            plan.kernel_cache[key] = _Split.build(plan, limit, like.device)
        return plan.kernel_cache[key]

    @staticmethod
    def _grouped(heads: Heads, split: _Split, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        plan, num_heads, window = heads.plan, (q.shape[1], k.shape[1]), heads.sliding_window
        # Layers with and without a window need different masks, so both stay in the pack's cache.
        key = ("grouped layout", split.short, num_heads, window, q.dtype, q.device)
        layout: Layout | None = plan.kernel_cache.get(key)
        if layout is None:
            lengths = [plan.lengths[i] for i in split.short]
            sights = [sight(plan.lengths[i], plan.spans[i], plan.blocks[i]) for i in split.short]
            layout = plan.kernel_cache[key] = build_layout(lengths, sights, num_heads, window, q)
        return grouped_attention(q, k, v, layout, heads.scaling, heads.dropout)


@dataclass(frozen=True, eq=False)
class _Split:
    """Short and long sequences of a plan.

    Attributes:
        short: indices of the sequences computed in groups.
        long: indices of the others.
        short_tokens: int64, the tokens of the short sequences, in pack order.
        order: int64 `[T]`, for each token its index when all short sequences come before all long ones.
    """

    short: tuple[int, ...]
    long: tuple[int, ...]
    short_tokens: torch.Tensor
    order: torch.Tensor

    @classmethod
    def build(cls, plan: AttentionPlan, limit: int, device: torch.device) -> _Split:
        """Split a plan: sequences of up to `limit` tokens are short."""
        short = tuple(i for i, length in enumerate(plan.lengths) if length <= limit)
        long = tuple(i for i, length in enumerate(plan.lengths) if length > limit)
        offsets = plan.offsets
        tokens = [torch.arange(offsets[i], offsets[i + 1]) for i in (*short, *long)]
        short_tokens = torch.cat(tokens[: len(short)]) if short else torch.empty(0, dtype=torch.int64)
        return cls(short, long, short_tokens.to(device), torch.argsort(torch.cat(tokens)).to(device))


def _fused(heads: Heads, index: int) -> torch.Tensor:
    """Attention of one long sequence by torch's fused function; returns `[L, H, e]`."""
    plan, window = heads.plan, heads.sliding_window
    length, blocks = plan.lengths[index], plan.blocks[index]
    # Without a mask torch can use its flash kernel, so a window that never cuts anything is dropped.
    window = None if window is not None and window >= length else window
    mode, mask = plan.mode(index), None
    if mode in (AttentionMode.SPAN, AttentionMode.BLOCKS) or window is not None:
        key = ("sequence mask", index, window, heads.q_THd.device)
        if key not in plan.kernel_cache:
            plan.kernel_cache[key] = plan.mask(index, window).to(heads.q_THd.device)
        mask = plan.kernel_cache[key]
    if mode is not AttentionMode.BLOCKS:
        output = _attend(heads, index, (0, 0, length), mask, causal=mode is AttentionMode.CAUSAL)
        return _first_alone(heads, index, 0, output) if mode is AttentionMode.KEEP_FIRST and mask is None else output
    # A block is a sequence of its own, without a mask; what lies outside all blocks sees every key before its end.
    own = None if window is None else mask
    outputs = {}
    for block in blocks:
        whole = _attend(heads, index, (block.start, block.start, block.stop), own, causal=not block.bidirectional)
        alone = block.bidirectional and block.keep_first and own is None
        outputs[block.start] = _first_alone(heads, index, block.start, whole) if alone else whole
    for start, stop in free_stretches(length, blocks):
        outputs[start] = _attend(heads, index, (0, start, stop), mask, causal=False)
    return torch.cat([outputs[start] for start in sorted(outputs)])


def _attend(heads: Heads, index: int, part: tuple[int, int, int], mask: torch.Tensor | None, *, causal: bool) -> torch.Tensor:
    """Attention within a part of a sequence.

    Args:
        heads: of the pack.
        index: of the sequence.
        part: its first key, its first query, and where both stop, in sample coordinates.
        mask: bool `[L, L]` of the whole sequence, or None.
        causal: whether to be causal where there is no mask; keys and queries then begin at the same token.

    Returns:
        `[queries, H, e]`.
    """
    key, query, stop = part
    begin = heads.plan.offsets[index]
    q = heads.q_THd[begin + query : begin + stop].transpose(0, 1)[None]
    k, v = (x[begin + key : begin + stop].transpose(0, 1)[None] for x in (heads.k_TKd, heads.v_TKe))
    output = functional.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=None if mask is None else mask[query:stop, key:stop],
        dropout_p=heads.dropout,
        is_causal=causal and mask is None,  # torch accepts either this or a mask
        scale=heads.scaling,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return output[0].transpose(0, 1)


def _first_alone(heads: Heads, index: int, first: int, output: torch.Tensor) -> torch.Tensor:
    """The output `[L, H, e]` of a stretch whose first token sees itself alone: there it is that token's value."""
    at = heads.plan.offsets[index] + first
    return torch.cat([own_values(heads, heads.v_TKe[at : at + 1]), output[1:]])
