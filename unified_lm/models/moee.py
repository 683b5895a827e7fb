"""Routing weights as embeddings, alone and beside hidden states (MOEE, Li and Zhou 2024, arXiv:2410.10814).

What a mixture of experts does with a text is a vector: per layer the router's probabilities of the experts (RW), which costs
nothing beside the hidden states (HS) of the same forward. Four vectors are made of the two:

    hs            pooled hidden states
    rw            pooled routing probabilities of all layers, layer by layer
    moee_concat   [hs ; rw]
    moee_sum      [hs / |hs| ; sqrt(alpha) rw / |rw|], whose dot products are cos(hs) + alpha cos(rw)

The paper's sum adds similarities; as a vector it also works in vector engines, k-means and classifiers. Where the model has a
standardizer, it comes before all of these, and is the same for every text. The published code instead standardizes by the batch
that is encoded, so that a vector depends on its neighbors; `standardize_batch` is that, for comparisons.

Legend: `batch/__init__.py`; P pooled vectors of a pack, D dimensions of a hidden state, F experts of all layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from unified_lm.batch import Pack
from unified_lm.config.objectives import EMBEDDING_METHODS as METHODS
from unified_lm.core.errors import ConfigError, DataError, did_you_mean
from unified_lm.models.pooling import Pooling, pool
from unified_lm.models.routing import LayerRouting, Routers
from unified_lm.models.standardizer import Standardizer


def check_method(method: str, alpha: float) -> None:
    """Raise ConfigError for a method that does not exist, or a weight below 0."""
    if method not in METHODS:
        raise ConfigError(f"unknown embedding method '{method}'.{did_you_mean(method, METHODS)}")
    if not 0 <= alpha < float("inf"):
        raise ConfigError(f"alpha: got {alpha}, expected a number of at least 0; it weighs the routing part of moee_sum.")


class RoutedPooling:
    """Pools hidden states and, while the same forward runs, what the routers do with the same tokens.

    Args:
        routers: of the model.
        method: how both are pooled.
        projection: linear head on the pooled hidden states, or None.
        states: whether hidden states are part of the vector; else it is the routing alone.
        logits: take raw logits instead of probabilities, as the published code does for OLMoE and Qwen, where its paper says
            softmax.
    """

    def __init__(
        self,
        routers: Routers,
        method: Pooling,
        projection: nn.Module | None = None,
        *,
        states: bool = True,
        logits: bool = False,
    ) -> None:
        self._routers = routers
        self._method = method
        self._projection = projection
        self._states = states
        self._logits = logits
        self._layers: dict[int, torch.Tensor] = {}

    @contextmanager
    def listening(self, pack: Pack) -> Iterator[None]:
        """Context of the forward of a pack."""
        spans, last = pack.pool_spans, Pooling.LAST_TOKEN
        rows = {last: spans[:, 1] - 1, Pooling.CLS: spans[:, 0]}.get(self._method)
        self._layers = {}

        def read(number: int, routing: LayerRouting) -> None:
            told = routing if rows is None else routing.rows(rows)
            values = told.logits.float().flatten(1) if self._logits else told.probabilities
            self._layers[number] = pool(values, spans, self._method, pack.num_pooled) if rows is None else values

        with self._routers.reading(read):
            yield

    def __call__(self, hidden: torch.Tensor, spans: torch.Tensor) -> torch.Tensor:
        """The vectors of the pack that was listened to, float32 `[P, D + F]`, or `[P, F]` without states.

        Args:
            hidden: `[T, D]`.
            spans: int64 `[P, 2]`, as `pack.pool_spans`.
        """
        routed = torch.cat([self._layers[number] for number in range(len(self._routers.names))], dim=1)
        if not self._states:
            return routed
        pooled = pool(hidden, spans, self._method)
        return torch.cat([pooled if self._projection is None else self._projection(pooled), routed], dim=1)


class WeightedBlocks(nn.Module):
    """`[a / |a| ; sqrt(alpha) b / |b|]`: vectors whose dot product is cos(a, a') + alpha cos(b, b').

    Args:
        size: dimensions of the first block.
        alpha: weight of the second one, at least 0.
    """

    def __init__(self, size: int, alpha: float) -> None:
        super().__init__()
        self.size = size
        self.alpha = alpha

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        """Map `[N, size + ...]` to the same shape."""
        first, second = vectors[:, : self.size], vectors[:, self.size :]
        return torch.cat([F.normalize(first, dim=-1), self.alpha**0.5 * F.normalize(second, dim=-1)], dim=1)


def standardize_batch(vectors: torch.Tensor, eps: float = 1e-8) -> torch.Tensor:
    """Standardize every dimension over the vectors that are given, as the published code does with each batch.

    Args:
        vectors: `[N, D]`, N at least 2.
        eps: added to the standard deviation.

    Raises:
        DataError: a single vector, which has no deviation.
    """
    if len(vectors) < 2:
        raise DataError("one vector cannot be standardized by its batch. Encode several, or fit a standardizer.")
    return (vectors - vectors.mean(0)) / (vectors.std(0, unbiased=True) + eps)


def moee_head(method: str, alpha: float, sizes: tuple[int, int], standardizer: Standardizer | None) -> nn.Module | None:
    """What is applied to the vectors of a `RoutedPooling`: standardization, then the weights of `moee_sum`.

    Args:
        method: one of `METHODS` but "hs".
        alpha: see `WeightedBlocks`.
        sizes: D and F.
        standardizer: of all D + F dimensions, or None.

    Raises:
        ConfigError: the standardizer knows nothing of routing.
    """
    parts: list[nn.Module] = []
    if standardizer is not None:
        if standardizer.dim != sum(sizes):
            raise ConfigError(
                f"the standardizer has {standardizer.dim} dimensions; method {method} needs one of {sizes[0]} + {sizes[1]} "
                "(hidden states and routing). Fit it on this model with its method, or take the standardizer off."
            )
        parts.append(standardizer.part(sizes[0] if method == "rw" else 0, sum(sizes)))
    if method == "moee_sum":
        parts.append(WeightedBlocks(sizes[0], alpha))
    return nn.Sequential(*parts) if parts else None
