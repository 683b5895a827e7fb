"""Keys and values in 8 bits: whole numbers with a scale for every stretch of 64.

Keys share a scale along tokens (per channel: some channels of keys are many times larger than the others, and would take the
precision of the rest), values along the channels of a token (KIVI, arXiv:2402.02750). Measured on the embedded model
(SmolLM2-135M), 12 texts of WikiText-2 of 512 tokens, read causally | bidirectionally, and the 128 tokens that follow each of
them: relative error of keys and of values, change of the loss in nats a token against float32 (its standard error is 0.0004
for 8 bits, 0.0001 for bfloat16), and divergence of the predictions from those read from float32 (10^-5 nats):

    form                                       keys    values   loss               divergence
    bfloat16                                   0.0016  0.0017   -0.0000 | -0.0000   0.6 |  1.0
    float16                                    0.0002  0.0002   -0.0000 | -0.0000   0.0 |  0.0
    8 bits, as here                            0.0041  0.0072   -0.0002 | -0.0000   7.7 |  8.7
      keys before rotation (arXiv:2401.18079)  0.0040  0.0072   -0.0003 | -0.0005   7.8 |  8.5
      keys per token                           0.0108  0.0072   +0.0002 | +0.0000   7.5 | 10.1
      only keys, a scale for the whole text    0.0049  -        +0.0010 | -0.0004  10.2 | 12.2
      only keys, per 64 tokens                 0.0041  -        -0.0002 | -0.0001   6.8 |  8.1
      only values, per token                   -       0.0072   -0.0000 | +0.0001   0.9 |  0.6
      only values, per channel                 -       0.0077   +0.0012 | -0.0003  12.4 |  0.9

So the loss of no form can be told from that of float32 by this measurement, and keys need not be stored before rotation. Per
channel, keys are 2.6 times closer than per token, and a model with one large channel does not lose the others.
`benchmarks/stored_key_values.py` repeats it.
"""

from __future__ import annotations

import torch

GROUP = 64
"""Neighbors that share a scale."""

_LARGEST = 127
"""Whole numbers go from -127 to 127."""


def quantize(values: torch.Tensor, dim: int, group: int = GROUP) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole numbers and their scales.

    Args:
        values: of any floating dtype and shape.
        dim: the dimension whose neighbors share a scale, negative.
        group: so many of them; the last group may be smaller.

    Returns:
        int8, in the shape of `values`, and bfloat16 scales, with the number of groups in place of `dim`.
    """
    parts = values.float().split(group, dim)
    scales = torch.cat([part.abs().amax(dim, keepdim=True) for part in parts], dim).div_(_LARGEST).bfloat16()
    # A group of zeros has scale 0, and stays 0.
    steps = values.float() / _spread(scales, dim, group, values.shape[dim]).clamp_min(torch.finfo(torch.float32).tiny)
    return steps.round_().clamp_(-_LARGEST, _LARGEST).to(torch.int8), scales


def dequantize(
    numbers: torch.Tensor, scales: torch.Tensor, dim: int, dtype: torch.dtype = torch.float32, group: int = GROUP
) -> torch.Tensor:
    """The values that whole numbers and their scales stand for, computed in float32."""
    return numbers.float().mul_(_spread(scales, dim, group, numbers.shape[dim])).to(dtype)


def _spread(scales: torch.Tensor, dim: int, group: int, size: int) -> torch.Tensor:
    if scales.shape[dim] == 1:
        return scales.float()
    return scales.float().repeat_interleave(group, dim).narrow(dim, 0, size)
