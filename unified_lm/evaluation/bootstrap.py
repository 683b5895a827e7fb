"""Confidence intervals of scores by the bootstrap: how far a number would move with other test items."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from unified_lm.core.errors import ConfigError


@dataclass(frozen=True)
class Interval:
    """A score with its confidence interval.

    Attributes:
        value: the statistic on the items as they are.
        low: lower end.
        high: upper end.
        level: coverage aimed at, in (0, 1).
    """

    value: float
    low: float
    high: float
    level: float

    def __str__(self) -> str:
        return f"{self.value:.4f} [{self.low:.4f}, {self.high:.4f}]"


def bootstrap_interval(
    statistic: Callable[..., float],
    *samples: np.ndarray,
    level: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap (Efron and Tibshirani 1993, chapter 13): items are drawn with replacement, together across samples.

    For the difference of two models on the same items pass both models' scores and a statistic that subtracts: the drawing
    is paired, so what the items have in common cancels.

    Args:
        statistic: called with one array per sample, each `[N]` or `[N, ...]`, returns the score.
        samples: arrays that agree in their first dimension, the items (>= 2).
        level: coverage, in (0, 1).
        num_resamples: draws (>= 100).
        seed: of the drawing.

    Returns:
        The score with its interval. Draws on which the statistic is not defined (NaN, a constant sample) are left out.

    Raises:
        ConfigError: fewer than two items, unequal lengths, an impossible level or number of draws, or a statistic that is
            not finite on the items themselves or on half of the draws.
    """
    lengths = {len(sample) for sample in samples}
    if len(lengths) != 1 or min(lengths, default=0) < 2:
        raise ConfigError(f"a bootstrap needs samples of one length, at least 2 items; got {sorted(lengths) or 'none'}.")
    if not 0 < level < 1 or num_resamples < 100:
        raise ConfigError(f"level {level} must lie in (0, 1) and num_resamples {num_resamples} must be at least 100.")
    arrays = [np.asarray(sample) for sample in samples]
    value = float(statistic(*arrays))
    generator = np.random.default_rng(seed)
    size = lengths.pop()
    draws = np.empty(num_resamples)
    for index in range(num_resamples):
        chosen = generator.integers(0, size, size)
        draws[index] = statistic(*(array[chosen] for array in arrays))
    kept = draws[np.isfinite(draws)]
    if not np.isfinite(value) or len(kept) < num_resamples / 2:
        raise ConfigError(f"the statistic is {value} on the items and finite on {len(kept)} of {num_resamples} draws.")
    low, high = np.quantile(kept, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high), level)
