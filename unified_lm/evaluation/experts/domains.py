"""Which experts belong to one kind of text: the rule of MONET's paper (arXiv:2412.04139), and masks that leave them out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from unified_lm.core.errors import DataError
from unified_lm.evaluation.experts.statistics import RoutingStatistics
from unified_lm.models.monet.masks import ExpertMask

RATIO = 2.0
"""How many times as much as any other kind's its own kind uses an expert, in the paper."""

MIN_TOKENS = 2000
"""Fewer tokens of a kind say too little about experts that a token in a hundred uses."""

_BINS = 64


def owners(statistics: RoutingStatistics, ratio: float = RATIO, min_tokens: int = MIN_TOKENS) -> tuple[list[str], np.ndarray]:
    """The kind of text that each expert belongs to.

    Args:
        statistics: of at least two kinds.
        ratio: an expert belongs to the kind that uses it most, if that is at least so many times the second kind's use.
        min_tokens: refuse statistics of fewer tokens of a kind.

    Returns:
        The kinds, and their numbers int64 `[G, E, E]`, -1 for experts that belong to none (unused ones among them).

    Raises:
        DataError: a single kind, a ratio of less than 1, or too few tokens; the text has the counts.
    """
    names = sorted(statistics.means)
    if len(names) < 2:
        raise DataError(f"statistics of {', '.join(names) or 'no kind of text'}: an expert of one kind is told by comparison.")
    if not ratio >= 1:
        raise DataError(f"ratio: got {ratio}, expected at least 1.")
    few = {name: count for name, count in statistics.tokens.items() if count < min_tokens}
    if few:
        counts = ", ".join(f"{name} {count:,}" for name, count in statistics.tokens.items())
        raise DataError(
            f"{len(few)} kinds of text have fewer than {min_tokens:,} tokens ({counts}): whose experts are whose would be "
            "chance. Read more of them, or lower --min-tokens."
        )
    use = np.stack([statistics.means[name] for name in names])
    ranked = np.sort(use, axis=0)
    owner = use.argmax(axis=0)
    return names, np.where((ranked[-1] > 0) & (ranked[-1] >= ratio * ranked[-2]), owner, -1)


def mask_without(statistics: RoutingStatistics, owner: np.ndarray, number: int, note: str) -> ExpertMask:
    """A mask that leaves out the experts of one kind of text.

    Args:
        statistics: whose model it is for.
        owner: see `owners`.
        number: of the kind.
        note: what the mask says of itself.
    """
    return ExpertMask(owner != number, statistics.routers, note)


def random_mask(mask: ExpertMask, seed: int, use: Sequence[np.ndarray] | None = None) -> ExpertMask:
    """A mask that leaves out as many experts of every router, at random: what an edit is compared with.

    Args:
        mask: the edit.
        seed: of the draw.
        use: per kind of text `RoutingStatistics.means`. With it experts are drawn that are used as much, over all kinds,
            as those of the edit: leaving out experts that nobody uses changes nothing, and would flatter the edit.
    """
    rng = np.random.default_rng(seed)
    keep = np.ones_like(mask.keep)
    for number, of_router in enumerate(mask.keep):
        wanted = ~of_router.reshape(-1)
        order = np.arange(wanted.size)
        if use is not None:
            order = np.argsort(sum(of_kind[number].reshape(-1) for of_kind in use), kind="stable")
        bins = np.array_split(order, 1 if use is None else min(_BINS, wanted.size))
        for members in bins:
            count = int(wanted[members].sum())
            others = members[~wanted[members]]
            pool = others if use is not None and len(others) >= count else members  # used as much, but not the edit's own
            keep[number].reshape(-1)[rng.permutation(pool)[:count]] = False
    return ExpertMask(keep, mask.routers, f"as many as: {mask.note}")
