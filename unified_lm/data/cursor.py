"""The order in which the rows of one source are drawn, as a few integers that can be saved."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


class Cursor:
    """Walks the rows of one source, epoch after epoch, each in its own order.

    Every epoch has every row once. Where a batch crosses from one epoch into the next, the rows it already holds come last
    in the new epoch, so that no batch repeats a row while there is another.

    Args:
        num_rows: rows of the source.
        order: epoch -> a permutation of `range(num_rows)`.
    """

    def __init__(self, num_rows: int, order: Callable[[int], np.ndarray]) -> None:
        self.num_rows = num_rows
        self._permutation = order
        self._set(0, 0, [])

    def take(self, count: int) -> list[int]:
        """The next `count` rows, one batch."""
        rows: list[int] = []
        while len(rows) < count:
            if self.position == self.num_rows:
                held = len(rows) % self.num_rows
                self._set(self.epoch + 1, 0, rows[len(rows) - held :] if held else [])
            step = min(count - len(rows), self.num_rows - self.position)
            rows += self._order[self.position : self.position + step].tolist()
            self.position += step
        return rows

    def state_dict(self) -> dict[str, Any]:
        """Where the cursor stands, as JSON."""
        return {"epoch": self.epoch, "position": self.position, "deferred": self.deferred}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved place."""
        self._set(state["epoch"], state["position"], list(state["deferred"]))

    def _set(self, epoch: int, position: int, deferred: list[int]) -> None:
        self.epoch, self.position, self.deferred = epoch, position, deferred
        order = self._permutation(epoch)
        if deferred:
            order = np.concatenate([order[~np.isin(order, deferred)], np.asarray(deferred, dtype=order.dtype)])
        self._order = order
