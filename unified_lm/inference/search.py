"""Exact search: cosine similarities and the best documents of each query."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from unified_lm.core.errors import ConfigError

Vectors = np.ndarray | torch.Tensor


@dataclass(frozen=True)
class Hit:
    """One result of a search.

    Attributes:
        index: of the document in the list of documents searched.
        score: cosine similarity with the query.
    """

    index: int
    score: float


def cosine_similarity(left: Vectors, right: Vectors) -> np.ndarray:
    """Cosine similarities, float32 `[N, M]`, of vectors `[N, D]` (or `[D]`) and `[M, D]` (or `[D]`)."""
    a, b = (F.normalize(torch.atleast_2d(torch.as_tensor(side)).float(), dim=-1) for side in (left, right))
    return (a @ b.T).numpy()


def best_hits(scores: np.ndarray, k: int) -> list[list[Hit]]:
    """The best documents of each query, best first; of equal scores the first document comes first.

    Args:
        scores: `[N, M]`, one row per query.
        k: hits per query, at most; from 0.

    Raises:
        ConfigError: `k` is negative.
    """
    if k < 0:
        raise ConfigError(f"k: got {k}, expected 0 or more hits.")  # a slice would leave out the last -k documents
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return [[Hit(int(index), float(row[index])) for index in order] for row, order in zip(scores, best, strict=True)]
