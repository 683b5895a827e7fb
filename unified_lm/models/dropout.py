"""The low-rank update of a linear layer, with dropout that is cheap on a CPU.

torch's CPU dropout draws one Mersenne-Twister number per element in a single thread: with adapters on every layer that takes
about as long as the weight gradients that LoRA saves. Here a mask is cut from the bytes of a 64-bit generator,
applied by a bitwise AND, and its rescaling is folded into the update's own factor.

Legend: T rows (tokens), I and O the layer's input and output features, r the adapter's rank.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.autograd.function import once_differentiable

_BLOCK = 1 << 17  # elements handled at a time, so that temporaries stay in the cache
_INTEGER_VIEW = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


def _thresholds(probability: float) -> tuple[int, int]:
    """The probability as ``(first + second / 65536) / 256``, to the nearest 2**-24."""
    levels = round(probability * (1 << 24))
    return levels >> 16, levels & 0xFFFF


def keep_probability(probability: float) -> float:
    """The probability with which a mask keeps an element: 1 - `probability`, to the nearest 2**-24."""
    first, second = _thresholds(probability)
    return 1.0 - (first + second / 65536) / 256


def draw_keep_mask(shape: tuple[int, ...] | torch.Size, probability: float) -> torch.Tensor:
    """Draw independent Bernoulli variables for dropout on the CPU.

    Each element gets one random byte; only the one in 256 that equals the threshold needs more bits to decide. Each call
    takes one number from torch's default CPU generator and expands it (SFC64), so capturing and restoring that generator
    repeats the mask.

    Args:
        shape: any.
        probability: of dropping an element, in [0, 1); exact to 2**-25.

    Returns:
        int8 of `shape`: -1 (all bits set) where the element is kept, 0 where it is dropped.
    """
    generator = np.random.SFC64(int(torch.randint(1 << 62, ())))
    keep = np.empty(int(np.prod(shape)), dtype=np.int8)
    for start in range(0, len(keep), _BLOCK):
        block = keep[start : start + _BLOCK]
        np.negative(_draw_kept(generator, len(block), probability).view(np.int8), out=block)
    return torch.from_numpy(keep).view(shape)


def _draw_kept(generator: np.random.SFC64, count: int, probability: float) -> np.ndarray:
    """bool `[count]`."""
    first, second = _thresholds(probability)
    drawn = generator.random_raw((count + 7) // 8).view(np.uint8)[:count]
    kept = drawn >= first
    if second:
        undecided = np.flatnonzero(drawn == first)
        kept[undecided] = generator.random_raw((len(undecided) + 3) // 4).view(np.uint16)[: len(undecided)] >= second
    return kept


def _apply_mask(value: torch.Tensor, bits: torch.Tensor | None, out: torch.Tensor | None) -> torch.Tensor:
    """Write `value`, zero where the mask drops it and not rescaled, into `out`: either argument itself or a third."""
    if bits is None or out is None:
        return value
    return torch.bitwise_and(value.view(bits.dtype), bits, out=out.view(bits.dtype)).view(value.dtype)


class _AdaptedLinear(torch.autograd.Function):
    """A frozen linear layer with its low-rank update; see `adapted_linear`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        keep: torch.Tensor | None,
        factor: float,
    ) -> torch.Tensor:
        bits = None if keep is None else keep.to(_INTEGER_VIEW[x.dtype])
        reduced = _apply_mask(x, bits, bits) @ a.T
        ctx.save_for_backward(x, weight, a, b, reduced, keep)
        ctx.factor = factor
        return torch.nn.functional.linear(x, weight, bias).addmm_(reduced, b.T, alpha=factor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grads
        x, weight, a, b, reduced, keep = ctx.saved_tensors
        needs_x, needs_a, needs_b = (ctx.needs_input_grad[i] for i in (0, 3, 4))
        grad_x = grad_a = grad_b = None
        if needs_b:
            grad_b = (grad.T @ reduced).mul_(ctx.factor)
        if needs_x or needs_a:
            grad_reduced = (grad @ b).mul_(ctx.factor)
            bits = None if keep is None else keep.to(_INTEGER_VIEW[x.dtype])
            buffer = torch.empty_like(x)  # first for the dropped input, then for the input's gradient
            if needs_a:
                grad_a = grad_reduced.T @ _apply_mask(x, bits, buffer)
            if needs_x:
                torch.mm(grad_reduced, a, out=buffer)
                grad_x = _apply_mask(buffer, bits, buffer).addmm_(grad, weight)
        return grad_x, None, None, grad_a, grad_b, None, None


def adapted_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
    dropout: float = 0.0,
    keep: torch.Tensor | None = None,
) -> torch.Tensor:
    """A frozen linear layer with a LoRA update (Hu et al. 2021, arXiv 2106.09685, eq. 3): ``W x + bias + s b a drop(x)``.

    The same function of the same inputs as peft's layer; only the passes over memory differ. What is kept for the
    backward is `x`, one byte per element of it for the mask, and `[T, r]`.

    Args:
        x: `[T, I]`, contiguous; every matrix has its dtype.
        weight: `[O, I]`. It gets no gradient, and neither does the bias.
        bias: `[O]` or None.
        a: `[r, I]`.
        b: `[O, r]`.
        scaling: factor of the update (alpha / r).
        dropout: probability of dropping an element of `x`, on the CPU only.
        keep: a mask for `x` drawn before (`draw_keep_mask`); None draws one if `dropout` is not 0.

    Returns:
        `[T, O]`.
    """
    if dropout > 0.0 and keep is None:
        keep = draw_keep_mask(x.shape, dropout)
    return _AdaptedLinear.apply(x, weight, bias, a, b, keep, scaling / keep_probability(dropout))
