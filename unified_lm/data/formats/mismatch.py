"""Which other row's completion a row is read with, where a prompt must meet an answer that is not meant for it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from unified_lm.core.errors import DataError
from unified_lm.core.random import derive_seed


def mismatched_partners(prompts: Sequence[int], source_name: str) -> np.ndarray:
    """For every row another row with a different prompt.

    The rows are laid out in a circle, in a shuffled order that depends on their number alone, and each takes the next one whose
    prompt differs. The choice depends on nothing but the source: not on seed, batch, or number of ranks.

    Args:
        prompts: a hash of each row's prompt.
        source_name: for the error text.

    Returns:
        int64 `[rows]`.

    Raises:
        DataError: all rows have the same prompt.
    """
    keys = np.asarray(prompts, dtype=np.int64)
    if len(keys) and (keys == keys[0]).all():
        raise DataError(
            f"{source_name}: its {len(keys)} rows have one prompt between them. Learning from preferences compares answers "
            "with those to other prompts, so it takes rows with at least two different prompts."
        )
    circle = np.random.default_rng(derive_seed("mismatch", len(keys))).permutation(len(keys))
    partners = np.empty(len(keys), dtype=np.int64)
    pending = np.arange(len(keys))
    shift = 1
    while len(pending):
        candidates = circle[(pending + shift) % len(keys)]
        differs = keys[candidates] != keys[circle[pending]]
        partners[circle[pending[differs]]] = candidates[differs]
        pending = pending[~differs]
        shift += 1
    return partners
