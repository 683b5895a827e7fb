"""DRAFT."""

from __future__ import annotations

import torch

LARGEST = 127
"""Whole numbers go from -127 to 127."""


def quantize(values: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole numbers and their scales.

    Args:
        values: of any floating dtype.
        dim: the dimension that shares a scale.

    Returns:
        int8, in the shape of `values`, and bfloat16 scales, with 1 in place of `dim`.
    """
    exact = values.float()
    scales = (exact.abs().amax(dim, keepdim=True) / LARGEST).bfloat16()
    # A stretch of zeros has scale 0, and stays 0.
    steps = exact / scales.float().clamp_min(torch.finfo(torch.float32).tiny)
    return steps.round_().clamp_(-LARGEST, LARGEST).to(torch.int8), scales


def dequantize(numbers: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The values that whole numbers and their scales stand for, computed in float32."""
    return (numbers.float() * scales.float()).to(dtype)
