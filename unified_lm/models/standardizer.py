"""Per-dimension standardization of embeddings with statistics that are fitted once, on a reference corpus.

A few dimensions of a language model's states are far larger than the others and dominate every cosine (Timkey and van Schijndel
2021, arXiv:2109.04404, who standardize in the same way). Statistics of the texts that are encoded together would make a vector
depend on its batch. These are part of the model and saved with it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from unified_lm.core.errors import DataError

MIN_TEXTS = 100
"""Fewest texts to fit statistics on: with fewer, a standard deviation is off by more than 7% (1 / sqrt(2 N))."""

RELATIVE_EPS = 1e-3
"""Smallest standard deviation relative to the median one. Smaller ones are raised to it, so that a nearly constant dimension is
not amplified."""


class RunningMoments:
    """Mean and variance of every dimension over a stream of vectors, in float64.

    Blocks are merged by Chan, Golub and LeVeque (1983), "Algorithms for computing the sample variance", equation 2.1: the
    result depends neither on the order nor on the size of the blocks, up to rounding, and large means cost no precision.
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean = np.zeros(0)
        self._squares = np.zeros(0)

    def update(self, vectors: np.ndarray | torch.Tensor) -> None:
        """Add a block of vectors.

        Args:
            vectors: `[N, D]`, any floating type; N may be 0.

        Raises:
            DataError: a different number of dimensions than before, or a value that is not finite.
        """
        block = np.asarray(vectors, dtype=np.float64)
        if not len(block):
            return
        if self.count and block.shape[1] != len(self._mean):
            raise DataError(f"got vectors of {block.shape[1]} dimensions after vectors of {len(self._mean)}.")
        if not np.isfinite(block).all():
            raise DataError("a vector of the reference corpus is not finite; try dtype float32.")
        if not self.count:
            self._mean, self._squares = np.zeros(block.shape[1]), np.zeros(block.shape[1])
        mean = block.mean(axis=0)
        delta = mean - self._mean
        total = self.count + len(block)
        self._squares += ((block - mean) ** 2).sum(axis=0) + delta**2 * (self.count * len(block) / total)
        self._mean = self._mean + delta * (len(block) / total)
        self.count = total

    @property
    def mean(self) -> np.ndarray:
        """float64 `[D]`."""
        return self._mean.copy()

    @property
    def variance(self) -> np.ndarray:
        """float64 `[D]`, population variance (divided by N); empty before the first vector."""
        return self._squares / max(self.count, 1)


class Standardizer(nn.Module):
    """`(x - mean) / std` per dimension, computed in float32 as `x * scale + shift`.

    Args:
        scale: `[D]`, 1 / std, all positive and finite.
        shift: `[D]`, -mean / std.
    """

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, scale: torch.Tensor, shift: torch.Tensor) -> None:
        super().__init__()
        assert scale.ndim == 1, "one scale per dimension"
        assert scale.shape == shift.shape, "as many shifts as scales"
        self.register_buffer("scale", scale.detach().clone().float())
        self.register_buffer("shift", shift.detach().clone().float())

    @classmethod
    def fit(cls, moments: RunningMoments, min_texts: int = MIN_TEXTS) -> Standardizer:
        """Create a standardizer from moments.

        Standard deviations below `RELATIVE_EPS` times their median are raised to that value.

        Args:
            moments: of the reference vectors, not normalized.
            min_texts: fewest vectors accepted.

        Raises:
            DataError: too few vectors, or more than half of the dimensions do not vary at all, as with copies of one text.
        """
        if moments.count < max(min_texts, 2):
            raise DataError(
                f"the reference corpus has {moments.count} texts; statistics need at least {max(min_texts, 2)}, and a few "
                "thousand are better. Give a larger corpus."
            )
        std = np.sqrt(moments.variance)
        # Rounding of float32 vectors gives a constant dimension a deviation of up to this size.
        constant = std <= 1e-6 * np.abs(moments.mean)
        floor = RELATIVE_EPS * float(np.median(std))
        if constant.mean() > 0.5 or floor == 0:
            raise DataError(
                f"{int(constant.sum())} of {len(std)} dimensions have zero variance over the {moments.count} texts of the "
                "reference corpus: are its texts all the same?"
            )
        std = np.maximum(std, floor)
        return cls(torch.from_numpy(1 / std), torch.from_numpy(-moments.mean / std))

    @property
    def dim(self) -> int:
        """D."""
        return len(self.scale)

    def part(self, start: int, stop: int) -> Standardizer:
        """The standardizer of some neighboring dimensions."""
        return Standardizer(self.scale[start:stop], self.shift[start:stop])

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        """Standardize `[N, D]`, in float32 (float64 for float64) with autocast off."""
        with torch.autocast(vectors.device.type, enabled=False):
            work = torch.promote_types(vectors.dtype, torch.float32)
            return torch.addcmul(self.shift.to(work), vectors.to(work), self.scale.to(work))


def embedding_head(projection: nn.Module | None, standardizer: nn.Module | None) -> nn.Module | None:
    """The modules that are applied to a pooled vector: the linear head, then standardization. None if there are none."""
    parts = [part for part in (projection, standardizer) if part is not None]
    return nn.Sequential(*parts) if parts else None
