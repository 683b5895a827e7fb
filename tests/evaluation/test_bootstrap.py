"""Bootstrap intervals: coverage, pairing, and what they refuse."""

import numpy as np
import pytest
from scipy import stats

from unified_lm.core.errors import ConfigError
from unified_lm.evaluation.bootstrap import bootstrap_draws, bootstrap_interval, percentile_interval


def _mean(sample: np.ndarray) -> float:
    return float(sample.mean())


def test_near_the_normal_interval_of_a_mean() -> None:
    sample = np.random.default_rng(0).normal(3.0, 2.0, 400)
    interval = bootstrap_interval(_mean, sample, num_resamples=2000)
    half = 1.96 * sample.std(ddof=1) / 20
    assert interval.value == pytest.approx(sample.mean())
    assert interval.low == pytest.approx(sample.mean() - half, abs=0.03)
    assert interval.high == pytest.approx(sample.mean() + half, abs=0.03)
    assert str(interval) == f"{interval.value:.4f} [{interval.low:.4f}, {interval.high:.4f}]"


def test_agrees_with_scipy_on_a_correlation() -> None:
    generator = np.random.default_rng(1)
    left = generator.normal(size=150)
    right = left + generator.normal(size=150)

    def spearman(a: np.ndarray, b: np.ndarray) -> float:
        return float(stats.spearmanr(a, b).statistic)

    ours = bootstrap_interval(spearman, left, right, num_resamples=1000)
    theirs = stats.bootstrap(
        (left, right), spearman, paired=True, vectorized=False, n_resamples=1000, method="percentile", rng=0
    ).confidence_interval
    assert ours.low == pytest.approx(theirs.low, abs=0.02)
    assert ours.high == pytest.approx(theirs.high, abs=0.02)


def test_coverage() -> None:
    """Of 200 samples, about 95 % of the intervals hold the true mean."""
    generator = np.random.default_rng(2)
    held = 0
    for seed in range(200):
        interval = bootstrap_interval(_mean, generator.normal(size=60), num_resamples=300, seed=seed)
        held += interval.low <= 0 <= interval.high
    assert 178 <= held <= 198


def test_pairing_narrows_a_difference() -> None:
    generator = np.random.default_rng(3)
    difficulty = generator.normal(size=200)
    first, second = difficulty + 0.1, difficulty + generator.normal(scale=0.05, size=200)
    paired = bootstrap_interval(lambda a, b: float(a.mean() - b.mean()), first, second)
    alone = bootstrap_interval(_mean, first)
    assert paired.low > 0
    assert paired.high - paired.low < (alone.high - alone.low) / 5


def test_draws_of_two_models_may_be_subtracted() -> None:
    """They are to the bit those of the difference, over the same resamples; those of another seed are not."""
    first, second = np.random.default_rng(0).normal(size=(2, 40))
    (value, draws), (other, others) = bootstrap_draws(_mean, first), bootstrap_draws(_mean, second)
    subtracted = percentile_interval(value - other, draws - others)
    assert subtracted == bootstrap_interval(lambda a, b: _mean(a) - _mean(b), first, second)
    assert subtracted != percentile_interval(value - other, draws - bootstrap_draws(_mean, second, seed=1)[1])


def test_deterministic_and_level() -> None:
    sample = np.arange(50.0)
    assert bootstrap_interval(_mean, sample, seed=5) == bootstrap_interval(_mean, sample, seed=5)
    assert bootstrap_interval(_mean, sample, seed=5) != bootstrap_interval(_mean, sample, seed=6)
    wide, narrow = (bootstrap_interval(_mean, sample, level=level) for level in (0.99, 0.5))
    assert wide.low < narrow.low < narrow.high < wide.high


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="at least 2 items"):
        bootstrap_interval(_mean, np.zeros(1))
    with pytest.raises(ConfigError, match=r"one length.*\[3, 4\]"):
        bootstrap_interval(lambda a, b: 0.0, np.zeros(3), np.zeros(4))
    with pytest.raises(ConfigError, match="level 2 must be in"):
        bootstrap_interval(_mean, np.zeros(3), level=2)
    with pytest.raises(ConfigError, match="the statistic is nan"):
        bootstrap_interval(lambda sample: float("nan"), np.zeros(3))
