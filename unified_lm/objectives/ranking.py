"""Ranking metrics from scores: nDCG and recall.

Equal scores rank in the order of the documents (a stable sort), so that a metric never depends on a sort's whim. Note
that a constant scorer therefore profits where the relevant document comes first.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from unified_lm.core.errors import DataError


def ndcg_at_k(scores: torch.Tensor, relevant: Sequence[Collection[int]], k: int) -> float:
    """Mean normalized discounted cumulative gain (Järvelin and Kekäläinen, 2002) with binary relevance, as BEIR reports it.

    ``DCG = sum over the first k ranks r, from 1, of relevance_r / log2(r + 1)``, divided by that of the ideal order.

    Args:
        scores: `[Q, C]`, higher is better.
        relevant: per query the columns that answer it, at least one.
        k: ranks looked at, at least 1.

    Returns:
        The mean over queries, in [0, 1].

    Raises:
        DataError: a query without a relevant document, or lengths that differ.
    """
    return float(ndcg_per_query(scores, relevant, k).mean())


def ndcg_per_query(scores: torch.Tensor, relevant: Sequence[Collection[int]], k: int) -> torch.Tensor:
    """What `ndcg_at_k` is the mean of: float64 `[Q]`."""
    hits_QK, counts_Q = _hits(scores, relevant, k)
    discount_K = 1.0 / torch.arange(2, hits_QK.shape[1] + 2, dtype=torch.float64, device=scores.device).log2()
    ideal = torch.cat([discount_K.new_zeros(1), discount_K.cumsum(0)])
    best_Q = ideal[counts_Q.clamp(max=hits_QK.shape[1])]
    return (hits_QK * discount_K).sum(1) / best_Q


def recall_at_k(scores: torch.Tensor, relevant: Sequence[Collection[int]], k: int) -> float:
    """Mean share of a query's relevant documents among the first k; arguments as in `ndcg_at_k`."""
    return float(recall_per_query(scores, relevant, k).mean())


def recall_per_query(scores: torch.Tensor, relevant: Sequence[Collection[int]], k: int) -> torch.Tensor:
    """What `recall_at_k` is the mean of: float64 `[Q]`."""
    hits_QK, counts_Q = _hits(scores, relevant, k)
    return hits_QK.sum(1) / counts_Q


def _hits(scores: torch.Tensor, relevant: Sequence[Collection[int]], k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Relevance of the first k ranks, float64 `[Q, min(k, C)]`, and each query's number of relevant documents, int64 `[Q]`."""
    assert k >= 1
    if len(relevant) != len(scores) or not len(scores):
        raise DataError(
            f"ranking: got scores of {len(scores)} queries and answers to {len(relevant)}; expected as many, above 0."
        )
    empty = [query for query, answers in enumerate(relevant) if not answers]
    if empty:
        raise DataError(f"ranking: query {empty[0]} has no relevant document ({len(empty)} such queries); remove them first.")
    answers_QC = torch.zeros(scores.shape, dtype=torch.bool)
    for query, answers in enumerate(relevant):
        answers_QC[query, list(answers)] = True
    order_QK = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
    hits_QK = answers_QC.to(scores.device).gather(1, order_QK)
    return hits_QK.to(torch.float64), answers_QC.sum(1).to(scores.device)
