"""Attention over packs: one function registered with transformers, several kernels behind it, one definition of the mask.

A pack is S sequences laid end to end. Its `AttentionPlan` says for each sequence whether it is causal, bidirectional, or causal
with a bidirectional span; no sequence ever sees another. The plan reaches every layer as a keyword argument, through
transformers' attention interface, so no modeling file is patched:

    decoder(input_ids, position_ids, plan=plan, attention_kernel=kernel) -> layer -> attention -> `packed_attention` -> kernel

Shape legend, used as suffixes in this package (``q_THd`` is `[T, H, d]`):

- T   tokens of the pack                         S   sequences of the pack
- H   query heads                                K   key/value heads (H is a multiple of K)
- d   size of a query/key head                   e   size of a value head (equal to d except in DeepSeek)
- L   tokens of one sequence, or of a padded row of several
- transformers passes q `[1, H, T, d]`, k `[1, K, T, d]`, v `[1, K, T, e]` and expects `[1, T, H, e]` back

Masks: True means that the row's token (query) sees the column's token (key). `batch.plan.visible` is the only definition.

| kernel    | device | how                                            | refuses                              |
| --------- | ------ | ---------------------------------------------- | ------------------------------------ |
| sdpa      | any    | dense groups (short), torch's fused (long)     | nothing                              |
| flash     | CUDA   | one varlen call per run of equal mode          | sinks; a window with partial spans   |
| flex      | CUDA   | one block mask per pack                        | dropout; gradients on CPU            |
| reference | any    | unfused, one sequence at a time                | nothing                              |
| padded    | any    | no kernel: rows with a 4-D mask (`padded.py`)  | see `families.py`                    |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import AttentionInterface

from unified_lm.batch import AttentionMode, AttentionPlan
from unified_lm.core.errors import ModelError
from unified_lm.models.attention.flash import FlashKernel, installed_varlen, torch_varlen
from unified_lm.models.attention.flex import FlexKernel
from unified_lm.models.attention.heads import AttentionKernel, Heads
from unified_lm.models.attention.reference import ReferenceKernel
from unified_lm.models.attention.sdpa import SdpaKernel

__all__ = ["ATTENTION_NAME", "KERNELS", "AttentionKernel", "AutoKernel", "Heads", "packed_attention", "register"]

ATTENTION_NAME = "unified_lm_packed"
"""Name of the attention function in transformers. It must not contain "sdpa", "flash" or "flex_attention", which transformers
looks for as substrings."""

_registered: list[Any] = []
"""`packed_attention` outside of graphs, once a model was compiled in this process."""

_UNSUPPORTED = ("position_bias", "alibi", "cache", "block_table", "attention_chunk_size", "head_mask", "output_attentions")
"""Arguments that change the result and that no kernel here supports. A family that passes one gets an error, never silence."""


class AutoKernel:
    """Chooses a kernel by device and problem.

    sdpa on CPU and for float32, which flash does not support. Otherwise flash, or flex where flash cannot be used: partial
    spans, sinks, score caps without the package flash-attn, and everything on a torch before 2.11 without it. With dropout of
    attention weights but without flash-attn: sdpa.
    """

    name = "auto"

    def __init__(self) -> None:
        self._kernels: dict[str, AttentionKernel] = {}

    def __call__(self, heads: Heads) -> torch.Tensor:
        """Return `[T, H, e]`; see `AttentionKernel`."""
        name = self.choose(heads)
        if name not in self._kernels:
            self._kernels[name] = KERNELS[name]()
        return self._kernels[name](heads)

    @staticmethod
    def choose(heads: Heads) -> str:
        """Return the name of the kernel that computes this problem."""
        if heads.q_THd.device.type != "cuda" or heads.q_THd.dtype == torch.float32:
            return "sdpa"
        varlen = installed_varlen()
        plain = varlen is None or varlen is torch_varlen  # torch's has neither dropout nor a score cap
        if heads.dropout and plain:
            return "sdpa"
        modes = {run.mode for run in heads.plan.runs}
        windowed = heads.sliding_window is not None and heads.sliding_window < heads.plan.max_seqlen
        first_alone = AttentionMode.KEEP_FIRST in modes or any(b.keep_first for own in heads.plan.blocks for b in own)
        partial_spans = AttentionMode.SPAN in modes or (windowed and first_alone)
        uncapped = heads.softcap is not None and plain
        return "flex" if varlen is None or partial_spans or heads.sinks_H is not None or uncapped else "flash"


KERNELS: Mapping[str, Callable[[], AttentionKernel]] = {
    "auto": AutoKernel,
    "sdpa": SdpaKernel,
    "flash": FlashKernel,
    "flex": FlexKernel,
    "reference": ReferenceKernel,
}
"""Kernels by name. "padded" is missing because it is a different way to run the whole decoder, see `backbone.py`."""


def register(*, outside_graphs: bool = False) -> None:
    """Register `packed_attention` with transformers. Safe to repeat.

    No mask function is registered under the name: transformers' mask builders then return None instead of building a mask that
    nobody reads.

    Args:
        outside_graphs: whether it is left out of compiled blocks, from now on in this process: who sees whom is an object of
            Python, by which kernels choose what they run.
    """
    if outside_graphs and not _registered:
        _registered.append(torch.compiler.disable(packed_attention))
    AttentionInterface.register(ATTENTION_NAME, _registered[0] if _registered else packed_attention)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    plan: AttentionPlan | None = None,
    attention_kernel: AttentionKernel | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attend over a pack; transformers calls this in every layer.

    Arguments that cannot change a planned mask, such as `is_causal` and `position_ids`, are ignored.

    Args:
        module: the layer's attention module.
        query: `[1, H, T, d]`.
        key: `[1, K, T, d]`.
        value: `[1, K, T, e]`.
        attention_mask: must be None; the plan is the mask.
        dropout: probability of dropping an attention weight.
        scaling: factor of the scores; None means `d ** -0.5`.
        plan: who sees whom.
        attention_kernel: computes the result.
        sliding_window: the layer's window in tokens, or None.
        softcap: the layer's score cap, or None.
        s_aux: `[H]`, the layer's sinks, or None.
        others: anything else that the family passes.

    Returns:
        `[1, T, H, e]`, and None in place of the attention weights.

    Raises:
        ModelError: there is no plan, or the layer asks for something that no kernel supports.
    """
    if plan is None or attention_kernel is None:
        raise ModelError(
            f"{type(module).__name__} was called without an attention plan. Run packs through Backbone.forward; "
            "to call the wrapped model itself (generate, logits), use `with backbone.stock_attention():`."
        )
    requested = [name for name in _UNSUPPORTED if others.get(name) is not None and others[name] is not False]
    if attention_mask is not None:
        requested.append("attention_mask")
    if requested:
        raise ModelError(f"{type(module).__name__} passes {', '.join(requested)}, which packed attention does not support.")
    # A plan of another length means a KV cache, or a batch of several rows: both would be masked wrongly.
    if query.shape[0] != 1 or query.shape[2] != plan.num_tokens or key.shape[2] != plan.num_tokens:
        raise ModelError(
            f"the plan is for {plan.num_tokens} tokens, but {type(module).__name__} attends with queries {tuple(query.shape)} "
            f"and keys {tuple(key.shape)}. Packs run without cache and with a batch of one row."
        )
    heads = Heads(
        # Under autocast, or with float32 rotary tables, queries and keys may have a wider dtype than values; kernels need one.
        q_THd=query[0].transpose(0, 1).to(value.dtype),
        k_TKd=key[0].transpose(0, 1).to(value.dtype),
        v_TKe=value[0].transpose(0, 1),
        plan=plan,
        scaling=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        dropout=dropout,
        sliding_window=sliding_window or None,  # some families write 0 for none
        softcap=softcap,
        sinks_H=s_aux,
    )
    return attention_kernel(heads)[None], None
