"""Flash attention over packed sequences: one varlen call per run of equal mode, on views of the pack.

Flash has no mask argument beyond causal and window. So sequences with partial spans take two calls: first all tokens causally,
then the span's queries again, over every key up to the span's end. The second result replaces the first in the span's rows.
Legend: `attention/__init__.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from inspect import signature
from typing import Any

import torch
from torch.nn import functional

from unified_lm.batch import AttentionMode, AttentionPlan, ModeRun
from unified_lm.batch.plan import free_stretches
from unified_lm.core.errors import ModelError
from unified_lm.models.attention.heads import Heads, own_values

VarlenFunction = Callable[..., torch.Tensor]
"""A function with the signature of `flash_attn.flash_attn_varlen_func` (2.7): q `[T, H, d]`, k and v `[T, K, d]`,
cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, window_size, softcap."""


class FlashKernel:
    """One call per mode and layer.

    Args:
        varlen: the function to call; None takes `flash_attn` if it is installed, else torch's own varlen attention.

    Raises:
        ModelError: neither is available.
    """

    name = "flash"

    def __init__(self, varlen: VarlenFunction | None = None) -> None:
        self._varlen = varlen or find_varlen()

    def __call__(self, heads: Heads) -> torch.Tensor:
        """Return `[T, H, e]`; see `AttentionKernel`.

        Raises:
            ModelError: sinks, or a sliding window together with a partial span or a first token that sees itself alone.
        """
        if heads.sinks_H is not None:
            raise ModelError("the flash kernel cannot add attention sinks (s_aux). Use model.attention_kernel=flex.")
        q, k, v, width = heads.q_THd, heads.k_TKd, heads.v_TKe, heads.v_TKe.shape[-1]
        if width < q.shape[-1]:  # flash needs equal head sizes, and DeepSeek's values are narrower: pad, cut below
            v = functional.pad(v, (0, q.shape[-1] - width))
        outputs = []
        for run in heads.plan.runs:
            part = slice(run.start, run.stop)
            if run.mode is AttentionMode.KEEP_FIRST:
                output = self._keep_first(heads, run, q[part], k[part], v[part])
            elif run.mode is AttentionMode.SPAN:
                output = self._spans(heads, run, q[part], k[part], v[part])
            elif run.mode is AttentionMode.BLOCKS:
                output = self._blocks(heads, run, q[part], k[part], v[part])
            else:
                output = self._call(heads, run.cu_seqlens, run.max_seqlen, run.mode, q[part], k[part], v[part])
            outputs.append(output)
        # Runs cover the pack in order, so their concatenation has the order of its tokens.
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return output[..., :width]

    def _call(
        self, heads: Heads, cu_seqlens: torch.Tensor, longest: int, mode: AttentionMode, *qkv: torch.Tensor
    ) -> torch.Tensor:
        causal = mode is AttentionMode.CAUSAL
        return self._varlen(
            *qkv,
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_k=cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_k=longest,
            window_size=_window(heads.sliding_window, longest, causal),
            causal=causal,
            **_softmax_options(heads),
        )

    def _keep_first(self, heads: Heads, run: ModeRun, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """As bidirectional, but a first token's output is its own value: it sees itself alone."""
        self._refuse_window(heads, run, "a first token that sees itself alone")
        output = self._call(heads, run.cu_seqlens, run.max_seqlen, AttentionMode.BIDIRECTIONAL, q, k, v)
        first = run.cu_seqlens[:-1].long()
        return output.index_copy(0, first, own_values(heads, v.index_select(0, first)))

    def _spans(self, heads: Heads, run: ModeRun, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        self._refuse_window(heads, run, "partial bidirectional spans")
        causal = self._call(heads, run.cu_seqlens, run.max_seqlen, AttentionMode.CAUSAL, q, k, v)
        rows = _span_rows(heads.plan, run, q.device)
        # Not causal: a span's token sees every key from the sequence's start to the span's end.
        return causal.index_copy(0, rows.queries, self._call_rows(heads, rows, q, k, v, causal=False))

    @staticmethod
    def _refuse_window(heads: Heads, run: ModeRun, what: str) -> None:
        """One call cannot have a window that is causal outside the bidirectional span and symmetric inside it."""
        if heads.sliding_window is not None and heads.sliding_window < run.max_seqlen:
            raise ModelError(
                f"the flash kernel cannot combine a sliding window ({heads.sliding_window} tokens) with {what} in longer "
                "sequences. Use model.attention_kernel=flex."
            )

    def _blocks(self, heads: Heads, run: ModeRun, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if any(block.keep_first for own in heads.plan.blocks[run.first : run.last] for block in own):
            self._refuse_window(heads, run, "blocks whose first token sees itself alone")
        output = q.new_empty(*q.shape[:2], v.shape[-1])
        for causal, rows in _block_rows(heads.plan, run, q.device):
            output = output.index_copy(0, rows.queries, self._call_rows(heads, rows, q, k, v, causal=causal))
        return output

    def _call_rows(
        self, heads: Heads, rows: _Rows, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool
    ) -> torch.Tensor:
        # With fewer queries than keys, flash aligns the last query with the last key: causal is what comes before either.
        return self._varlen(
            q.index_select(0, rows.queries),
            k.index_select(0, rows.keys),
            v.index_select(0, rows.keys),
            cu_seqlens_q=rows.cu_queries,
            cu_seqlens_k=rows.cu_keys,
            max_seqlen_q=rows.longest_queries,
            max_seqlen_k=rows.longest_keys,
            window_size=_window(heads.sliding_window, rows.longest_keys, causal),
            causal=causal,
            **_softmax_options(heads),
        )


def find_varlen() -> VarlenFunction:
    """Return `flash_attn`'s varlen function, or torch's behind the same signature.

    Raises:
        ModelError: neither is available.
    """
    found = installed_varlen()
    if found is None:
        raise ModelError(
            f"the flash kernel needs the package flash-attn, or torch 2.11's varlen attention (this is {torch.__version__}). "
            "Install unified_lm[flash], or set model.attention_kernel=flex or sdpa."
        )
    return found


@cache
def installed_varlen() -> VarlenFunction | None:
    """`flash_attn`'s varlen function, torch's behind the same signature, or None if neither is available.

    The first versions of torch's function (2.9 and 2.10) do not count: they have neither scale nor window.
    """
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        try:
            from torch.nn.attention.varlen import varlen_attn
        except ImportError:
            return None
        return torch_varlen if {"scale", "window_size"} <= signature(varlen_attn).parameters.keys() else None
    return flash_attn_varlen_func


def torch_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
) -> torch.Tensor:
    """Torch's varlen attention behind the signature of `flash_attn_varlen_func`; CUDA, half precision.

    Raises:
        ModelError: dropout or a score cap, which torch's function does not have.
    """
    from torch.nn.attention.varlen import varlen_attn

    if dropout_p or softcap:
        missing = "attention dropout" if dropout_p else "score cap (softcap)"
        raise ModelError(
            f"torch's varlen attention has no {missing}. Install unified_lm[flash] or set model.attention_kernel=sdpa."
        )
    # torch 2.11 always allows grouped heads, later versions only with this argument
    grouped: dict[str, Any] = {"enable_gqa": True} if q.shape[1] != k.shape[1] and "enable_gqa" in _varlen_parameters() else {}
    output = varlen_attn(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        scale=softmax_scale,
        window_size=(window_size[0], 0) if causal else window_size,
        **grouped,
    )
    assert isinstance(output, torch.Tensor)  # a pair only if the log-sum-exp is requested
    return output


@cache
def _varlen_parameters() -> frozenset[str]:
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(signature(varlen_attn).parameters)


@dataclass(frozen=True, eq=False)
class _Rows:
    """A call over parts of sequences: some of their queries see some of their keys.

    Attributes:
        queries: int64, the parts' queries, relative to the start of the run.
        keys: int64, the parts' keys, likewise.
        cu_queries: int32 `[parts + 1]`, cumulative number of queries per part.
        cu_keys: int32 `[parts + 1]`, cumulative number of keys per part.
        longest_queries: most queries of a part.
        longest_keys: most keys of a part.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    cu_queries: torch.Tensor
    cu_keys: torch.Tensor
    longest_queries: int
    longest_keys: int

    @classmethod
    def build(cls, parts: Sequence[tuple[int, int, int]], device: torch.device) -> _Rows:
        """Rows of parts `(first key, first query, stop)`: queries and keys end at the same token."""
        queries = torch.cat([torch.arange(query, stop) for _, query, stop in parts])
        keys = torch.cat([torch.arange(key, stop) for key, _, stop in parts])
        num_queries, num_keys = [stop - query for _, query, stop in parts], [stop - key for key, _, stop in parts]
        cu_queries, cu_keys = (torch.tensor([0, *counts]).cumsum(0).int() for counts in (num_queries, num_keys))
        queries, keys, cu_queries, cu_keys = (tensor.to(device) for tensor in (queries, keys, cu_queries, cu_keys))
        return cls(queries, keys, cu_queries, cu_keys, max(num_queries), max(num_keys))


def _span_rows(plan: AttentionPlan, run: ModeRun, device: torch.device) -> _Rows:
    """Second call of a run of partial spans: of each sequence the span's queries, and the keys up to the span's end."""
    key = ("flash spans", run.first, device)
    if key not in plan.kernel_cache:
        starts = [plan.offsets[i] - run.start for i in range(run.first, run.last)]
        spans = plan.spans[run.first : run.last]
        parts = [(at, at + start, at + stop) for at, (start, stop) in zip(starts, spans, strict=True)]
        plan.kernel_cache[key] = _Rows.build(parts, device)
    return plan.kernel_cache[key]


def _block_rows(plan: AttentionPlan, run: ModeRun, device: torch.device) -> list[tuple[bool, _Rows]]:
    """The calls of a run of sequences with blocks: causal blocks and what lies outside all blocks, then bidirectional blocks.

    Returns:
        Whether a call is causal, and its rows.
    """
    key = ("flash blocks", run.first, device)
    if key not in plan.kernel_cache:
        parts: dict[bool, list[tuple[int, int, int]]] = {True: [], False: []}
        for i in range(run.first, run.last):
            at = plan.offsets[i] - run.start
            for block in plan.blocks[i]:
                if alone := block.bidirectional and block.keep_first:
                    parts[True].append((at + block.start, at + block.start, at + block.start + 1))
                if block.stop - block.start > alone:
                    parts[not block.bidirectional].append((at + block.start, at + block.start + alone, at + block.stop))
            parts[True] += [(at, at + start, at + stop) for start, stop in free_stretches(plan.lengths[i], plan.blocks[i])]
        plan.kernel_cache[key] = [(causal, _Rows.build(found, device)) for causal, found in parts.items() if found]
    return plan.kernel_cache[key]


def _window(sliding_window: int | None, longest: int, causal: bool) -> tuple[int, int]:
    """Flash's inclusive (left, right) distances for a window as `batch.plan.visible` defines it.

    A causal window of w counts the token itself, so it reaches w - 1 tokens back; a symmetric one reaches w to each side.
    """
    if sliding_window is None or sliding_window >= longest:
        return (-1, -1)
    return (sliding_window - 1, 0) if causal else (sliding_window, sliding_window)


def _softmax_options(heads: Heads) -> dict[str, Any]:
    return {"dropout_p": heads.dropout, "softmax_scale": heads.scaling, "softcap": heads.softcap or 0.0}
