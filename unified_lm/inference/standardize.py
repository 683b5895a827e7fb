"""Fitting a standardizer on a reference corpus, block by block: vectors are not kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice

import numpy as np

from unified_lm.inference.unified import UnifiedLM
from unified_lm.models.standardizer import MIN_TEXTS, RELATIVE_EPS, RunningMoments, Standardizer

_BLOCK = 256
"""Texts embedded at a time."""


@dataclass(frozen=True)
class Fitted:
    """A standardizer and what it was fitted on.

    Attributes:
        standardizer: the statistics.
        num_texts: distinct texts in the corpus.
        corpus_hash: of those texts, independent of their order.
        num_floored: number of dimensions whose standard deviation was raised to `RELATIVE_EPS` times the median.
    """

    standardizer: Standardizer
    num_texts: int
    corpus_hash: str
    num_floored: int


def fit_standardizer(
    model: UnifiedLM,
    texts: Iterable[str],
    *,
    instruction: str = "",
    routing: bool = False,
    min_texts: int = MIN_TEXTS,
    progress: Callable[[int], None] | None = None,
) -> Fitted:
    """Fit per-dimension statistics of a model's vectors, before scaling to length 1 and without the model's own standardizer.

    Equal texts count once, so that copies get no extra weight. The order of the texts only affects rounding.

    Args:
        model: embeds the texts.
        texts: the reference corpus; read once. Empty texts are ignored.
        instruction: for embedding the texts; "" embeds them as documents.
        routing: whether the statistics are of hidden states and routing, so that they serve every method of `models.moee`.
        min_texts: fewest distinct texts.
        progress: called after each block with its number of texts.

    Raises:
        DataError: too few distinct texts, or texts that do not vary.
    """
    moments = RunningMoments()
    hashes: set[bytes] = set()
    # Statistics of vectors that are already standardized would be mean 0 and deviation 1.
    own, model.standardizer = model.standardizer, None
    try:
        for block in _blocks(_distinct(texts, hashes)):
            moments.update(model.encode(block, instruction, method="moee_concat" if routing else "hs", normalize=False))
            if progress is not None:
                progress(len(block))
    finally:
        model.standardizer = own
    standardizer = Standardizer.fit(moments, min_texts)
    std = np.sqrt(moments.variance)
    return Fitted(
        standardizer=standardizer,
        num_texts=moments.count,
        corpus_hash=blake2b(b"".join(sorted(hashes)), digest_size=16).hexdigest(),
        num_floored=int((std < RELATIVE_EPS * np.median(std)).sum()),
    )


def _distinct(texts: Iterable[str], hashes: set[bytes]) -> Iterator[str]:
    """Yield each distinct text once, and add its hash to `hashes`: a set of texts could exceed the memory."""
    for text in texts:
        stripped = text.strip()
        digest = blake2b(stripped.encode(), digest_size=16).digest()
        if stripped and digest not in hashes:
            hashes.add(digest)
            yield stripped


def _blocks(texts: Iterator[str]) -> Iterator[list[str]]:
    while block := list(islice(texts, _BLOCK)):
        yield block
