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
                active_TN = reading.of(group, part, None)
                # Few features have a better place among a few more tokens, the fewer the more were read.
                better = (active_TN > weights_GKN[group, -1]).any(0).nonzero()[:, 0]
                active_TC = active_TN[:, better]
                best = torch.cat([weights_GKN[group][:, better], active_TC]).topk(num_contexts, dim=0)
                numbers = torch.cat([numbers_GKN[group][:, better], known.expand_as(active_TC)])
                weights_GKN[group][:, better] = best.values
                numbers_GKN[group][:, better] = numbers.gather(0, best.indices)
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
    contexts: Contexts, group: int, part: slice, decode: Callable[[list[list[int]]], list[str]], window: int = 12
) -> dict[str, list[Any]]:
    """Columns of a table with a row for each place of some features, in order, the best place first.

    Args:
        contexts: what was kept.
        group: of which features.
        part: which features of it.
        decode: token ids of several texts -> the texts.
        window: tokens of context on either side.

    Returns:
        "feature", "rank", "weight", "token_id", "before", "token", "after".
    """
    found = contexts.places[group, :, part]
    features, ranks = np.nonzero(found[..., 0].T >= 0)
    parts: tuple[list[list[int]], ...] = ([], [], [])
    for document, place in found[ranks, features]:
        ids = contexts.documents[document].ids
        around = (ids[max(0, place - window) : place], ids[place : place + 1], ids[place + 1 : place + 1 + window])
        for column, piece in zip(parts, around, strict=True):
            column.append(piece.tolist())
    weights = contexts.weights[group, :, part][ranks, features]
    numbers = {"feature": (features + part.start).tolist(), "rank": ranks.tolist(), "weight": weights.tolist()}
    numbers["token_id"] = [piece[0] for piece in parts[1]]
    return numbers | dict(zip(("before", "token", "after"), map(decode, parts), strict=True))


@dataclass(frozen=True, eq=False)
class Window:
    """One of the best places of a feature, with what stands around it.

    Attributes:
        document: that it is in.
        ids: int64 `[n]`, tokens.
        weights: float32 `[n]`, how active the feature is at each of them; 0 at start tokens.
        center: number of the best one.
    """

    document: int
    ids: np.ndarray
    weights: np.ndarray
    center: int


def windows(
    features: Features,
    domain: Domain,
    contexts: Contexts,
    chosen: Sequence[Sequence[int]],
    *,
    context: int,
    reach: int = 12,
    progress: Callable[[int], None] | None = None,
) -> list[dict[int, list[Window]]]:
    """Read the texts once more, for what some features do around their best places.

    Args:
        features: as for `top_contexts`.
        domain: the same texts.
        contexts: what `top_contexts` found.
        chosen: numbers of features, for each group.
        context: the same one.
        reach: tokens on either side.
        progress: called with the number of tokens that were read since the last call.

    Returns:
        For each group: feature -> its windows, the best first.
    """
    places = _WindowPlaces(contexts, chosen, reach)
    for reading in features.read(domain, context):
        flat = np.array([places.starts[document] + place for document, place in reading.places])
        for group, of_group in enumerate(chosen):
            wanted = torch.tensor(list(of_group), dtype=torch.long)
            for part in _runs(np.flatnonzero(places.needed[group][flat])):
                active = reading.of(group, part, wanted)
                places.fill(group, int(flat[part.start]), active.float().cpu().numpy())
        if progress is not None:
            progress(len(flat))
    return places.windows()


class _WindowPlaces:
    """The windows of some features, filled token by token: as many weights as their tokens, and no more.

    Args:
        contexts: whose places.
        chosen: numbers of features, for each group.
        reach: tokens on either side.

    Attributes:
        starts: int64 `[documents + 1]`, where each document begins among all tokens.
        needed: for each group bool `[tokens]`, whether a window has the token.
    """

    def __init__(self, contexts: Contexts, chosen: Sequence[Sequence[int]], reach: int) -> None:
        self._contexts, self._chosen = contexts, chosen
        lengths = [len(document.ids) for document in contexts.documents]
        self.starts = np.concatenate([[0], np.cumsum(lengths)])
        self.needed = [np.zeros(self.starts[-1], bool) for _ in chosen]
        # of each window: column, first token, stop, best token, document
        self._spans: list[np.ndarray] = []
        self._weights: list[list[np.ndarray]] = []
        for group, of_group in enumerate(chosen):
            found = []
            for column, feature in enumerate(of_group):
                for document, place in contexts.places[group, :, feature].tolist():
                    if document >= 0:
                        first, stop = max(0, place - reach), min(lengths[document], place + reach + 1)
                        start = int(self.starts[document])
                        found.append((column, start + first, start + stop, start + place, document))
                        self.needed[group][start + first : start + stop] = True
            self._spans.append(np.array(found, np.int64).reshape(-1, 5))
            self._weights.append([np.zeros(stop - first, np.float32) for _, first, stop, _, _ in found])

    def fill(self, group: int, first: int, active_nF: np.ndarray) -> None:
        """Take what features do at some tokens in a row, of which the first has this number among all."""
        spans, stop = self._spans[group], first + len(active_nF)
        for number in np.flatnonzero((spans[:, 1] < stop) & (spans[:, 2] > first)):
            column, begin, end = spans[number, :3]
            low, high = max(begin, first), min(end, stop)
            self._weights[group][number][low - begin : high - begin] = active_nF[low - first : high - first, column]

    def windows(self) -> list[dict[int, list[Window]]]:
        """For each group: feature -> its windows, the best first."""
        found: list[dict[int, list[Window]]] = [{int(feature): [] for feature in of_group} for of_group in self._chosen]
        for group, spans in enumerate(self._spans):
            for (column, first, stop, best, document), weights in zip(spans.tolist(), self._weights[group], strict=True):
                start = int(self.starts[document])
                ids = self._contexts.documents[document].ids[first - start : stop - start]
                found[group][int(self._chosen[group][column])].append(Window(document, ids, weights, best - first))
        return found


def _runs(indices: np.ndarray, most: int = 256) -> list[slice]:
    """Ascending numbers as slices without gaps, none of them long."""
    if not len(indices):
        return []
    cuts = np.flatnonzero(np.diff(indices) != 1) + 1
    parts = [part for run in np.split(indices, cuts) for part in np.split(run, range(most, len(run), most))]
    return [slice(int(part[0]), int(part[-1]) + 1) for part in parts]


def _ids(contexts: Contexts) -> np.ndarray:
    """Token ids `[G, K, N]` of the places; those that are none have any."""
    lengths = np.array([len(document.ids) for document in contexts.documents])
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    every = np.concatenate([document.ids for document in contexts.documents])
    document, place = contexts.places[..., 0], contexts.places[..., 1]
    return every[np.where(document >= 0, starts[document] + place, 0)]
