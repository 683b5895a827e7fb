"""The low-rank update of a linear layer, and dropout that is cheap on a CPU.

torch's CPU dropout draws one Mersenne Twister number per element in a single thread. With adapters on every layer that takes
about as long as the weight gradients that LoRA saves. Adapters drop few elements, so for them the indices of dropped elements
are drawn instead of a mask, and the rescaling is folded into the factor of the update. Attention dropout usually drops more;
its mask is made from the bytes of a 64-bit generator.

Legend: T rows (tokens), I and O the layer's input and output features, r the adapter's rank.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch.autograd.function import once_differentiable

_BLOCK = 1 << 17  # elements per block, so that temporaries stay in the CPU's cache


def _thresholds(probability: float) -> tuple[int, int]:
    """The probability as two integers, ``(first + second / 65536) / 256``, to the nearest 2**-24."""
    levels = round(probability * (1 << 24))
    return levels >> 16, levels & 0xFFFF


def keep_probability(probability: float) -> float:
    """The probability with which a mask keeps an element: 1 - `probability`, to the nearest 2**-24.

    Rescaling by its inverse, not by that of the requested probability, keeps the expectation exact.
    """
    first, second = _thresholds(probability)
    return 1.0 - (first + second / 65536) / 256


def draw_keep_mask(shape: tuple[int, ...] | torch.Size, probability: float) -> torch.Tensor:
    """Draw independent Bernoulli variables for dropout on the CPU.

    Each element gets one random byte. Only if it equals the threshold, once in 256, are more bits needed to decide. Each call
    seeds a fast generator (SFC64) with one number from torch's default CPU generator, so restoring that generator's state
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
    """bool `[count]`, True where an element is kept."""
    first, second = _thresholds(probability)
    drawn = generator.random_raw((count + 7) // 8).view(np.uint8)[:count]
    kept = drawn >= first
    if second:
        undecided = np.flatnonzero(drawn == first)
        kept[undecided] = generator.random_raw((len(undecided) + 3) // 4).view(np.uint16)[: len(undecided)] >= second
    return kept


def draw_dropped(num_elements: int, probability: float) -> torch.Tensor:
    """Draw which elements dropout drops, on the CPU, in time proportional to their number, not to the number of elements.

    A Poisson number of indices with mean ``-ln(1 - probability) * num_elements`` is drawn with replacement. By thinning, the
    number of hits of an element is Poisson with mean ``-ln(1 - probability)``, independent of other elements. An element has no
    hit with probability ``1 - probability``, so the kept elements are independent Bernoulli variables. Everything comes from
    torch's default CPU generator.

    Args:
        num_elements: of the flattened tensor.
        probability: of dropping an element, in [0, 1).

    Returns:
        int64 `[N]`: flat indices, unordered, possibly with duplicates.
    """
    mean = torch.tensor(-math.log1p(-probability) * num_elements, dtype=torch.float64)
    return torch.randint(num_elements, (int(torch.poisson(mean)),))


def _drop_in_place(value: torch.Tensor, dropped: torch.Tensor | None) -> torch.Tensor:
    """Zero the dropped elements of a contiguous tensor, without rescaling the others."""
    if dropped is not None:
        value.view(-1).index_fill_(0, dropped, 0.0)
    return value


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
        dropped: torch.Tensor | None,
        factor: float,
    ) -> torch.Tensor:
        """`W x + b + factor B A dropout(x)`; saves the input of `A`, not `x`."""
        # The backward of a frozen weight needs no input, so the only copy of x that is kept is the one with dropout.
        a_input = x if dropped is None else _drop_in_place(x.clone(), dropped)
        reduced = a_input @ a.T
        ctx.save_for_backward(a_input, weight, a, b, reduced, dropped)
        ctx.factor = factor
        return torch.nn.functional.linear(x, weight, bias).addmm_(reduced, b.T, alpha=factor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of the input and of `A` and `B`; the frozen weight has none."""
        (grad,) = grads
        a_input, weight, a, b, reduced, dropped = ctx.saved_tensors
        needs_x, needs_a, needs_b = (ctx.needs_input_grad[i] for i in (0, 3, 4))
        grad_x = grad_a = grad_b = None
        if needs_b:
            grad_b = (reduced.T @ grad).mul_(ctx.factor).T  # faster than with grad transposed
        if needs_x or needs_a:
            grad_reduced = (grad @ b).mul_(ctx.factor)
            if needs_a:
                grad_a = grad_reduced.T @ a_input
            if needs_x:
                # Dropout acts on the adapter's branch only, so its mask is applied before the base weight's gradient is added.
                grad_x = _drop_in_place(grad_reduced @ a, dropped).addmm_(grad, weight)
        return grad_x, None, None, grad_a, grad_b, None, None


def adapted_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
    dropout: float = 0.0,
    dropped: torch.Tensor | None = None,
) -> torch.Tensor:
    """A frozen linear layer with a LoRA update (Hu et al. 2021, arXiv 2106.09685, eq. 3): ``W x + bias + s b a drop(x)``.

    The same function of the same inputs as peft's layer, with fewer passes over memory. The backward keeps the input of `a` (a
    copy of `x`, if there is dropout), eight bytes for every dropped element, and `[T, r]`.

    Args:
        x: `[T, I]`, contiguous; every matrix has its dtype.
        weight: `[O, I]`. Neither it nor the bias gets a gradient.
        bias: `[O]` or None.
        a: `[r, I]`.
        b: `[O, r]`.
        scaling: factor of the update (alpha / r).
        dropout: probability of dropping an element of `x`, on the CPU only.
        dropped: indices to drop from `x`, from `draw_dropped`; None draws them if `dropout` is not 0.

    Returns:
        `[T, O]`.
    """
    if dropout > 0.0 and dropped is None:
        dropped = draw_dropped(x.numel(), dropout)
    return _AdaptedLinear.apply(x, weight, bias, a, b, dropped, scaling / (1.0 - dropout))
