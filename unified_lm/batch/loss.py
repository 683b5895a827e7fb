"""A loss before it is normalised: a sum and what it is a sum over."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LossTerm:
    """One objective's share of a step on one rank.

    The loss of a step is `weight * total sum / total count`, both summed over every pack and every rank, so that neither
    the split into packs nor the number of ranks changes it.

    Attributes:
        sum: float32 scalar, with gradient.
        count: what the sum is divided by (supervised tokens, samples, micro-batches or queries), on the same share.
    """

    sum: torch.Tensor
    count: float
