"""An end to waiting for ever: where a rank waits too long for the others, every rank says where it is and the run ends.

The libraries' own timeouts say neither which rank is missing nor what it was doing. So each process has a thread that tells
the store of the process group where the process is (`core.tracing`), looks whether anyone has given up, and gives up itself
when its own process has waited too long in one place. A thread, because the process itself cannot speak while it hangs.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

import torch.distributed as dist

from unified_lm.core import agreement, distributed
from unified_lm.core.tracing import current_span, trace_span

T = TypeVar("T")

HUNG = 75
"""Exit code of a run that was given up: EX_TEMPFAIL of sysexits.h, try again."""

_PREFIX = "unified_lm/places"
_GAVE_UP = "gave_up"
_watchdog: Watchdog | None = None


class Watchdog(threading.Thread):
    """Watches one process of a group.

    Args:
        timeout_seconds: the longest wait in one place.
        store: a connection of its own to the store of the process group.
    """

    def __init__(self, timeout_seconds: float, store: Any) -> None:
        super().__init__(name="watchdog", daemon=True)
        self.timeout_seconds = timeout_seconds
        self.interval = min(5.0, timeout_seconds / 10)
        self.rank, self.world_size = distributed.rank(), distributed.world_size()
        self._store = store
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._lost: float | None = None

    def run(self) -> None:
        """Tell, look and wait, until `end`."""
        while not self._ended.wait(self.interval):
            if self._lost is not None:
                self._without_store(self._lost)
                continue
            try:
                self.tell()
                gone = self._lookup(_GAVE_UP)
            except (dist.DistError, RuntimeError):
                self._lost = time.monotonic()
                continue
            where, waits, seconds = current_span()
            if gone is not None and gone["rank"] != self.rank:
                self._give_up(f"Rank {gone['rank']} has given up: it waited in '{gone['place']}'. {self._here()}")
            elif waits and seconds > self.timeout_seconds:
                self._put(_GAVE_UP, {"rank": self.rank, "place": where})
                self._give_up(f"{self._here()} {self._others()}".rstrip())

    def end(self) -> None:
        """Stop watching."""
        self._ended.set()
        self.join(timeout=self.interval + 5)

    def tell(self) -> None:
        """Say in the store where this process is, and that it lives."""
        where, waits, seconds = current_span()
        self._put(str(self.rank), {"place": where, "waits": waits, "seconds": seconds, "time": time.time()})

    def mark(self, key: str) -> None:
        """Leave a mark in the store."""
        self._put(key, True)

    def wait_for_mark(self, key: str, owner: int) -> None:
        """Wait, however long, for a mark that a rank will leave; only as long as that rank lives.

        Raises:
            RuntimeError: nothing has been heard of the rank for the time of the timeout.
        """
        heard, last = time.monotonic(), None
        while self._lookup(key) is None:
            beat = (self._lookup(str(owner)) or {}).get("time")
            if beat != last:
                heard, last = time.monotonic(), beat
            if time.monotonic() - heard > self.timeout_seconds:
                raise RuntimeError(f"rank {owner} has not been heard of for {_duration(self.timeout_seconds)}")
            time.sleep(min(0.2, self.interval))

    def _here(self) -> str:
        where, waits, seconds = current_span()
        return f"Rank {self.rank} of {self.world_size} {'has waited' if waits else 'is'} {_where(where, waits, seconds)}."

    def _others(self) -> str:
        lines = []
        for other in range(self.world_size):
            if other == self.rank:
                continue
            told = self._lookup(str(other))
            if told is None:
                lines.append(f"rank {other} has never been heard of")
                continue
            silent = time.time() - told["time"]
            if silent > 3 * self.interval + 5:
                lines.append(f"rank {other} has not been heard of for {_duration(silent)}, last in '{told['place']}'")
            elif not (told["waits"] and told["seconds"] > self.timeout_seconds / 2):
                lines.append(f"rank {other} is {_where(told['place'], told['waits'], told['seconds'])}")
        return f"Missing: {'; '.join(lines[:8])}." if lines else "Every rank waits: they wait for different things."

    def _give_up(self, text: str) -> NoReturn:
        print(f"error: {text} Giving up (parallel.timeout_minutes).", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=sys.__stderr__ or 2, all_threads=True)
        time.sleep(3 * self.interval)  # the store may end with this process: the others must have looked
        os._exit(HUNG)

    def _without_store(self, since: float) -> None:
        """The process that keeps the store has ended. A process that waits will be told by its sockets; one that hangs not."""
        if time.monotonic() - since > self.timeout_seconds:
            self._give_up(f"The process group has been gone for {_duration(time.monotonic() - since)}. {self._here()}")

    def _put(self, key: str, value: Any) -> None:
        with self._lock:
            self._store.set(key, json.dumps(value))

    def _lookup(self, key: str) -> Any:
        with self._lock:
            return json.loads(self._store.get(key)) if self._store.check([key]) else None


def _where(where: str, waits: bool, seconds: float) -> str:
    return f"{_duration(seconds)} in '{where}'" if waits else f"outside any exchange, since {_duration(seconds)} {_at(where)}"


def _at(where: str) -> str:
    return where if where.startswith("after '") else f"in '{where}'"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


@contextmanager
def watching(timeout_minutes: float) -> Iterator[None]:
    """Watch this process while the block runs; does nothing for a single process.

    Args:
        timeout_minutes: the longest wait for other ranks in one place.
    """
    global _watchdog
    if distributed.world_size() == 1:
        yield
        return
    store: Any = dist.distributed_c10d._get_default_store()
    _watchdog = Watchdog(timeout_minutes * 60, dist.PrefixStore(_PREFIX, store.clone()))
    _watchdog.tell()
    _watchdog.start()
    try:
        yield
    finally:
        _watchdog.end()
        _watchdog = None


_num_long = 0


def run_long_on_rank0(work: Callable[[], T], name: str) -> T:
    """Do work on rank 0 alone while the others wait, however long it takes (an export, say). Collective.

    The others wait without a collective, so that no timeout counts, and only as long as rank 0 lives.

    Args:
        work: what to do; its result is pickled, and given to every rank.
        name: what it is, for messages.

    Raises:
        UserError: rank 0's, on every rank.
        RuntimeError: on the other ranks, when rank 0 fails in any other way or is gone.
    """
    global _num_long
    if distributed.world_size() == 1 or _watchdog is None:
        return agreement.run_on_rank0(work)
    _num_long += 1
    mark = f"done/{_num_long}"
    watchdog = _watchdog

    def then_mark() -> T:
        """Do the work, and tell the waiting ranks that it is done or has failed."""
        try:
            with trace_span(name, waits=False):
                return work()
        finally:
            watchdog.mark(mark)

    if not distributed.is_rank0():
        with trace_span(f"{name} on rank 0", waits=False):
            watchdog.wait_for_mark(mark, owner=0)
    return agreement.run_on_rank0(then_mark)
