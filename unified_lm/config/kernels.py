"""What is known of every attention kernel without importing it; the kernels themselves are in `models/attention`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class KernelFacts:
    """What a configuration must know of a kernel.

    Attributes:
        drops: whether it can drop attention weights.
        pads: whether samples become padded rows, whose padding tokens reach the feed-forward layers (and their routers).
    """

    drops: bool = True
    pads: bool = False


KERNELS: Mapping[str, KernelFacts] = {
    "auto": KernelFacts(),
    "flash": KernelFacts(),
    "flex": KernelFacts(drops=False),
    "sdpa": KernelFacts(),
    "padded": KernelFacts(pads=True),
}
"""Kernels that a recipe may choose, by name."""
