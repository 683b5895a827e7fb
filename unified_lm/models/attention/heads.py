"""The input of a kernel: one layer's queries, keys and values of a pack, and everything that shapes the softmax.

Legend: `attention/__init__.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from unified_lm.batch import AttentionPlan


@dataclass(frozen=True, eq=False)
class Heads:
    """One layer's attention problem.

    ``out_i = sum_j softmax_j(cap(scaling * q_i . k_j)) v_j`` over the tokens j that the plan lets token i see, where
    ``cap(x) = softcap * tanh(x / softcap)`` if there is a cap, and a sink adds its exponential to the softmax's denominator.

    Attributes:
        q_THd: `[T, H, d]` queries, rotary positions applied.
        k_TKd: `[T, K, d]` keys; `H / K` neighboring query heads share each.
        v_TKe: `[T, K, e]` values.
        plan: who sees whom.
        scaling: factor of the scores.
        dropout: probability of dropping an attention weight; 0 outside training.
        sliding_window: limit of the distance in tokens, see `batch.plan.visible`; None: no limit.
        softcap: Gemma 2's bound of the scores, or None.
        sinks_H: `[H]`, gpt-oss's learned logit for attending to nothing, or None.
    """

    q_THd: torch.Tensor
    k_TKd: torch.Tensor
    v_TKe: torch.Tensor
    plan: AttentionPlan
    scaling: float
    dropout: float = 0.0
    sliding_window: int | None = None
    softcap: float | None = None
    sinks_H: torch.Tensor | None = None


class AttentionKernel(Protocol):
    """Computes one layer's attention. It applies every field of `Heads`, or raises an error that names the field."""

    name: str

    def __call__(self, heads: Heads) -> torch.Tensor:
        """Return `[T, H, e]`, in the dtype of the values.

        Raises:
            ModelError: the kernel does not support the value of a field.
        """
        ...


def own_values(heads: Heads, values: torch.Tensor) -> torch.Tensor:
    """What a token attends to that sees itself alone: its value, `[N, K, e]` to `[N, H, e]`, dropped as its weight would be."""
    alone = values.repeat_interleave(heads.q_THd.shape[1] // values.shape[1], dim=1)
    if not heads.dropout:
        return alone
    kept = torch.rand(alone.shape[:2], device=alone.device, dtype=torch.float32) >= heads.dropout
    return alone * (kept / (1 - heads.dropout)).to(alone.dtype)[..., None]
