"""Exact nearest neighbors against a plain sort."""

import numpy as np
import pytest
import torch

from unified_lm.mining import nearest as module
from unified_lm.mining.nearest import nearest


def unit(*shape: int, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


@pytest.mark.parametrize("piece", [7, 50, 1000])
@pytest.mark.parametrize("split", [None, 13])
def test_agrees_with_a_sort(piece: int, split: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DOCUMENTS_PER_PIECE", piece)
    queries, documents = unit(9, 8), unit(101, 8, seed=1)
    excluded = [np.array([0, 6, 7, 100])[: i % 5] for i in range(9)]
    pieces = documents if split is None else [documents[i : i + split] for i in range(0, 101, split)]
    found, scores = nearest(queries, pieces, 10, excluded=excluded)
    expected = queries @ documents.T
    for row, left_out in enumerate(excluded):
        expected[row, left_out] = -np.inf
    order = np.argsort(-expected, axis=1, kind="stable")[:, :10]
    np.testing.assert_array_equal(found, order)
    np.testing.assert_allclose(scores, np.take_along_axis(expected, order, 1), atol=1e-6)


def test_equal_scores_keep_the_order_of_indices_and_few_documents_end_early() -> None:
    found, scores = nearest(unit(1, 4), np.repeat(unit(1, 4, seed=2), 3, axis=0), 5, excluded=[np.array([1])])
    assert found[0, :2].tolist() == [0, 2]
    assert np.isfinite(scores[0]).tolist() == [True, True, False]


def test_precision_is_restored() -> None:
    torch.set_float32_matmul_precision("medium")
    try:
        nearest(unit(1, 4), unit(3, 4), 1)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
