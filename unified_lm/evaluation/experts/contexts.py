"""The tokens that use each expert most, and whether they are of one kind.

The best tokens of all experts (or of other features, to compare with) are kept while texts are read: `[K, N]` for each router,
however long the texts are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from unified_lm.evaluation.experts.features import Features
from unified_lm.evaluation.experts.statistics import Places
from unified_lm.evaluation.generation.perplexity import Domain, TokenizedDocument, tokenized
from unified_lm.inference.unified import UnifiedLM

_CHUNK_BYTES = 1 << 26
"""Of the weights of all features for some tokens, which are looked at together."""


@dataclass(frozen=True, eq=False)
class Contexts:
    """The tokens that use each expert most.

    Attributes:
        weights: float32 `[G, K, N]`, descending; 0 where fewer tokens use the expert. N features of each of G groups; of a
            router's experts (i, j) is number `i * E + j`.
        places: int64 `[G, K, N, 2]`, document and place of each of these tokens, -1 where there is none.
        documents: that were read.
        read: tokens that were read.
    """

    weights: np.ndarray
    places: np.ndarray
    documents: Sequence[TokenizedDocument]
    read: int

    def tokens(self, router: int, expert: int) -> list[int]:
        """Ids of the tokens that use an expert most, the most first."""
        found = self.places[router, :, expert]
        return [int(self.documents[document].ids[place]) for document, place in found if document >= 0]


def top_contexts(
    model: UnifiedLM,
    features: Features,
    domain: Domain,
    *,
    context: int,
    num_contexts: int,
    progress: Callable[[int], None] | None = None,
) -> Contexts:
    """Read texts causally, and keep the tokens at which each feature is most active.

    Args:
        model: whose features they are.
        features: what is looked at.
        domain: the texts.
        context: tokens of a window.
        num_contexts: K, tokens that are kept of each feature.
        progress: called with the number of tokens that were read since the last call.

    Raises:
        DataError: a document without a token.
    """
    shape = (len(features.groups), num_contexts, features.size)
    weights_GKN = torch.zeros(shape, device=model.device)
    numbers_GKN = torch.full(shape, -1, device=model.device)
    places: Places = []
    size = max(1, _CHUNK_BYTES // (4 * features.size))
    for reading in features.read(domain, context):
        tokens = len(reading.places)
        for start in range(0, tokens, size):
            part = slice(start, min(start + size, tokens))
            known = torch.arange(part.start, part.stop, device=model.device)[:, None] + len(places)
            for group in range(len(features.groups)):
                active_TN = reading.of(group, part)
                best = torch.cat([weights_GKN[group], active_TN]).topk(num_contexts, dim=0)
                numbers = torch.cat([numbers_GKN[group], known.expand_as(active_TN)])
                weights_GKN[group], numbers_GKN[group] = best.values, numbers.gather(0, best.indices)
        places += reading.places
        if progress is not None:
            progress(tokens)
    numbers_GKN = numbers_GKN.masked_fill(weights_GKN == 0, -1)
    known_places = np.array([*places, (-1, -1)], np.int64)  # the last for -1
    documents = tokenized(model.prompt_encoder, domain)
    return Contexts(weights_GKN.cpu().numpy(), known_places[numbers_GKN.cpu().numpy()], documents, len(places))


def purity(tokens: Sequence[int]) -> float:
    """Share of the most frequent token id among some tokens: 1 for an expert of a single token."""
    return Counter(tokens).most_common(1)[0][1] / len(tokens) if tokens else float("nan")


def purities(contexts: Contexts) -> np.ndarray:
    """`purity` of the best tokens of each expert, float64 `[G, N]`; NaN where fewer than K tokens use it."""
    routers, num_contexts, experts = contexts.weights.shape
    ids = _ids(contexts)
    full = np.asarray((contexts.weights > 0).all(axis=1))
    found = np.full((routers, experts), np.nan)
    for router in range(routers):
        ordered = np.sort(ids[router][:, full[router]], axis=0)  # equal ids side by side
        run = longest = np.ones(ordered.shape[1], np.int64)
        for row in range(1, num_contexts):
            run = np.where(ordered[row] == ordered[row - 1], run + 1, 1)
            longest = np.maximum(longest, run)
        found[router, full[router]] = longest / num_contexts
    return found


def chance_purity(contexts: Contexts, num_draws: int = 2000, seed: int = 0) -> float:
    """Mean `purity` of as many tokens drawn from those that were read: what experts of a shuffled router have."""
    rng = np.random.default_rng(seed)
    every = np.concatenate([document.ids[document.scored] for document in contexts.documents])
    num_contexts = contexts.weights.shape[1]
    return float(np.mean([purity(rng.choice(every, num_contexts, replace=False).tolist()) for _ in range(num_draws)]))


def context_rows(
    contexts: Contexts, group: int, decode: Callable[[list[list[int]]], list[str]], window: int = 12
) -> dict[str, list[Any]]:
    """Columns of a table with a row for each place of a group, features in order, the best place first.

    Args:
        contexts: what was kept.
        group: of which features.
        decode: token ids of several texts -> the texts.
        window: tokens of context on either side.

    Returns:
        "feature", "rank", "weight", "before", "token", "after".
    """
    found = contexts.places[group]
    features, ranks = np.nonzero(found[..., 0].T >= 0)
    parts: tuple[list[list[int]], ...] = ([], [], [])
    for document, place in found[ranks, features]:
        ids = contexts.documents[document].ids
        for part, piece in zip(
            parts,
            (ids[max(0, place - window) : place], ids[place : place + 1], ids[place + 1 : place + 1 + window]),
            strict=True,
        ):
            part.append(piece.tolist())
    numbers = {
        "feature": features.tolist(),
        "rank": ranks.tolist(),
        "weight": contexts.weights[group, ranks, features].tolist(),
    }
    return numbers | dict(zip(("before", "token", "after"), map(decode, parts), strict=True))


def _ids(contexts: Contexts) -> np.ndarray:
    """Token ids `[G, K, N]` of the places; those that are none have any."""
    lengths = np.array([len(document.ids) for document in contexts.documents])
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    every = np.concatenate([document.ids for document in contexts.documents])
    document, place = contexts.places[..., 0], contexts.places[..., 1]
    return every[np.where(document >= 0, starts[document] + place, 0)]
