"""SIGTERM and SIGUSR1 as a request to stop between two optimizer steps: what schedulers send before they take the machine."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from unified_lm.core import distributed
from unified_lm.core.tracing import trace_span

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What asks a run to stop."""


class StopRequest:
    """Notes a signal instead of dying of it; use it as a context manager around a run, from its first step to its export.

    It may be entered again inside itself: only the outermost block changes handlers, so whoever holds it over several blocks
    leaves no moment between them in which a signal would end the process.

    The first signal is noted, a later one does what it would have done before. A scheduler that signals every process of a job
    reaches a rank twice, because torchrun passes on what it gets: repetitions within a few seconds are the same request.
    Python allows handlers in the main thread only: in another one nothing is noted.

    Args:
        repeat_seconds: how long repetitions are taken for the same request.

    Attributes:
        number: of the signal received, 0 for none.
    """

    def __init__(self, repeat_seconds: float = 5.0) -> None:
        self.repeat_seconds = repeat_seconds
        self.number = 0
        self._received = 0.0
        self._depth = 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        self._depth += 1
        if self._depth == 1 and threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._put_back()

    def agree(self) -> str | None:
        """The name of the signal that a rank has noted, the same on all of them; None where none has. Collective."""
        with trace_span("agree whether to stop"):
            (number,) = distributed.all_reduce_max([self.number])
        return signal.Signals(number).name if number else None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.number:
            self.number, self._received = number, time.monotonic()
        elif time.monotonic() - self._received > self.repeat_seconds:
            self._put_back()
            os.kill(os.getpid(), number)

    def _put_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


def stop_message(signal_name: str, after: str) -> str:
    """What a run says when a signal ends it.

    Args:
        signal_name: "SIGTERM", ...
        after: what is done and kept: "step 5, which is saved".
    """
    job = os.environ.get("SLURM_JOB_ID")
    slurm = f" (Slurm: scontrol requeue {job})" if job else ""
    return f"stopped by {signal_name} after {after}. Start it again with resume=auto to go on{slurm}."
