"""MONET's layers of E * E experts, computed without ever naming one (arXiv:2412.04139).

An expert (i, j) is put together of a half that belongs to i and a half that belongs to j. Horizontally: the first matrix of i,
the second of j. Vertically: of i and of j half the hidden channels, and half of the outputs each. The layer's output is the sum
over heads and pairs of g1[h, i] g2[h, j] E_ij(x), and factors: no tensor has more than one of the two key dimensions, unless
experts are left out. The published forms take for granted that gates sum to one. These do not: they are the double sum for any
gates.

Forward and backward are written by hand (`_Vertical`, `_Horizontal`): of all that grows with tokens times hidden channels only
the rectified states are kept, and gradients are formed in place. Where a linear layer is no plain one (it has an adapter, or
4-bit weights), or experts are left out, layers are called one by one instead: the same numbers, for more time and memory.

Legend: T tokens, H heads, E keys of a side, m hidden channels of an expert (of a half, in vertical layers), D hidden size;
a = relu(U x + b), and its square are the values of keys, `[T, E, m]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from unified_lm.models.monet.configuration import MonetConfig

_MASKED_TOKENS = 32
"""Tokens at a time for which pairs of keys are formed where experts are left out: 1 MiB a token in float32 with 512 keys."""

_Tensors = tuple[torch.Tensor, ...]


def mix(left: torch.Tensor, right: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Sum over heads of `left[h, e] * sum_f right[h, f] values[f]`, the cheap way round: heads are few.

    Args:
        left: `[T, H, E]`.
        right: `[T, H, F]`.
        values: `[T, F, m]`.

    Returns:
        `[T, E, m]`.
    """
    return torch.bmm(left.transpose(1, 2), torch.bmm(right, values))


def pair_sums(gates: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of products of gates over heads and the keys of the other side.

    Args:
        gates: `[T, 2, H, E]`.

    Returns:
        For keys of the first and of the second side, `[T, E]` each. Both equal the sum of gates over heads where gates of each
        head sum to one.
    """
    first, second = gates.unbind(1)
    sums = gates.sum(-1)
    return _weighed(first, sums[:, 1]), _weighed(second, sums[:, 0])


def _weighed(gates: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
    """`[T, E]` of gates `[T, H, E]` and a factor of each head `[T, H]`."""
    return torch.bmm(heads[:, None], gates)[:, 0]


class VerticalExperts(nn.Module):
    """Experts of a left and a right half, under the names of the published checkpoints."""

    def __init__(self, config: MonetConfig) -> None:
        super().__init__()
        half, hidden = config.moe_experts * config.moe_dim // 2, config.hidden_size
        self.keys = config.moe_experts
        self.u1, self.u2 = nn.Linear(hidden, half), nn.Linear(hidden, half)
        self.v11, self.v12, self.v21, self.v22 = (nn.Linear(half, hidden // 2, bias=False) for _ in range(4))
        self.b1, self.b2 = (nn.Parameter(torch.zeros(self.keys, hidden // 2)) for _ in range(2))

    def forward(self, hidden: torch.Tensor, gates: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
        """The experts' outputs, weighed and summed.

        Args:
            hidden: `[T, D]`.
            gates: `[T, 2, H, E]`.
            keep: bool `[E, E]`, the experts that take part; None is all.

        Returns:
            `[T, D]`.
        """
        linears = (self.u1, self.u2, self.v11, self.v12, self.v21, self.v22)
        if keep is None and _are_plain(linears):
            weights = (self.u1.bias, self.u2.bias, *(linear.weight for linear in linears), self.b1, self.b2)
            return _apply(_Vertical, hidden, gates, weights)
        left, right = (_rectified(up(hidden), self.keys).square() for up in (self.u1, self.u2))
        rows, columns, of_right, of_left = _sums_and_mixes(gates.to(left.dtype), keep, left, right)
        top = self.v11((left * rows[..., None]).flatten(1)) + self.v12(of_right.flatten(1)) + rows @ self.b1
        bottom = self.v21(of_left.flatten(1)) + self.v22((right * columns[..., None]).flatten(1)) + columns @ self.b2
        return torch.cat([top, bottom], dim=-1)


class HorizontalExperts(nn.Module):
    """Experts of a first matrix and a second one, under the names of the published checkpoints."""

    def __init__(self, config: MonetConfig) -> None:
        super().__init__()
        size, hidden = config.moe_experts * config.moe_dim, config.hidden_size
        self.keys = config.moe_experts
        self.u, self.v = nn.Linear(hidden, size), nn.Linear(size, hidden, bias=False)
        self.b = nn.Parameter(torch.zeros(self.keys, hidden))

    def forward(self, hidden: torch.Tensor, gates: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
        """See `VerticalExperts.forward`."""
        if keep is None and _are_plain((self.u, self.v)):
            return _apply(_Horizontal, hidden, gates, (self.u.bias, self.u.weight, self.v.weight, self.b))
        values = _rectified(self.u(hidden), self.keys).square()
        _, columns, _, mixed = _sums_and_mixes(gates.to(values.dtype), keep, values, None)
        output: torch.Tensor = self.v(mixed.flatten(1)) + columns @ self.b
        return output


def _are_plain(linears: Sequence[nn.Module]) -> bool:
    """Whether calling the layers is nothing but a product with their weights."""
    return all(type(linear) is nn.Linear and linear.weight.is_floating_point() for linear in linears)


def _rectified(states: torch.Tensor, keys: int) -> torch.Tensor:
    return states.relu().unflatten(-1, (keys, -1))


def _sums_and_mixes(
    gates: torch.Tensor, keep: torch.Tensor | None, left: torch.Tensor, right: torch.Tensor | None
) -> tuple[Any, ...]:
    """`pair_sums`, and each side's `mix` of the other side's values, over the experts that are kept.

    Args:
        gates: `[T, 2, H, E]`.
        keep: bool `[E, E]`, or None for all.
        left: `[T, E, m]`, values of keys of the first side.
        right: the same of the second side, or None where they are not wanted.
    """
    if keep is None:
        first, second = gates.unbind(1)
        return *pair_sums(gates), None if right is None else mix(first, second, right), mix(second, first, left)
    parts = []
    for start in range(0, len(gates), _MASKED_TOKENS):
        part = slice(start, start + _MASKED_TOKENS)
        first, second = gates[part].unbind(1)
        pairs = torch.bmm(first.transpose(1, 2), second).masked_fill(~keep, 0)
        of_right = None if right is None else torch.bmm(pairs, right[part])
        parts.append((pairs.sum(2), pairs.sum(1), of_right, torch.bmm(pairs.transpose(1, 2), left[part])))
    return tuple(None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True))


def _apply(function: Any, hidden: torch.Tensor, gates: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """Run a function in the precision of autocast, or of the states; casts have gradients, and what runs inside has none."""
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    with torch.autocast(device, enabled=False):
        output: torch.Tensor = function.apply(hidden.to(dtype), gates.to(dtype), *(weight.to(dtype) for weight in weights))
    return output


class _Vertical(torch.autograd.Function):
    """`VerticalExperts` of states `[T, D]`, gates `[T, 2, H, E]` and weights."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, gates: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        c1, c2, u1, u2, v11, v12, v21, v22, b1, b2 = weights
        left, right = (_rectify(hidden, up, bias, gates.shape[-1]) for up, bias in ((u1, c1), (u2, c2)))
        ctx.save_for_backward(hidden, gates, left, right, *weights)
        first, second = gates.unbind(1)
        rows, columns = pair_sums(gates)
        values = left.square()
        bottom = torch.addmm(columns @ b2, mix(second, first, values).flatten(1), v21.t())
        top = torch.addmm(rows @ b1, values.mul_(rows[..., None]).flatten(1), v11.t())
        values = torch.square(right, out=values)
        top.addmm_(mix(first, second, values).flatten(1), v12.t())
        bottom.addmm_(values.mul_(columns[..., None]).flatten(1), v22.t())
        return torch.cat([top, bottom], dim=-1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, gates, left, right, *weights = ctx.saved_tensors
        _, _, u1, u2, v11, v12, v21, v22, b1, b2 = weights
        top, bottom = grads[0].chunk(2, dim=-1)
        first, second = gates.unbind(1)
        rows, columns = pair_sums(gates)
        of_first = _side(left, (first, second), rows, (v11, v21), (top, bottom))
        d_left, d_v11, d_v21, d_rows, d_first, d_second = of_first
        of_second = _side(right, (second, first), columns, (v22, v12), (bottom, top))
        d_right, d_v22, d_v12, d_columns, d_second_too, d_first_too = of_second
        d_rows.add_(top @ b1.t())
        d_columns.add_(bottom @ b2.t())
        d_gates = torch.stack([d_first.add_(d_first_too), d_second.add_(d_second_too)], dim=1)
        d_gates.add_(_pair_sums_backward(gates, d_rows, d_columns))
        d_hidden = (d_left @ u1).addmm_(d_right, u2)
        return (
            *(d_hidden, d_gates, d_left.sum(0), d_right.sum(0), d_left.t() @ hidden, d_right.t() @ hidden),
            *(d_v11, d_v12, d_v21, d_v22, rows.t() @ top, columns.t() @ bottom),
        )


def _side(rectified: torch.Tensor, gates: _Tensors, sums: torch.Tensor, downs: _Tensors, grads: _Tensors) -> _Tensors:
    """Backward of what the values of one side's keys do: weighed by sums, and mixed to keys of the other side.

    Args:
        rectified: a of this side, `[T, E, m]`.
        gates: of this side and of the other, `[T, H, E]`.
        sums: `pair_sums` of this side, `[T, E]`.
        downs: the matrices `[D / 2, E * m]` that weighed and mixed values go through.
        grads: of the two halves of the output that they go to, `[T, D / 2]`.

    Returns:
        Gradients of U x + b `[T, E * m]`, the two matrices, the sums `[T, E]`, and the gates of this side and of the other.
    """
    own, other = gates
    values = rectified.square()
    summed = torch.bmm(own, values)
    d_mixed_down = grads[1].t() @ torch.bmm(other.transpose(1, 2), summed).flatten(1)
    d_mixed = (grads[1] @ downs[1]).view_as(values)
    d_summed = torch.bmm(other, d_mixed)
    d_other = torch.bmm(summed, d_mixed.transpose(1, 2))
    d_own = torch.bmm(d_summed, values.transpose(1, 2))
    d_values = torch.mm(grads[0], downs[0], out=d_mixed.flatten(1)).view_as(values)
    d_sums = torch.einsum("tem,tem->te", d_values, values)
    d_values.mul_(sums[..., None]).baddbmm_(own.transpose(1, 2), d_summed)
    d_weighed_down = grads[0].t() @ values.mul_(sums[..., None]).flatten(1)
    return d_values.mul_(rectified).mul_(2).flatten(1), d_weighed_down, d_mixed_down, d_sums, d_own, d_other


class _Horizontal(torch.autograd.Function):
    """`HorizontalExperts` of states `[T, D]`, gates `[T, 2, H, E]` and weights."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, gates: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        bias, up, down, b = weights
        rectified = _rectify(hidden, up, bias, gates.shape[-1])
        ctx.save_for_backward(hidden, gates, rectified, *weights)
        first, second = gates.unbind(1)
        return torch.addmm(pair_sums(gates)[1] @ b, mix(second, first, rectified.square()).flatten(1), down.t())

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, gates, rectified, _, up, down, b = ctx.saved_tensors
        (grad,) = grads
        first, second = gates.unbind(1)
        values = rectified.square()
        summed = torch.bmm(first, values)
        d_down = grad.t() @ torch.bmm(second.transpose(1, 2), summed).flatten(1)
        d_mixed = (grad @ down).view_as(values)
        d_summed = torch.bmm(second, d_mixed)
        d_first, d_second = torch.bmm(d_summed, values.transpose(1, 2)), torch.bmm(summed, d_mixed.transpose(1, 2))
        d_states = torch.bmm(first.transpose(1, 2), d_summed, out=d_mixed).mul_(rectified).mul_(2).flatten(1)
        columns = pair_sums(gates)[1]
        d_gates = torch.stack([d_first, d_second], dim=1).add_(_pair_sums_backward(gates, None, grad @ b.t()))
        return d_states @ up, d_gates, d_states.sum(0), d_states.t() @ hidden, d_down, columns.t() @ grad


def _rectify(hidden: torch.Tensor, up: torch.Tensor, bias: torch.Tensor, keys: int) -> torch.Tensor:
    return torch.addmm(bias, hidden, up.t()).relu_().unflatten(-1, (keys, -1))


def _pair_sums_backward(gates: torch.Tensor, d_rows: torch.Tensor | None, d_columns: torch.Tensor) -> torch.Tensor:
    """Gradient of gates `[T, 2, H, E]` of those of `pair_sums`, `[T, E]` each; None is none."""
    first, second = gates.unbind(1)
    sums = gates.sum(-1)
    by_heads = torch.bmm(second, d_columns[..., None])  # of the sums of the first side, [T, H, 1]
    d_first, d_second = by_heads.expand_as(first), sums[:, 0, :, None] * d_columns[:, None]
    if d_rows is not None:
        d_first = d_first + sums[:, 1, :, None] * d_rows[:, None]
        d_second = d_second.add_(torch.bmm(first, d_rows[..., None]))
    return torch.stack([d_first, d_second], dim=1)
