"""Shapes of the learning rate after its warmup, each a pure function of the progress."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """One shape.

    Attributes:
        shape: progress from 0 (end of the warmup) to 1 (end of the horizon) -> how much of the way from the final rate to the
            peak is left.
        decays: whether it goes down at all, so that a horizon and a final rate mean something.
    """

    shape: Callable[[float], float]
    decays: bool = True


def _cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


SCHEDULES: Mapping[str, Schedule] = {
    "linear": Schedule(lambda progress: 1.0 - progress),
    "cosine": Schedule(_cosine),
    "constant": Schedule(lambda progress: 1.0, decays=False),
}
"""Schedules by name."""
