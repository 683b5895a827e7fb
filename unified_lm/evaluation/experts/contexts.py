"""The tokens that use each expert most, and whether they are of one kind.

An expert's weight for a token is the sum over heads of the product of its keys' gates. The best tokens of all experts are kept
while texts are read: `[K, E * E]` for each router, however long the texts are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from unified_lm.evaluation.experts.statistics import gates_of
from unified_lm.evaluation.generation.perplexity import Domain, TokenizedDocument, tokenized
from unified_lm.inference.unified import UnifiedLM

_CHUNK_BYTES = 1 << 26
"""Of the weights of all experts for some tokens, which are looked at together."""


@dataclass(frozen=True, eq=False)
class Contexts:
    """The tokens that use each expert most.

    Attributes:
        weights: float32 `[G, K, N]`, descending; 0 where fewer tokens use the expert. N experts of a router, `i * E + j`.
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
    model: UnifiedLM, domain: Domain, *, context: int, num_contexts: int, progress: Callable[[int], None] | None = None
) -> Contexts:
    """Read texts causally, and keep the tokens that use each expert most.

    Args:
        model: a MONET model.
        domain: the texts.
        context: tokens of a window.
        num_contexts: K, tokens that are kept of each expert.
        progress: called with the number of tokens that were read since the last call.

    Raises:
        ModelError: the model is none.
        DataError: a document without a token.
    """
    weights_GKN: torch.Tensor | None = None
    numbers_GKN: torch.Tensor | None = None
    places: list[tuple[int, int]] = []
    for gates_TGSHE, where in gates_of(model, domain, context):
        tokens, routers, _, _, keys = gates_TGSHE.shape
        if weights_GKN is None or numbers_GKN is None:
            weights_GKN = torch.zeros(routers, num_contexts, keys**2, device=gates_TGSHE.device)
            numbers_GKN = torch.full(weights_GKN.shape, -1, device=gates_TGSHE.device)
        size = max(1, _CHUNK_BYTES // (4 * keys**2))
        for start in range(0, tokens, size):
            part = gates_TGSHE[start : start + size]
            known = torch.arange(len(part), device=part.device)[:, None] + len(places) + start
            for router in range(routers):
                first_THE, second_THE = part[:, router].unbind(1)
                pairs_TN = torch.bmm(first_THE.transpose(1, 2), second_THE).flatten(1)
                best = torch.cat([weights_GKN[router], pairs_TN]).topk(num_contexts, dim=0)
                numbers = torch.cat([numbers_GKN[router], known.expand_as(pairs_TN)])
                weights_GKN[router], numbers_GKN[router] = best.values, numbers.gather(0, best.indices)
        places += where
        if progress is not None:
            progress(tokens)
    assert weights_GKN is not None, "a domain has documents, and a document a token"
    assert numbers_GKN is not None
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


def context_rows(contexts: Contexts, decode: Callable[[Sequence[int]], str], window: int = 12) -> dict[str, list[object]]:
    """Columns of a table with a row for each place, experts in order, the best place first.

    Args:
        contexts: what was kept.
        decode: token ids -> text.
        window: tokens of context on either side.

    Returns:
        "router", "i", "j", "rank", "weight", "before", "token", "after".
    """
    routers, num_contexts, experts = contexts.weights.shape
    keys = round(experts**0.5)
    columns: dict[str, list[object]] = {name: [] for name in ("router", "i", "j", "rank", "weight", "before", "token", "after")}
    for router, expert, rank in np.ndindex(routers, experts, num_contexts):
        document, place = map(int, contexts.places[router, rank, expert])
        if document < 0:
            continue
        ids = contexts.documents[document].ids
        around = (ids[max(0, place - window) : place], ids[place : place + 1], ids[place + 1 : place + 1 + window])
        values = (router, expert // keys, expert % keys, rank, float(contexts.weights[router, rank, expert]))
        for name, value in zip(columns, (*values, *(decode(part.tolist()) for part in around)), strict=True):
            columns[name].append(value)
    return columns


def _ids(contexts: Contexts) -> np.ndarray:
    """Token ids `[G, K, N]` of the places; those that are none have any."""
    lengths = np.array([len(document.ids) for document in contexts.documents])
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    every = np.concatenate([document.ids for document in contexts.documents])
    document, place = contexts.places[..., 0], contexts.places[..., 1]
    return every[np.where(document >= 0, starts[document] + place, 0)]
