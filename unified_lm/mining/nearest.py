"""Exact nearest neighbors by cosine similarity, in pieces that fit in memory, without an index library.

All arithmetic is float32. A thousand queries against a million documents of 4,096 dimensions take 8 TFLOP.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

DOCUMENTS_PER_PIECE = 32768
"""Number of documents compared with a block of queries at once."""


def nearest(
    queries: np.ndarray,
    documents: np.ndarray | Sequence[np.ndarray],
    k: int,
    *,
    excluded: Sequence[np.ndarray] | None = None,
    device: str | torch.device = "cpu",
) -> tuple[np.ndarray, np.ndarray]:
    """Find the most similar documents of every query by exact search.

    Args:
        queries: float32 `[Q, D]`, of length 1.
        documents: float32 `[N, D]`, of length 1, or its pieces in order (memory-maps are read piece by piece).
        k: maximum number of documents per query.
        excluded: per query, the indices of the documents to ignore (int64, ascending).
        device: device of the matrix products.

    Returns:
        Indices int64 `[Q, k']` and similarities float32 `[Q, k']`, most similar first, ties by index. If fewer than k'
        documents remain after exclusion, the rest have similarity -inf.
    """
    asked = torch.from_numpy(np.ascontiguousarray(queries, np.float32)).to(device)
    best_scores = torch.empty(len(queries), 0, device=device)
    best = torch.empty(len(queries), 0, dtype=torch.int64, device=device)
    start = 0
    with full_float32(), torch.inference_mode():
        for piece in _pieces(documents):
            scores = asked @ torch.from_numpy(piece.astype(np.float32, copy=False)).to(device).T
            stop = start + len(piece)
            if excluded is not None:
                _exclude(scores, excluded, start, stop)
            best_scores, best = _merge(best_scores, best, scores, start, k)
            start = stop
    return best.cpu().numpy(), best_scores.cpu().numpy()


def _pieces(documents: np.ndarray | Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    """Split or join arrays into pieces of about `DOCUMENTS_PER_PIECE` rows, in order."""
    gathered: list[np.ndarray] = []
    for whole in [documents] if isinstance(documents, np.ndarray) else documents:
        for first in range(0, len(whole), DOCUMENTS_PER_PIECE):
            gathered.append(whole[first : first + DOCUMENTS_PER_PIECE])
            if sum(map(len, gathered)) >= DOCUMENTS_PER_PIECE:
                yield np.concatenate(gathered)
                gathered = []
    if gathered:
        yield np.concatenate(gathered)


def _exclude(scores: torch.Tensor, excluded: Sequence[np.ndarray], start: int, stop: int) -> None:
    for row, documents in enumerate(excluded):
        inside = documents[(documents >= start) & (documents < stop)] - start
        if len(inside):
            scores[row, torch.from_numpy(inside).to(scores.device)] = -torch.inf


def _merge(
    best_scores: torch.Tensor, best: torch.Tensor, scores: torch.Tensor, start: int, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge the best k so far with a new piece; a stable sort keeps ties in the order of their indices."""
    # topk does not promise an order of ties; sorting its positions by index first makes the stable sort below decide them.
    top, positions = scores.topk(min(k, scores.shape[1]), dim=1)
    order = positions.argsort(dim=1)
    all_scores = torch.cat([best_scores, top.gather(1, order)], dim=1)
    indices = torch.cat([best, positions.gather(1, order) + start], dim=1)
    kept = all_scores.argsort(dim=1, descending=True, stable=True)[:, :k]
    return all_scores.gather(1, kept), indices.gather(1, kept)


@contextmanager
def full_float32() -> Iterator[None]:
    """Multiply matrices in float32, not in TensorFloat32, whatever the current setting."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
