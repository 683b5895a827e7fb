"""The definition of attention: one sequence at a time, softmax in float32, unoptimized. Other kernels are tested against it.

The `sdpa` kernel also uses it for score caps and sinks, which torch's fused function does not support.
Legend: `attention/__init__.py`.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from unified_lm.models.attention.heads import Heads


class ReferenceKernel:
    """Unfused attention, sequence by sequence, on any device, with every feature of `Heads`."""

    name = "reference"

    def __call__(self, heads: Heads) -> torch.Tensor:
        """Return `[T, H, e]`; see `AttentionKernel`."""
        plan, outputs = heads.plan, []
        for index, (begin, length) in enumerate(zip(plan.offsets, plan.lengths, strict=False)):
            mask = plan.mask(index, heads.sliding_window).to(heads.q_THd.device)
            part = slice(begin, begin + length)
            outputs.append(_attend(heads, heads.q_THd[part], heads.k_TKd[part], heads.v_TKe[part], mask))
        return torch.cat(outputs)


def _attend(heads: Heads, q_LHd: torch.Tensor, k_LKd: torch.Tensor, v_LKe: torch.Tensor, mask_LL: torch.Tensor) -> torch.Tensor:
    """Attention within one sequence; returns `[L, H, e]`."""
    # Grouped queries: key head k serves the neighboring query heads k * repeats to (k + 1) * repeats - 1.
    repeats = q_LHd.shape[1] // k_LKd.shape[1]
    k_LHd, v_LHe = k_LKd.repeat_interleave(repeats, dim=1), v_LKe.repeat_interleave(repeats, dim=1)
    scores_HLL = torch.einsum("qhd,khd->hqk", q_LHd, k_LHd).float() * heads.scaling
    if heads.softcap is not None:
        scores_HLL = heads.softcap * torch.tanh(scores_HLL / heads.softcap)
    scores_HLL = scores_HLL.masked_fill(~mask_LL, -torch.inf)
    if heads.sinks_H is not None:
        # A sink is one more logit per query, without a value: it only takes probability away from the others.
        sinks_HL1 = heads.sinks_H.float()[:, None, None].expand(-1, scores_HLL.shape[1], 1)
        scores_HLL = torch.cat([scores_HLL, sinks_HL1], dim=-1)
    weights_HLL = torch.softmax(scores_HLL, dim=-1)[..., : k_LHd.shape[0]].to(v_LHe.dtype)
    weights_HLL = functional.dropout(weights_HLL, heads.dropout, training=heads.dropout > 0)
    return torch.einsum("hqk,khe->qhe", weights_HLL, v_LHe)
