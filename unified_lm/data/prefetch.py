"""Drawing the next step's batch while the current step runs."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from threading import Thread
from typing import Any

from unified_lm.batch import Batch
from unified_lm.data.loader import StepLoader


class PrefetchingLoader:
    """A `StepLoader` that draws one batch ahead, in a thread that ends with its draw.

    Batches, their order and the saved cursors are those of the loader itself: cursors are those of the last batch that was
    handed out. An error of a draw is raised by the `next_batch` that would have returned its batch; the saved cursors stay
    those of the last batch.

    Args:
        loader: only this object may draw from it.
        num_steps: batches of the whole run; none is drawn beyond them.
    """

    def __init__(self, loader: StepLoader, num_steps: int) -> None:
        self.loader = loader
        self.num_steps = num_steps
        self._ahead: Future[Batch] | None = None
        self._state: dict[str, Any] | None = None  # cursors before the batch that is being drawn ahead

    def next_batch(self) -> Batch:
        """This rank's share of the next step."""
        ahead, self._ahead = self._ahead, None
        if ahead is None:
            self._state = self.loader.state_dict()  # the cursors that stay where the draw fails
        batch = self.loader.next_batch() if ahead is None else ahead.result()
        self._state = None
        if self.loader.num_drawn < self.num_steps:
            self._state = self.loader.state_dict()
            self._ahead = _in_thread(self.loader)
        return batch

    @property
    def reads_along(self) -> bool:
        """See `StepLoader.reads_along`."""
        return self.loader.reads_along

    def reset(self) -> None:
        """Go back to the first step."""
        self._drop()
        self.loader.reset()

    def state_dict(self) -> dict[str, Any]:
        """Where every stream stands after the last batch that was handed out, as JSON."""
        return self.loader.state_dict() if self._state is None else self._state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where a saved loader stopped.

        Raises:
            CheckpointError: the state is of other streams, or of other data.
        """
        self._drop()
        self.loader.load_state_dict(state)

    def _drop(self) -> None:
        """Give up the batch drawn ahead, with an error it may have ended in: nobody asked for it."""
        if self._ahead is not None:
            self._ahead.exception()  # waits: two threads must not draw from one loader
        self._ahead = self._state = None


def _in_thread(loader: StepLoader) -> Future[Batch]:
    future: Future[Batch] = Future()

    def draw() -> None:
        """Whatever comes of the draw is the result."""
        try:
            future.set_result(loader.next_batch())
        except BaseException as error:
            future.set_exception(error)

    # No daemon: the interpreter waits for the milliseconds that are left, rather than ending a thread inside native code.
    Thread(target=draw, name="next batch").start()
    return future
