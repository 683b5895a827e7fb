"""Bootstrap confidence intervals of scores: how much a score varies with the choice of test items."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from unified_lm.core.errors import ConfigError


@dataclass(frozen=True)
class Interval:
    """A score with its confidence interval.

    Attributes:
        value: the statistic on the original items.
        low: lower end of the interval.
        high: upper end of the interval.
        level: nominal coverage, in (0, 1).
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
    """Percentile bootstrap (Efron and Tibshirani 1993, chapter 13): items are resampled jointly across samples.

    For the difference between two models on the same items, pass both models' scores and a statistic that subtracts: the
    resampling is paired, so the variation that the models have in common cancels.

    Args:
        statistic: called with one array per sample, each `[N]` or `[N, ...]`, returns the score.
        samples: arrays with the same first dimension, the items (>= 2).
        level: nominal coverage, in (0, 1).
        num_resamples: number of resamples (>= 100).
        seed: seed of the resampling.

    Returns:
        The score with its interval. Resamples on which the statistic is undefined (NaN, for a constant sample) are excluded.

    Raises:
        ConfigError: fewer than two items, unequal lengths, an invalid level or number of resamples, or a statistic that is
            not finite on the original items or on more than half of the resamples.
    """
    value, draws = bootstrap_draws(statistic, *samples, num_resamples=num_resamples, seed=seed)
    return percentile_interval(value, draws, level)


def bootstrap_draws(
    statistic: Callable[..., float], *samples: np.ndarray, num_resamples: int = 1000, seed: int = 0
) -> tuple[float, np.ndarray]:
    """The statistic on the items, and `[num_resamples]` on resamples of them; NaN where it is undefined.

    Which items a resample has depends on their number and the seed alone: draws of two models on the same items may be
    subtracted, and are then those of the difference. Arguments and errors as of `bootstrap_interval`.
    """
    lengths = {len(sample) for sample in samples}
    if len(lengths) != 1 or min(lengths, default=0) < 2:
        raise ConfigError(f"a bootstrap needs samples of one length, at least 2 items; got {sorted(lengths) or 'none'}.")
    if num_resamples < 100:
        raise ConfigError(f"num_resamples {num_resamples} must be at least 100.")
    arrays = [np.asarray(sample) for sample in samples]
    value = float(statistic(*arrays))
    generator = np.random.default_rng(seed)
    size = lengths.pop()
    draws = np.empty(num_resamples)
    for index in range(num_resamples):
        # One draw of indices serves all samples: this is what pairs them.
        chosen = generator.integers(0, size, size)
        draws[index] = statistic(*(array[chosen] for array in arrays))
    return value, draws


def percentile_interval(value: float, draws: np.ndarray, level: float = 0.95) -> Interval:
    """The interval of a score from its draws.

    Raises:
        ConfigError: an invalid level, or a value or more than half of the draws that are not finite.
    """
    if not 0 < level < 1:
        raise ConfigError(f"level {level} must be in (0, 1).")
    # A correlation is undefined on a resample of one repeated item; such resamples say nothing about the spread of the score.
    kept = draws[np.isfinite(draws)]
    if not np.isfinite(value) or len(kept) < len(draws) / 2:
        raise ConfigError(f"the statistic is {value} on the items and finite on {len(kept)} of {len(draws)} draws.")
    low, high = np.quantile(kept, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high), level)
