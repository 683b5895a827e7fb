"""MONET's two terms for its routers (arXiv:2412.04139): keys are used evenly over a corpus, and clearly by each token.

    uniformity = -(1 / 2HE) sum over sides, heads and keys of ln(mean gate over tokens)     least: ln E, for even use
    ambiguity  =  (1 / 2H)  sum over sides and heads of 1 - (largest gate), mean over tokens    least: 0

The mean over tokens comes before the logarithm, which couples all tokens of a step (`engine.routing_spread`); the paper's table
of values says so, where its formula does not. Keys that no token used would give an infinite loss: means are floored.

Legend: H heads, E keys of a side; gates are `[..., 2, H, E]`.
"""

from __future__ import annotations

import torch

FLOOR = 1e-9
"""Added to a mean gate: far below an even one (2e-3 with 512 keys), so that the loss of keys in use does not notice."""


def uniformity(mean_gates: torch.Tensor) -> torch.Tensor:
    """The uniformity term of each router.

    Args:
        mean_gates: `[..., 2, H, E]`, the mean of gates over tokens.

    Returns:
        `[...]`, in nats.
    """
    return -(mean_gates + FLOOR).log().mean((-3, -2, -1))


def ambiguity(gates: torch.Tensor) -> torch.Tensor:
    """The ambiguity of each token, between 0 and 1 - 1/E.

    Args:
        gates: `[..., 2, H, E]`.

    Returns:
        `[...]`.
    """
    return (1 - gates.amax(-1)).mean((-2, -1))
