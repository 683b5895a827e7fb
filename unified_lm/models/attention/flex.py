"""Torch's flex attention: any mask of a plan as one block mask, built once per pack and shared by all layers.

Compiled on CUDA. torch has no CPU backward for it, so on CPU it is only used to test the masks.
Legend: `attention/__init__.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

from unified_lm.batch import AttentionPlan
from unified_lm.batch.plan import sight, visible
from unified_lm.core.errors import ModelError
from unified_lm.models.attention.heads import Heads

_OPTIONS: Any = {"FORCE_USE_FLEX_ATTENTION": True}
"""Avoids the decoding kernel, which torch chooses below 128 queries and which has no configuration for some head sizes."""


class FlexKernel:
    """Supports every mask, window, score cap and sink, but no dropout of attention weights."""

    name = "flex"

    def __init__(self) -> None:
        self._compiled: Callable[..., Any] | None = None

    def __call__(self, heads: Heads) -> torch.Tensor:
        """Return `[T, H, e]`; see `AttentionKernel`.

        Raises:
            ModelError: attention dropout, or a gradient on CPU.
        """
        if heads.dropout:
            raise ModelError(
                f"the flex kernel has no attention dropout (got {heads.dropout}). "
                "Set model.attention_dropout=0 or model.attention_kernel=flash."
            )
        q, k, v = (x.transpose(0, 1)[None] for x in (heads.q_THd, heads.k_TKd, heads.v_TKe))
        if q.device.type == "cpu":
            if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
                raise ModelError("the flex kernel has no backward on CPU. Set model.attention_kernel=sdpa, or auto.")
            q, k, v = (x.detach() for x in (q, k, v))  # torch refuses inputs that require gradients even under no_grad
        output, lse = self._function(q.device)(
            q,
            k,
            v,
            score_mod=None if heads.softcap is None else _capped(heads, q.device),
            block_mask=_block_mask(heads.plan, heads.sliding_window, q.device),
            scale=heads.scaling,
            enable_gqa=q.shape[1] != k.shape[1],
            return_aux=AuxRequest(lse=heads.sinks_H is not None),
            kernel_options=_OPTIONS,
        )
        output_THe = output[0].transpose(0, 1)
        if heads.sinks_H is None:
            return output_THe
        # Flex normalizes by exp(lse). With a sink the denominator is exp(lse) + exp(sink), so the output shrinks by their
        # ratio: exp(lse) / (exp(lse) + exp(sink)) = sigmoid(lse - sink), which does not overflow.
        correction_TH = torch.sigmoid(lse.lse[0].transpose(0, 1) - heads.sinks_H.float())
        return (output_THe * correction_TH[..., None]).to(heads.v_TKe.dtype)

    def _function(self, device: torch.device) -> Callable[..., Any]:
        if device.type == "cpu":
            return flex_attention
        if self._compiled is None:
            # dynamic: every pack has another number of tokens, and each new shape would be compiled again
            self._compiled = torch.compile(flex_attention, dynamic=True)
        return self._compiled


def _capped(heads: Heads, device: torch.device) -> Callable[..., torch.Tensor]:
    """A flex `score_mod` that bounds scores by the layer's cap."""
    key = ("flex softcap", heads.softcap, device)
    if key not in heads.plan.kernel_cache:  # a tensor: with dynamic shapes a captured float has no backward
        heads.plan.kernel_cache[key] = torch.tensor(heads.softcap, dtype=torch.float32, device=device)
    softcap = heads.plan.kernel_cache[key]

    def score_mod(score: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        """Cap one score."""
        return softcap * torch.tanh(score / softcap)

    return score_mod


def _block_mask(plan: AttentionPlan, sliding_window: int | None, device: torch.device) -> BlockMask:
    """The mask of a pack for layers with this window; cached in the plan, because layers of a kind share it."""
    key = ("flex", sliding_window, device)
    if key not in plan.kernel_cache:
        # On the host, which knows the lengths; on the device, their sum would have to be waited for.
        sequence = torch.repeat_interleave(torch.arange(len(plan.lengths)), torch.tensor(plan.lengths))
        sequence = sequence.to(device, non_blocking=True)
        position = torch.cat([torch.arange(length) for length in plan.lengths]).to(device, non_blocking=True)
        sequences = zip(plan.lengths, plan.spans, plan.blocks, strict=True)
        start, stop, first = torch.cat([sight(*own) for own in sequences], dim=1).to(device, non_blocking=True)

        def mask_mod(_b: torch.Tensor, _h: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            """Whether a query sees a key, both as token indices of the pack."""
            seen = visible(position[query], position[key], start[query], stop[query], sliding_window, first[query])
            # `visible` only knows positions within a sequence, so tokens of other sequences are excluded here.
            return (sequence[query] == sequence[key]) & seen

        total = plan.num_tokens
        plan.kernel_cache[key] = create_block_mask(mask_mod, B=None, H=None, Q_LEN=total, KV_LEN=total, device=str(device))
    return plan.kernel_cache[key]
