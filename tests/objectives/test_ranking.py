"""Ranking metrics by hand."""

import math

import pytest
import torch

from unified_lm.core.errors import DataError
from unified_lm.objectives.ranking import ndcg_at_k, recall_at_k

SCORES = torch.tensor([[0.9, 0.1, 0.5, 0.3], [0.2, 0.8, 0.4, 0.6]])
RELEVANT = [{2}, {1, 2}]  # ranks 2; 1 and 3


def test_ndcg():
    first = (1 / math.log2(3)) / 1
    second = (1 + 1 / math.log2(4)) / (1 + 1 / math.log2(3))
    assert ndcg_at_k(SCORES, RELEVANT, 10) == pytest.approx((first + second) / 2)
    assert ndcg_at_k(SCORES, RELEVANT, 1) == pytest.approx(0.5)
    assert ndcg_at_k(SCORES, [{0}, {1, 3}], 10) == pytest.approx(1.0)


def test_ideal_gain_is_limited_by_k():
    assert ndcg_at_k(SCORES[1:], [{0, 1, 2, 3}], 2) == pytest.approx(1.0)


def test_recall():
    assert recall_at_k(SCORES, RELEVANT, 1) == pytest.approx((0 + 0.5) / 2)
    assert recall_at_k(SCORES, RELEVANT, 3) == pytest.approx(1.0)


def test_ties_rank_in_document_order():
    flat = torch.zeros(1, 5)
    assert [ndcg_at_k(flat, [{c}], 5) for c in range(5)] == pytest.approx([1 / math.log2(rank + 1) for rank in range(1, 6)])


def test_bad_input():
    with pytest.raises(DataError, match="query 1 has no relevant document"):
        ndcg_at_k(SCORES, [{0}, set()], 10)
    with pytest.raises(DataError, match="scores of 2 queries and answers to 1"):
        recall_at_k(SCORES, [{0}], 1)
