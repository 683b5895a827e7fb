"""Attention without extra packages, on any device: dense groups for short sequences, torch's fused function for long ones.

Legend: `attention/__init__.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from unified_lm.batch import AttentionMode, AttentionPlan
from unified_lm.batch.plan import sequence_mask
from unified_lm.models.attention.grouped import Layout, build_layout, grouped_attention
from unified_lm.models.attention.heads import Heads
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
        key = ("grouped layout", split.short, num_heads, window, q.dtype, q.device)
        layout: Layout | None = plan.kernel_cache.get(key)
        if layout is None:
            lengths, spans = [plan.lengths[i] for i in split.short], [plan.spans[i] for i in split.short]
            layout = plan.kernel_cache[key] = build_layout(lengths, spans, num_heads, window, q)
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
    begin, length = plan.offsets[index], plan.lengths[index]
    # Without a mask torch can use its flash kernel, so a window that never cuts anything is dropped.
    window = None if window is not None and window >= length else window
    mode, mask = plan.mode(index), None
    if mode is AttentionMode.SPAN or window is not None:
        key = ("sequence mask", index, window, heads.q_THd.device)
        if key not in plan.kernel_cache:
            plan.kernel_cache[key] = sequence_mask(length, plan.spans[index], window).to(heads.q_THd.device)
        mask = plan.kernel_cache[key]
    q, k, v = (x[begin : begin + length].transpose(0, 1)[None] for x in (heads.q_THd, heads.k_TKd, heads.v_TKe))
    output = functional.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=heads.dropout,
        is_causal=mode is AttentionMode.CAUSAL and mask is None,
        scale=heads.scaling,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return output[0].transpose(0, 1)
