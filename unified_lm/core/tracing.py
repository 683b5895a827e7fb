"""Names for what a process is doing, so that a wait without end can say where it happened (`core.watchdog`)."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


_GONE = re.compile(r"closed by peer|reset by peer|Broken pipe|gloo/transport|NCCL", re.IGNORECASE)


class LostRankError(RuntimeError):
    """An exchange failed because another process has gone; the text says which rank noticed it, and where."""


@dataclass(frozen=True)
class Place:
    """What a process is doing.

    Attributes:
        name: for the reader of a message.
        waits: whether it takes other ranks to get on; False never counts as hung.
    """

    name: str
    waits: bool


_stack: list[Place] = []
_last = "start"
_changed = time.monotonic()


@contextmanager
def trace_span(name: str, *, waits: bool = True) -> Iterator[None]:
    """Name what happens inside. Entering or leaving any place is progress: it starts the time anew.

    Only the main thread may use it.

    Args:
        name: as in "sum of gradients"; places may lie within each other.
        waits: whether other ranks are needed to get on.

    Raises:
        LostRankError: what happens inside failed because another process has gone.
    """
    _stack.append(Place(name, waits))
    _progress()
    try:
        yield
    except LostRankError:
        raise
    except RuntimeError as error:
        if not _GONE.search(str(error)):
            raise
        raise LostRankError(
            f"rank {os.environ.get('RANK', '0')} lost another process in '{_describe()}': {str(error).splitlines()[0]}"
        ) from error
    finally:
        global _last
        _last = _describe()
        _stack.pop()
        _progress()


def traced(name: str, call: Callable[P, R]) -> Callable[P, R]:
    """The same call, made in a place that waits for other ranks."""

    def placed(*args: P.args, **kwargs: P.kwargs) -> R:
        """`call`, in the place."""
        with trace_span(name):
            return call(*args, **kwargs)

    return placed


def current_span() -> tuple[str, bool, float]:
    """Where the process is, whether it waits for others there, and for how many seconds nothing has changed."""
    seconds = time.monotonic() - _changed
    if _stack:
        return _describe(), _stack[-1].waits, seconds
    return f"after '{_last}'", False, seconds


def _describe() -> str:
    return " > ".join(entry.name for entry in tuple(_stack))


def _progress() -> None:
    global _changed
    _changed = time.monotonic()
