"""Dense attention for many short sequences: sort by length, pad within groups of similar length, multiply in batches.

Why: on CPU a call of torch's fused attention costs 0.5 to 2 ms in the backward, however short the sequence, and a pack has
dozens of sequences in each of dozens of layers. For short sequences a few batched matrix products per group are faster, and
their score matrices are small enough to keep for the backward. The limits below come from `benchmarks/attention.py`, which
measures both.

Rows are gathered by index, once in and once out. Indices and masks are built once per pack and shared by all layers.
Legend: `attention/__init__.py`; also n sequences of a group, L its padded length, g = H / K query heads per key head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from unified_lm.batch.plan import visible
from unified_lm.models.dropout import draw_keep_mask, keep_probability

GROUP_OVERHEAD = 4_000
"""Cost of one more group, in score elements per head: about 0.2 ms, at 50 ns for one element of nine heads. Step times are the
same for any value between 1,000 and 6,000 (`benchmarks/attention.py`)."""

LENGTH_MULTIPLE = 16
"""Groups are padded to a multiple of this: multiples of 8 were slower in bfloat16, of 32 in float32."""


@dataclass(frozen=True, eq=False)
class Group:
    """Sequences padded to one length.

    Attributes:
        size: n sequences.
        length: L, their padded length in tokens.
        mask: float `[n, 1, L, L]`, 0 where the row's token sees the column's and minus infinity elsewhere; None where every
            token sees every other. A padding row sees key 0, so that no row is empty.
    """

    size: int
    length: int
    mask: torch.Tensor | None


@dataclass(frozen=True, eq=False)
class Layout:
    """Indices between tokens and padded groups.

    Padded query rows are ordered `(n, K, g, L)` and padded key rows `(n, K, L)` within a group, group after group. With the
    heads outside the length, the g query heads of a key head form one `[g * L, d]` matrix, so grouped queries need no copies of
    their keys.

    Attributes:
        groups: the groups, in row order.
        q_pad: int64 `[R_q]`, for each padded query row the row of `[T * H, d]` to copy there.
        kv_pad: int64 `[R_kv]`, for each padded key row the row of `[T * K, d]` to copy there.
        q_unpad: int64 `[T * H]`, for each query row its padded row.
        kv_unpad: int64 `[T * K]`, for each key row its padded row.
        q_padding: int64, the padded query rows that represent no token.
    """

    groups: tuple[Group, ...]
    q_pad: torch.Tensor
    kv_pad: torch.Tensor
    q_unpad: torch.Tensor
    kv_unpad: torch.Tensor
    q_padding: torch.Tensor


def group_by_length(lengths: Sequence[int], overhead: int = GROUP_OVERHEAD) -> list[list[int]]:
    """Split sequences into groups that minimize the padded score elements plus a fixed cost per group.

    Exact, by dynamic programming over the sequences in order of length: an optimal group is a run of neighbors in that order.

    Args:
        lengths: tokens of each sequence.
        overhead: cost of one group, in score elements.

    Returns:
        Groups of indices into `lengths`, longest first.
    """
    # Stable, so that the layout of a pack and therefore its dropout masks never depend on the sorting algorithm.
    order = np.argsort([-length for length in lengths], kind="stable")
    padded = np.array([_round_up(lengths[i]) for i in order], dtype=np.int64)
    total = len(order)
    best = np.zeros(total + 1, dtype=np.int64)  # lowest cost of the first `stop` sequences
    begin = np.zeros(total + 1, dtype=np.int64)  # where the last group of that solution begins
    for stop in range(1, total + 1):
        cost = best[:stop] + overhead + (stop - np.arange(stop)) * padded[:stop] ** 2
        begin[stop] = int(cost.argmin())
        best[stop] = cost[begin[stop]]
    groups: list[list[int]] = []
    stop = total
    while stop:
        groups.append([int(i) for i in order[begin[stop] : stop]])
        stop = int(begin[stop])
    return groups[::-1]


def build_layout(
    lengths: Sequence[int],
    sights: Sequence[torch.Tensor],
    heads: tuple[int, int],
    sliding_window: int | None,
    like: torch.Tensor,
) -> Layout:
    """Build the layout of sequences that lie end to end.

    Args:
        lengths: tokens of each sequence.
        sights: what their tokens see (`batch.plan.sight`).
        heads: H and K, query and key heads.
        sliding_window: as in `Heads`.
        like: a tensor whose device and dtype the masks take.
    """
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    num_q, num_kv = heads
    groups, q_rows, kv_rows, valid = [], [], [], []
    for members in group_by_length(lengths):
        length = _round_up(max(lengths[i] for i in members))
        size_n1 = torch.tensor([lengths[i] for i in members])[:, None]
        start_n1 = torch.from_numpy(offsets[members])[:, None]
        position_L = torch.arange(length)
        real_nL = position_L < size_n1
        # Padding repeats the sequence's first token: finite values that the mask keeps every real token from seeing.
        token_nL = start_n1 + torch.where(real_nL, position_L, 0)
        q_rows.append((token_nL[:, None] * num_q + torch.arange(num_q)[:, None]).flatten())
        kv_rows.append((token_nL[:, None] * num_kv + torch.arange(num_kv)[:, None]).flatten())
        valid.append(real_nL)
        mask = _additive_mask(size_n1, [sights[i] for i in members], length, sliding_window, like.dtype)
        groups.append(Group(len(members), length, None if mask is None else mask.to(like.device, non_blocking=True)))
    q_valid = torch.cat([real[:, None].expand(-1, num_q, -1).flatten() for real in valid])
    kv_valid = torch.cat([real[:, None].expand(-1, num_kv, -1).flatten() for real in valid])
    all_q, all_kv = torch.cat(q_rows), torch.cat(kv_rows)
    tensors = (all_q, all_kv, _invert(all_q, q_valid), _invert(all_kv, kv_valid), torch.nonzero(~q_valid)[:, 0])
    return Layout(tuple(groups), *(tensor.to(like.device, non_blocking=True) for tensor in tensors))


def grouped_attention(
    q_THd: torch.Tensor, k_TKd: torch.Tensor, v_TKe: torch.Tensor, layout: Layout, scaling: float, dropout: float
) -> torch.Tensor:
    """Attention of every sequence of a layout; differentiable once.

    Dropout draws from torch's default generator of the device, in group order, so restoring the generator's state repeats it.

    Args:
        q_THd: `[T, H, d]`.
        k_TKd: `[T, K, d]`.
        v_TKe: `[T, K, e]`, same dtype.
        layout: built for exactly these T tokens.
        scaling: factor of the scores.
        dropout: probability of dropping an attention weight.

    Returns:
        `[T, H, e]`.
    """
    return _GroupedAttention.apply(q_THd, k_TKd, v_TKe, layout, scaling, dropout)


def _round_up(length: int) -> int:
    return -(-length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE


def _invert(rows: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """The inverse of an index that pads: for each token's row the padded row that holds it.

    Args:
        rows: int64 `[R]`, for each padded row the token's row to copy there.
        valid: bool `[R]`, False at padding.
    """
    padded_rows = torch.empty(int(valid.sum()), dtype=torch.int64)
    padded_rows[rows[valid]] = torch.nonzero(valid)[:, 0]
    return padded_rows


def _additive_mask(
    size_n1: torch.Tensor, sights: Sequence[torch.Tensor], length: int, sliding_window: int | None, dtype: torch.dtype
) -> torch.Tensor | None:
    """The mask of `Group`, on the CPU; None where every token sees every other."""
    position = torch.arange(length)
    # What padding rows see is set below.
    padded = torch.stack([functional.pad(sight, (0, length - sight.shape[1])) for sight in sights])
    start_nL1, stop_nL1, first_nL1 = padded[..., None].unbind(1)
    seen_nLL = visible(position[:, None], position, start_nL1, stop_nL1, sliding_window, first_nL1)
    seen_nLL = seen_nLL & (position < size_n1)[:, None, :]
    # Rows of padding see key 0: a row of minus infinities would become NaN in the softmax and in the gradients of its keys.
    seen_nLL[:, :, 0] |= position >= size_n1
    if seen_nLL.all():
        return None
    return torch.zeros(seen_nLL.shape, dtype=dtype).masked_fill_(~seen_nLL, -torch.inf)[:, None]


class _GroupedAttention(torch.autograd.Function):
    """One graph node for all groups: in-place score arithmetic, and gathers whose backward is a gather."""

    @staticmethod
    def forward(
        ctx: Any,
        q_THd: torch.Tensor,
        k_TKd: torch.Tensor,
        v_TKe: torch.Tensor,
        layout: Layout,
        scaling: float,
        dropout: float,
    ) -> torch.Tensor:
        """Attention of every group; see `grouped_attention`. Saves the softmax weights and the dropout masks."""
        # Scaling the queries instead of the scores touches L / d times fewer numbers, in the backward as well.
        q_rows = _rows(q_THd).index_select(0, layout.q_pad).mul_(scaling)
        k_rows = _rows(k_TKd).index_select(0, layout.kv_pad)
        v_rows = _rows(v_TKe).index_select(0, layout.kv_pad)
        out_rows = v_rows.new_empty(q_rows.shape[0], v_rows.shape[1])
        keep_graph = any(ctx.needs_input_grad[:3])
        saved: list[torch.Tensor] = []
        for group, q, k, v, out in _blocks(layout, k_TKd.shape[1], q_rows, k_rows, v_rows, out_rows):
            weights = torch.bmm(q, k.transpose(1, 2))
            if group.mask is not None:
                weights.view(group.size, -1, group.length, group.length).add_(group.mask)
            # In place: scores and weights never exist at the same time.
            torch.softmax(weights, dim=-1, out=weights)  # computed in float32 for the half types, rounded once
            kept = _draw(weights, dropout) if dropout else None
            torch.bmm(weights if kept is None else _drop(weights, kept, dropout), v, out=out)
            if keep_graph:
                saved += [weights] if kept is None else [weights, kept]
        if keep_graph:
            ctx.save_for_backward(q_rows, k_rows, v_rows, *saved)
            ctx.settings = (layout, scaling, dropout, k_TKd.shape[1])
        return out_rows.index_select(0, layout.q_unpad).view(*q_THd.shape[:2], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_THe: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of queries, keys and values."""
        q_rows, k_rows, v_rows, *saved = ctx.saved_tensors
        layout, scaling, dropout, num_kv = ctx.settings
        grad_rows = _rows(grad_THe).index_select(0, layout.q_pad)
        grad_rows.index_fill_(0, layout.q_padding, 0)  # padding rows repeat a real token's gradient
        dq_rows, dk_rows, dv_rows = map(torch.empty_like, (q_rows, k_rows, v_rows))
        stack = iter(saved)
        blocks = _blocks(layout, num_kv, q_rows, k_rows, v_rows, grad_rows, dq_rows, dk_rows, dv_rows)
        for _, q, k, v, grad, dq, dk, dv in blocks:
            weights = next(stack)
            kept = next(stack) if dropout else None
            torch.bmm((weights if kept is None else _drop(weights, kept, dropout)).transpose(1, 2), grad, out=dv)
            dscores = torch.bmm(grad, v.transpose(1, 2))
            if kept is not None:
                dscores = _drop(dscores, kept, dropout)
            # In place, on the same buffer: nothing reads the gradient of the weights again.
            torch._softmax_backward_data(dscores, weights, -1, weights.dtype, grad_input=dscores)
            torch.bmm(dscores, k, out=dq)
            torch.bmm(dscores.transpose(1, 2), q, out=dk)
        num_q = layout.q_unpad.shape[0] * num_kv // layout.kv_unpad.shape[0]
        dq_THd = dq_rows.index_select(0, layout.q_unpad).mul_(scaling).view(-1, num_q, q_rows.shape[1])
        dk_TKd = dk_rows.index_select(0, layout.kv_unpad).view(-1, num_kv, k_rows.shape[1])
        dv_TKe = dv_rows.index_select(0, layout.kv_unpad).view(-1, num_kv, v_rows.shape[1])
        return dq_THd, dk_TKd, dv_TKe, None, None, None


def _rows(x_THd: torch.Tensor) -> torch.Tensor:
    return x_THd.reshape(-1, x_THd.shape[-1])


def _draw(weights: torch.Tensor, dropout: float) -> torch.Tensor:
    if weights.device.type == "cpu":
        return draw_keep_mask(weights.shape, dropout)
    return torch.empty_like(weights, dtype=torch.int8).bernoulli_(keep_probability(dropout)).neg_()


def _drop(weights: torch.Tensor, kept: torch.Tensor, dropout: float) -> torch.Tensor:
    return (weights * kept).mul_(-1 / keep_probability(dropout))  # the mask is -1 where kept


def _blocks(layout: Layout, num_kv: int, *rows: torch.Tensor) -> Any:
    """Yield each group with its `[n * K, rows, width]` view of each tensor.

    Args:
        layout: of the pack.
        num_kv: K.
        rows: tensors of padded rows, query-sized `[R_q, width]` or key-sized `[R_kv, width]`.
    """
    q_begin = kv_begin = 0
    num_q_rows = layout.q_pad.shape[0]
    queries_per_key = layout.q_unpad.shape[0] // layout.kv_unpad.shape[0]
    for group in layout.groups:
        batch = group.size * num_kv
        q_stop, kv_stop = q_begin + batch * queries_per_key * group.length, kv_begin + batch * group.length
        views = []
        for tensor in rows:
            part = tensor[q_begin:q_stop] if tensor.shape[0] == num_q_rows else tensor[kv_begin:kv_stop]
            views.append(part.view(batch, -1, tensor.shape[1]))
        yield (group, *views)
        q_begin, kv_begin = q_stop, kv_stop
