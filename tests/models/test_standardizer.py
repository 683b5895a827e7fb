"""Per-dimension standardization: the statistics, their limits, and the arithmetic."""

import numpy as np
import pytest
import torch

from unified_lm.core.errors import DataError
from unified_lm.models.standardizer import RELATIVE_EPS, RunningMoments, Standardizer, embedding_head


def _moments(*blocks: np.ndarray) -> RunningMoments:
    moments = RunningMoments()
    for block in blocks:
        moments.update(block)
    return moments


@pytest.fixture
def vectors() -> np.ndarray:
    """A dimension like SmolLM2's 17th among them: a mean 1,000 deviations away."""
    rows = np.random.default_rng(0).normal(0, 1, (500, 12)).astype(np.float32)
    rows[:, 3] = rows[:, 3] * 0.02 + 20
    return rows


def test_moments_do_not_depend_on_order_or_blocks(vectors: np.ndarray) -> None:
    expected = vectors.astype(np.float64)
    shuffled = vectors[np.random.default_rng(1).permutation(500)]
    for moments in (
        _moments(vectors),
        _moments(*np.array_split(vectors, 7)),
        _moments(*(row[None] for row in vectors)),
        _moments(shuffled[:1], shuffled[1:1], shuffled[1:]),
    ):
        assert moments.count == 500
        np.testing.assert_allclose(moments.mean, expected.mean(0), rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(moments.variance, expected.var(0), rtol=1e-9)
    naive = (vectors**2).mean(0) - vectors.mean(0) ** 2  # float32, and the difference of large numbers
    assert abs(naive[3] / expected.var(0)[3] - 1) > 1e-3, "this data does show the error that a naive sum makes"


def test_it_standardizes(vectors: np.ndarray) -> None:
    standardizer = Standardizer.fit(_moments(vectors))
    result = standardizer(torch.from_numpy(vectors)).numpy()
    np.testing.assert_allclose(result.mean(0), 0, atol=1e-3)
    np.testing.assert_allclose(result.std(0), 1, atol=1e-3)
    half = standardizer(torch.from_numpy(vectors).bfloat16())
    assert half.dtype == torch.float32
    one = standardizer(torch.from_numpy(vectors[:1])).numpy()
    np.testing.assert_array_equal(one, result[:1], "a vector does not depend on its neighbors")


def test_a_constant_dimension_stays_small(vectors: np.ndarray) -> None:
    vectors[:, 5] = 4
    standardizer = Standardizer.fit(_moments(vectors))
    assert float(standardizer.scale[5]) == pytest.approx(1 / (RELATIVE_EPS * np.median(vectors.std(0))), rel=1e-3)
    assert np.abs(standardizer(torch.from_numpy(vectors)).numpy()[:, 5]).max() < 1e-2


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda rows: rows[:99], "has 99 texts; statistics need at least 100"),
        (lambda rows: np.repeat(rows[:1], 200, axis=0), "zero variance over the 200 texts"),
    ],
)
def test_what_cannot_be_fitted(vectors: np.ndarray, change, expected: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(DataError, match=expected):
        Standardizer.fit(_moments(change(vectors)))


def test_bad_vectors(vectors: np.ndarray) -> None:
    moments = _moments(vectors)
    with pytest.raises(DataError, match="5 dimensions after vectors of 12"):
        moments.update(vectors[:, :5])
    vectors[2, 2] = np.nan
    with pytest.raises(DataError, match="not finite"):
        moments.update(vectors)


def test_the_head_applies_its_parts_in_order(vectors: np.ndarray) -> None:
    linear = torch.nn.Linear(12, 4)
    standardizer = Standardizer(torch.full((4,), 2.0), torch.ones(4))
    both = embedding_head(linear, standardizer)
    assert both is not None
    x = torch.from_numpy(vectors[:3])
    torch.testing.assert_close(both(x), linear(x) * 2 + 1)
    assert embedding_head(None, None) is None
