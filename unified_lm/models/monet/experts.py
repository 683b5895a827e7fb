"""MONET's layers of E * E experts, computed without ever naming one (arXiv:2412.04139).

An expert (i, j) is put together of a half that belongs to i and a half that belongs to j. Horizontally: the first matrix of i,
the second of j. Vertically: of i and of j half the hidden channels, and half of the outputs each. The layer's output is the sum
over heads and pairs of g1[h, i] g2[h, j] E_ij(x), and factors: no tensor has more than one of the two key dimensions, unless
experts are left out. The published forms take for granted that gates sum to one. These do not: they are the double sum for any
gates.

The matrices that values of keys go through have a backward of their own (`_Vertical`, `_Horizontal`): of all that grows with
tokens times hidden channels only the rectified states are kept. Where a matrix is no plain one (it has an adapter, or 4-bit
weights), or experts are left out, layers are called one by one instead: the same numbers, for more memory.

Legend: T tokens, S the two sides, H heads, E keys of a side, m hidden channels of an expert (of a half, in vertical layers),
D hidden size; a = relu(U x + b), and its square are the values of keys, `[T, E, m]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from unified_lm.models.monet.configuration import MonetConfig

_MASKED_TOKENS = 32
"""Tokens at a time for which pairs of keys are formed where experts are left out: 1 MiB a token in float32 with 512 keys."""


def mix(left_THE: torch.Tensor, right_THF: torch.Tensor, values_TFm: torch.Tensor) -> torch.Tensor:
    """Sum over heads of `left[h, e] * sum_f right[h, f] values[f]`, the cheap way round: heads are few.

    Args:
        left_THE: gates of the keys that get the values.
        right_THF: gates of those that have them.
        values_TFm: of the keys.

    Returns:
        `[T, E, m]`.
    """
    return torch.bmm(left_THE.transpose(1, 2), torch.bmm(right_THF, values_TFm))


def pair_sums(gates_TSHE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of products of gates over heads and the keys of the other side.

    Args:
        gates_TSHE: of both sides.

    Returns:
        For keys of the first and of the second side, `[T, E]` each. Both equal the sum of gates over heads where gates of each
        head sum to one.
    """
    first_THE, second_THE = gates_TSHE.unbind(1)
    sums_TSH = gates_TSHE.sum(-1)
    return _weighed(first_THE, sums_TSH[:, 1]), _weighed(second_THE, sums_TSH[:, 0])


def _weighed(gates_THE: torch.Tensor, heads_TH: torch.Tensor) -> torch.Tensor:
    return torch.bmm(heads_TH[:, None], gates_THE)[:, 0]


class VerticalExperts(nn.Module):
    """Experts of a left and a right half, under the names of the published checkpoints."""

    uses_weights_of_parts: ClassVar[bool] = True
    """For ZeRO-3, which else gathers a matrix only when its own module is called."""

    def __init__(self, config: MonetConfig) -> None:
        super().__init__()
        half, hidden = config.moe_experts * config.moe_dim // 2, config.hidden_size
        self.keys = config.moe_experts
        self.u1, self.u2 = nn.Linear(hidden, half), nn.Linear(hidden, half)
        self.v11, self.v12, self.v21, self.v22 = (nn.Linear(half, hidden // 2, bias=False) for _ in range(4))
        self.b1, self.b2 = (nn.Parameter(torch.zeros(self.keys, hidden // 2)) for _ in range(2))

    def forward(self, hidden_TD: torch.Tensor, gates_TSHE: torch.Tensor, keep_EE: torch.Tensor | None = None) -> torch.Tensor:
        """The experts' outputs, weighed and summed.

        Args:
            hidden_TD: states.
            gates_TSHE: of both sides; floating, of any precision.
            keep_EE: bool, the experts that take part; None is all.

        Returns:
            `[T, D]`.
        """
        left_TEm, right_TEm = (_rectified(up(hidden_TD), self.keys) for up in (self.u1, self.u2))
        gates_TSHE = gates_TSHE.to(left_TEm.dtype)
        if keep_EE is None and _are_plain((self.v11, self.v12, self.v21, self.v22)):
            weights = (self.v11.weight, self.v12.weight, self.v21.weight, self.v22.weight, self.b1, self.b2)
            return _apply(_Vertical, (left_TEm, right_TEm), gates_TSHE, weights)
        left_TEm, right_TEm = left_TEm.square(), right_TEm.square()
        rows_TE, columns_TE, of_right_TEm, of_left_TEm = _sums_and_mixes(gates_TSHE, keep_EE, left_TEm, right_TEm)
        top = self.v11((left_TEm * rows_TE[..., None]).flatten(1)) + self.v12(of_right_TEm.flatten(1))
        bottom = self.v22((right_TEm * columns_TE[..., None]).flatten(1)) + self.v21(of_left_TEm.flatten(1))
        return torch.cat([top + rows_TE @ self.b1, bottom + columns_TE @ self.b2], dim=-1)


class HorizontalExperts(nn.Module):
    """Experts of a first matrix and a second one, under the names of the published checkpoints."""

    uses_weights_of_parts: ClassVar[bool] = True
    """As in `VerticalExperts`."""

    def __init__(self, config: MonetConfig) -> None:
        super().__init__()
        size, hidden = config.moe_experts * config.moe_dim, config.hidden_size
        self.keys = config.moe_experts
        self.u, self.v = nn.Linear(hidden, size), nn.Linear(size, hidden, bias=False)
        self.b = nn.Parameter(torch.zeros(self.keys, hidden))

    def forward(self, hidden_TD: torch.Tensor, gates_TSHE: torch.Tensor, keep_EE: torch.Tensor | None = None) -> torch.Tensor:
        """See `VerticalExperts.forward`."""
        states_TEm = _rectified(self.u(hidden_TD), self.keys)
        gates_TSHE = gates_TSHE.to(states_TEm.dtype)
        if keep_EE is None and _are_plain((self.v,)):
            return _apply(_Horizontal, (states_TEm,), gates_TSHE, (self.v.weight, self.b))
        _, columns_TE, _, mixed_TEm = _sums_and_mixes(gates_TSHE, keep_EE, states_TEm.square(), None)
        output_TD: torch.Tensor = self.v(mixed_TEm.flatten(1))
        return output_TD + columns_TE @ self.b


def _are_plain(linears: Sequence[nn.Module]) -> bool:
    """Whether calling the layers is nothing but a product with their weights."""
    return all(type(linear) is nn.Linear and linear.weight.is_floating_point() for linear in linears)


def _rectified(states: torch.Tensor, keys: int) -> torch.Tensor:
    return states.relu_().unflatten(-1, (keys, -1))


def _sums_and_mixes(
    gates_TSHE: torch.Tensor, keep_EE: torch.Tensor | None, left_TEm: torch.Tensor, right_TEm: torch.Tensor | None
) -> tuple[Any, ...]:
    """`pair_sums`, and each side's `mix` of the other side's values, over the experts that are kept.

    Args:
        gates_TSHE: of both sides.
        keep_EE: bool, or None for all.
        left_TEm: values of keys of the first side.
        right_TEm: the same of the second side, or None where they are not wanted.
    """
    if keep_EE is None:
        first_THE, second_THE = gates_TSHE.unbind(1)
        of_right_TEm = None if right_TEm is None else mix(first_THE, second_THE, right_TEm)
        return *pair_sums(gates_TSHE), of_right_TEm, mix(second_THE, first_THE, left_TEm)
    parts = []
    for start in range(0, len(gates_TSHE), _MASKED_TOKENS):
        part = slice(start, start + _MASKED_TOKENS)
        first_THE, second_THE = gates_TSHE[part].unbind(1)
        pairs_TEE = torch.bmm(first_THE.transpose(1, 2), second_THE).masked_fill(~keep_EE, 0)
        of_right_TEm = None if right_TEm is None else torch.bmm(pairs_TEE, right_TEm[part])
        of_left_TEm = torch.bmm(pairs_TEE.transpose(1, 2), left_TEm[part])
        parts.append((pairs_TEE.sum(2), pairs_TEE.sum(1), of_right_TEm, of_left_TEm))
    return tuple(None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True))


def _apply(
    function: Any, states: Sequence[torch.Tensor], gates_TSHE: torch.Tensor, weights: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Run one of the functions below in the precision of the states. Casts have gradients, and nothing inside is cast again."""
    dtype = states[0].dtype
    with torch.autocast(states[0].device.type, enabled=False):
        output_TD: torch.Tensor = function.apply(*(tensor.to(dtype) for tensor in (*states, gates_TSHE, *weights)))
    return output_TD


class _Vertical(torch.autograd.Function):
    """What rectified states of both sides become, `[T, D]`."""

    @staticmethod
    def forward(ctx: Any, left_TEm: Any, right_TEm: Any, gates_TSHE: Any, *weights: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(left_TEm, right_TEm, gates_TSHE, *weights)
        v11, v12, v21, v22, b1, b2 = weights
        first_THE, second_THE = gates_TSHE.unbind(1)
        rows_TE, columns_TE = pair_sums(gates_TSHE)
        values_TEm = left_TEm.square()
        bottom = torch.addmm(columns_TE @ b2, mix(second_THE, first_THE, values_TEm).flatten(1), v21.t())
        top = torch.addmm(rows_TE @ b1, values_TEm.mul_(rows_TE[..., None]).flatten(1), v11.t())
        values_TEm = torch.square(right_TEm, out=values_TEm)
        top.addmm_(mix(first_THE, second_THE, values_TEm).flatten(1), v12.t())
        bottom.addmm_(values_TEm.mul_(columns_TE[..., None]).flatten(1), v22.t())
        return torch.cat([top, bottom], dim=-1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        left_TEm, right_TEm, gates_TSHE, v11, v12, v21, v22, b1, b2 = ctx.saved_tensors
        top, bottom = grads[0].chunk(2, dim=-1)
        rows_TE, columns_TE = pair_sums(gates_TSHE)
        d_gates_TSHE = torch.zeros_like(gates_TSHE)
        trained = any(ctx.needs_input_grad[3:7])  # adapters elsewhere leave the matrices frozen
        side = _Side(left_TEm, gates_TSHE, d_gates_TSHE, 0, trained)
        d_left_TEm, d_v21 = side.mixed(v21, bottom)
        d_rows_TE, d_v11 = side.weighed(d_left_TEm, rows_TE, v11, top)
        side = _Side(right_TEm, gates_TSHE, d_gates_TSHE, 1, trained)
        d_right_TEm, d_v12 = side.mixed(v12, top)
        d_columns_TE, d_v22 = side.weighed(d_right_TEm, columns_TE, v22, bottom)
        _add_pair_sums(d_gates_TSHE, gates_TSHE, d_rows_TE.addmm_(top, b1.t()), d_columns_TE.addmm_(bottom, b2.t()))
        d_biases = rows_TE.t() @ top, columns_TE.t() @ bottom
        return d_left_TEm, d_right_TEm, d_gates_TSHE, d_v11, d_v12, d_v21, d_v22, *d_biases


class _Horizontal(torch.autograd.Function):
    """What rectified states become, `[T, D]`."""

    @staticmethod
    def forward(ctx: Any, states_TEm: Any, gates_TSHE: Any, *weights: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(states_TEm, gates_TSHE, *weights)
        down, b = weights
        first_THE, second_THE = gates_TSHE.unbind(1)
        mixed_TEm = mix(second_THE, first_THE, states_TEm.square())
        return torch.addmm(pair_sums(gates_TSHE)[1] @ b, mixed_TEm.flatten(1), down.t())

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        states_TEm, gates_TSHE, down, b = ctx.saved_tensors
        d_gates_TSHE = torch.zeros_like(gates_TSHE)
        side = _Side(states_TEm, gates_TSHE, d_gates_TSHE, 0, ctx.needs_input_grad[2])
        d_states_TEm, d_down = side.mixed(down, grads[0])
        side.finish(d_states_TEm)
        _add_pair_sums(d_gates_TSHE, gates_TSHE, None, grads[0] @ b.t())
        return d_states_TEm, d_gates_TSHE, d_down, pair_sums(gates_TSHE)[1].t() @ grads[0]


class _Side:
    """Backward of what the values of one side's keys do. Gradients of gates are added in place.

    Args:
        states_TEm: a of this side.
        gates_TSHE: of both sides.
        d_gates_TSHE: their gradient.
        number: which side.
        trained: whether gradients of the matrices are wanted; else they are None.
    """

    def __init__(
        self, states_TEm: torch.Tensor, gates_TSHE: torch.Tensor, d_gates_TSHE: torch.Tensor, number: int, trained: bool
    ) -> None:
        self.trained = trained
        self.states_TEm, self.values_TEm = states_TEm, states_TEm.square()
        self.own_THE, self.other_THE = gates_TSHE[:, number], gates_TSHE[:, 1 - number]
        self.d_own_THE, self.d_other_THE = d_gates_TSHE[:, number], d_gates_TSHE[:, 1 - number]

    def mixed(self, down: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Values that keys of the other side got, and that went through a matrix `[., E m]`.

        Returns:
            A tensor of the states' shape, for `weighed` or `finish` to fill, and the gradient of the matrix.
        """
        summed_THm = torch.bmm(self.own_THE, self.values_TEm)
        mixed_TEm = torch.bmm(self.other_THE.transpose(1, 2), summed_THm) if self.trained else None
        d_down = None if mixed_TEm is None else grad.t() @ mixed_TEm.flatten(1)
        d_mixed_TEm = (grad @ down).view_as(self.values_TEm)
        self.d_summed_THm = torch.bmm(self.other_THE, d_mixed_TEm)
        self.d_other_THE.baddbmm_(summed_THm, d_mixed_TEm.transpose(1, 2))
        self.d_own_THE.baddbmm_(self.d_summed_THm, self.values_TEm.transpose(1, 2))
        return d_mixed_TEm, d_down

    def weighed(
        self, d_states_TEm: torch.Tensor, sums_TE: torch.Tensor, down: torch.Tensor, grad: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Values that were weighed by sums and went through a matrix; fills the gradient of the states.

        Returns:
            Gradients of the sums and of the matrix.
        """
        torch.mm(grad, down, out=d_states_TEm.flatten(1))
        d_sums_TE = torch.linalg.vecdot(d_states_TEm, self.values_TEm)
        d_states_TEm.mul_(sums_TE[..., None]).baddbmm_(self.own_THE.transpose(1, 2), self.d_summed_THm)
        d_down = grad.t() @ self.values_TEm.mul_(sums_TE[..., None]).flatten(1) if self.trained else None
        d_states_TEm.mul_(self.states_TEm).mul_(2)
        return d_sums_TE, d_down

    def finish(self, d_states_TEm: torch.Tensor) -> None:
        """Fill the gradient of the states where values are not weighed."""
        torch.bmm(self.own_THE.transpose(1, 2), self.d_summed_THm, out=d_states_TEm)
        d_states_TEm.mul_(self.states_TEm).mul_(2)


def _add_pair_sums(
    d_gates_TSHE: torch.Tensor, gates_TSHE: torch.Tensor, d_rows_TE: torch.Tensor | None, d_columns_TE: torch.Tensor
) -> None:
    """Add to the gradient of gates what comes through `pair_sums`; None is none."""
    first_THE, second_THE = gates_TSHE.unbind(1)
    d_first_THE, d_second_THE = d_gates_TSHE.unbind(1)
    sums_TSH = gates_TSHE.sum(-1)
    d_first_THE.add_(torch.bmm(second_THE, d_columns_TE[..., None]))
    d_second_THE.addcmul_(sums_TSH[:, 0, :, None], d_columns_TE[:, None])
    if d_rows_TE is not None:
        d_second_THE.add_(torch.bmm(first_THE, d_rows_TE[..., None]))
        d_first_THE.addcmul_(sums_TSH[:, 1, :, None], d_rows_TE[:, None])
