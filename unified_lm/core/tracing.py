"""Named spans of what a process is doing, so that the watchdog can report where a rank hangs (`core.watchdog`)."""

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

_CONNECTION_LOST = re.compile(r"closed by peer|reset by peer|Broken pipe|gloo/transport|NCCL", re.IGNORECASE)


class LostRankError(RuntimeError):
    """A collective failed because another process has exited; the text says which rank noticed it, and in which span."""


@dataclass(frozen=True)
class TraceSpan:
    """One thing that a process is doing.

    Attributes:
        name: as shown in messages.
        waits: whether the span only ends with the help of other ranks; a span that does not wait never counts as hung.
    """

    name: str
    waits: bool


# Module state rather than thread-local: the watchdog's thread reads what the main thread writes.
_stack: list[TraceSpan] = []
_last = "start"
_changed = time.monotonic()


@contextmanager
def trace_span(name: str, *, waits: bool = True) -> Iterator[None]:
    """Name the work inside the context. Entering or leaving any span counts as progress and restarts the watchdog's timeout.

    For the main thread only.

    Args:
        name: as in "sum of gradients"; spans may be nested.
        waits: whether the span needs other ranks to finish.

    Raises:
        LostRankError: the work failed because another process has exited.
    """
    _stack.append(TraceSpan(name, waits))
    _progress()
    try:
        yield
    except LostRankError:
        raise
    except RuntimeError as error:
        if not _CONNECTION_LOST.search(str(error)):
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
    """Wrap a function so that every call runs in a span that waits for other ranks."""

    def traced_call(*args: P.args, **kwargs: P.kwargs) -> R:
        """`call`, inside the span."""
        with trace_span(name):
            return call(*args, **kwargs)

    return traced_call


def current_span() -> tuple[str, bool, float]:
    """The innermost span as a path of names, whether it waits for other ranks, and the seconds since the last progress."""
    seconds = time.monotonic() - _changed
    if _stack:
        return _describe(), _stack[-1].waits, seconds
    return f"after '{_last}'", False, seconds


def _describe() -> str:
    # a copy: the main thread may change the stack while the watchdog's thread reads it
    return " > ".join(span.name for span in tuple(_stack))


def _progress() -> None:
    global _changed
    _changed = time.monotonic()
