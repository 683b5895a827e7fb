"""A watchdog against hangs: if a rank waits too long for the others, every rank reports its position and the run ends.

The libraries' own timeouts say neither which rank is missing nor what it is doing. So each process has a thread that writes
the current span (`core.tracing`) to the store of the process group as a heartbeat, checks whether another rank has given up,
and gives up itself if its own process waits too long in one span. It is a thread because the main thread cannot report
anything while it hangs.
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
"""Exit code of a run that the watchdog ends: EX_TEMPFAIL of sysexits.h, which means "try again"."""

_PREFIX = "unified_lm/watchdog"
_GAVE_UP = "gave_up"
_watchdog: Watchdog | None = None


class Watchdog(threading.Thread):
    """Watches one process of a group.

    Args:
        timeout_seconds: the longest wait in one span.
        store: a connection of its own to the store of the process group.
    """

    def __init__(self, timeout_seconds: float, store: Any) -> None:
        super().__init__(name="watchdog", daemon=True)
        self.timeout_seconds = timeout_seconds
        self.interval = min(5.0, timeout_seconds / 10)  # seconds between heartbeats
        self.rank, self.world_size = distributed.rank(), distributed.world_size()
        self._store = store
        self._lock = threading.Lock()  # the main thread uses the same connection in `wait_for_flag`
        self._ended = threading.Event()
        self._lost: float | None = None

    def run(self) -> None:
        """Send heartbeats and check the other ranks, until `end`."""
        while not self._ended.wait(self.interval):
            if self._lost is not None:
                self._check_lost_store(self._lost)
                continue
            try:
                self.beat()
                given_up = self._lookup(_GAVE_UP)
            except (dist.DistError, RuntimeError):
                self._lost = time.monotonic()
                continue
            span, waits, seconds = current_span()
            if given_up is not None and given_up["rank"] != self.rank:
                reason = f"Rank {given_up['rank']} has given up: it waited in '{given_up['span']}'."
                self._give_up(f"{reason} {self._describe_self()}")
            elif waits and seconds > self.timeout_seconds:
                self._put(_GAVE_UP, {"rank": self.rank, "span": span})
                self._give_up(f"{self._describe_self()} {self._describe_others()}".rstrip())

    def end(self) -> None:
        """Stop watching."""
        self._ended.set()
        self.join(timeout=self.interval + 5)

    def beat(self) -> None:
        """Write a heartbeat to the store: the current span of this process, and the time."""
        span, waits, seconds = current_span()
        self._put(str(self.rank), {"span": span, "waits": waits, "seconds": seconds, "time": time.time()})

    def set_flag(self, key: str) -> None:
        """Set a flag in the store."""
        self._put(key, True)

    def wait_for_flag(self, key: str, owner: int) -> None:
        """Wait for a flag that a rank sets, without a limit as long as that rank sends heartbeats.

        Raises:
            RuntimeError: the rank has sent no heartbeat for `timeout_seconds`.
        """
        # Changes of the heartbeat are timed with this process's clock: clocks of different nodes need not agree.
        last_change, last_beat = time.monotonic(), None
        while self._lookup(key) is None:
            beat = (self._lookup(str(owner)) or {}).get("time")
            if beat != last_beat:
                last_change, last_beat = time.monotonic(), beat
            if time.monotonic() - last_change > self.timeout_seconds:
                raise RuntimeError(f"rank {owner} has not been heard from for {_duration(self.timeout_seconds)}")
            time.sleep(min(0.2, self.interval))

    def wait_while_it_moves(self, key: str, owner: int) -> None:
        """Wait for a flag that a rank sets, until that rank has been silent, or in one span, for `timeout_seconds`."""
        last_change, last = time.monotonic(), ("", 0.0)
        while self._lookup(key) is None and time.monotonic() - last_change <= self.timeout_seconds:
            beat = self._lookup(str(owner)) or {}
            seconds = beat.get("seconds", last[1])
            if beat.get("span", last[0]) != last[0] or seconds < last[1]:
                last_change = time.monotonic()
            last = beat.get("span", last[0]), seconds
            time.sleep(min(0.2, self.interval))

    def _describe_self(self) -> str:
        span, waits, seconds = current_span()
        return f"Rank {self.rank} of {self.world_size} {'has waited' if waits else 'is'} {_position(span, waits, seconds)}."

    def _describe_others(self) -> str:
        """The ranks that may be the cause: those that are silent, and those that do not wait for others themselves."""
        lines = []
        for other in range(self.world_size):
            if other == self.rank:
                continue
            beat = self._lookup(str(other))
            if beat is None:
                lines.append(f"rank {other} has never been heard from")
                continue
            silent = time.time() - beat["time"]
            if silent > 3 * self.interval + 5:
                lines.append(f"rank {other} has not been heard from for {_duration(silent)}, last in '{beat['span']}'")
            elif not (beat["waits"] and beat["seconds"] > self.timeout_seconds / 2):
                lines.append(f"rank {other} is {_position(beat['span'], beat['waits'], beat['seconds'])}")
        return f"Missing: {'; '.join(lines[:8])}." if lines else "Every rank waits: they wait for different things."

    def _give_up(self, text: str) -> NoReturn:
        print(f"error: {text} Giving up (parallel.timeout_minutes).", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=sys.__stderr__ or 2, all_threads=True)
        time.sleep(3 * self.interval)  # this process may host the store: the other ranks must read the reason first
        os._exit(HUNG)  # not sys.exit, which would only end this thread

    def _check_lost_store(self, since: float) -> None:
        """Give up some time after the process that hosts the store has exited.

        A process in a collective usually gets an error from its sockets before that, which says more; one that hangs does not.
        """
        if time.monotonic() - since > self.timeout_seconds:
            self._give_up(f"The process group has been gone for {_duration(time.monotonic() - since)}. {self._describe_self()}")

    def _put(self, key: str, value: Any) -> None:
        with self._lock:
            self._store.set(key, json.dumps(value))

    def _lookup(self, key: str) -> Any:
        with self._lock:
            return json.loads(self._store.get(key)) if self._store.check([key]) else None


def _position(span: str, waits: bool, seconds: float) -> str:
    if waits:
        return f"{_duration(seconds)} in '{span}'"
    where = span if span.startswith("after '") else f"in '{span}'"
    return f"outside any collective, for {_duration(seconds)} {where}"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


@contextmanager
def watching(timeout_minutes: float) -> Iterator[None]:
    """Watch this process inside the context; does nothing for a single process.

    Args:
        timeout_minutes: the longest wait for other ranks in one span.
    """
    global _watchdog
    if distributed.world_size() == 1:
        yield
        return
    store: Any = dist.distributed_c10d._get_default_store()
    _watchdog = Watchdog(timeout_minutes * 60, dist.PrefixStore(_PREFIX, store.clone()))
    _watchdog.beat()  # before the thread starts, so that every rank has been heard from once
    _watchdog.start()
    try:
        yield
    finally:
        _watchdog.end()
        _watchdog = None


_num_long = 0


def finish_together(name: str) -> None:
    """Wait for ranks that take each its own time (files on a slow disk) as long as they make progress. Collective.

    Progress is a span that begins or ends. A rank that makes none is left to the next collective, which gives up and names it.

    Args:
        name: what the work is, for messages.
    """
    global _num_long
    if distributed.world_size() == 1 or _watchdog is None:
        return
    _num_long += 1
    flags = [f"done/{_num_long}/{rank}" for rank in range(distributed.world_size())]
    _watchdog.set_flag(flags[distributed.rank()])
    with trace_span(f"wait for {name} of every rank", waits=False):
        for owner, flag in enumerate(flags):
            _watchdog.wait_while_it_moves(flag, owner)


def run_long_on_rank0(work: Callable[[], T], name: str) -> T:
    """Do work on rank 0 alone while the others wait, however long it takes (an export, for example). Collective.

    The others wait for a flag in the store instead of in a collective, so that no timeout applies as long as rank 0 is alive.

    Args:
        work: its result is pickled and returned on every rank.
        name: what the work is, for messages.

    Raises:
        UserError: the error of rank 0, on every rank.
        RuntimeError: on the other ranks, if rank 0 fails in any other way or has exited.
    """
    global _num_long
    if distributed.world_size() == 1 or _watchdog is None:
        return agreement.run_on_rank0(work)
    _num_long += 1
    flag = f"done/{_num_long}"
    watchdog = _watchdog

    def work_and_set_flag() -> T:
        """Do the work, then set the flag whether it is done or has failed."""
        try:
            with trace_span(name, waits=False):
                return work()
        finally:
            watchdog.set_flag(flag)

    if not distributed.is_rank0():
        with trace_span(f"{name} on rank 0", waits=False):
            watchdog.wait_for_flag(flag, owner=0)
    return agreement.run_on_rank0(work_and_set_flag)
