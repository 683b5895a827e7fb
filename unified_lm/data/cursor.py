"""The order in which rows of a source are drawn, with a state of a few integers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


class Cursor:
    """Iterates over the rows of one source, epoch after epoch, each in its own order.

    Every epoch contains every row once. When a batch crosses an epoch boundary, the rows it already contains are deferred to
    the end of the new epoch, so that no batch repeats a row unless it is larger than the source.

    Args:
        num_rows: number of rows of the source.
        order: epoch -> a permutation of `range(num_rows)`.
    """

    def __init__(self, num_rows: int, order: Callable[[int], np.ndarray]) -> None:
        self.num_rows = num_rows
        self._permutation = order
        self._set(0, 0, [])

    def take(self, count: int) -> list[int]:
        """Draw the next `count` rows, which form one batch."""
        rows: list[int] = []
        while len(rows) < count:
            if self.position == self.num_rows:
                # Only the rows since the batch last held a full epoch: a batch larger than the source has to repeat the others.
                held = len(rows) % self.num_rows
                self._set(self.epoch + 1, 0, rows[len(rows) - held :] if held else [])
            step = min(count - len(rows), self.num_rows - self.position)
            rows += self._order[self.position : self.position + step].tolist()
            self.position += step
        return rows

    def state_dict(self) -> dict[str, Any]:
        """The state of the cursor, as JSON values."""
        return {"epoch": self.epoch, "position": self.position, "deferred": self.deferred}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a saved state."""
        self._set(state["epoch"], state["position"], list(state["deferred"]))

    def _set(self, epoch: int, position: int, deferred: list[int]) -> None:
        self.epoch, self.position, self.deferred = epoch, position, deferred
        # The order is recomputed from the epoch, not saved: a checkpoint stays small however long the source is.
        order = self._permutation(epoch)
        if deferred:
            order = np.concatenate([order[~np.isin(order, deferred)], np.asarray(deferred, dtype=order.dtype)])
        self._order = order
