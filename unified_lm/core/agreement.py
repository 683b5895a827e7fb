"""Ranks that succeed together or fail together, so that none waits for one that has given up."""

from __future__ import annotations

import time
from collections.abc import Callable
from hashlib import blake2b
from typing import Any, TypeVar

import torch

from unified_lm.core import distributed
from unified_lm.core.errors import UserError
from unified_lm.core.tracing import trace_span

T = TypeVar("T")


def failures(error: Exception | None) -> str | None:
    """What went wrong on any rank. Collective.

    Args:
        error: what went wrong here, or None.

    Returns:
        The same on every rank: "rank 1: No space left on device; ...", or None where all is well.
    """
    texts = distributed.all_gather_objects(None if error is None else str(error))
    if distributed.world_size() == 1:
        return texts[0]
    found = [f"rank {rank}: {text}" for rank, text in enumerate(texts) if text is not None]
    return "; ".join(found) or None


def run_on_rank0(work: Callable[[], T]) -> T:
    """Do short work on rank 0 alone and give every rank its result. Collective.

    Args:
        work: what to do; its result is pickled.

    Raises:
        UserError: rank 0's, on every rank.
        RuntimeError: on the other ranks, when rank 0 fails in any other way (there it raises what it raised).
    """
    if distributed.world_size() == 1:
        return work()
    result: tuple[T | None, Exception | None] = (None, None)
    failure: Exception | None = None
    if distributed.is_rank0():
        try:
            result = (work(), None)
        except UserError as error:
            result, failure = (None, error), error
        except Exception as error:
            result, failure = (None, RuntimeError(f"rank 0 failed: {error!r}")), error
    value, told = broadcast_object(result)
    if failure is not None or told is not None:
        raise failure or told or AssertionError
    return value  # type: ignore[return-value]


def broadcast_object(value: T) -> T:
    """Rank 0's value on every rank; it is pickled. Collective."""
    if distributed.world_size() == 1:
        return value
    box = [value]
    with trace_span("hear from rank 0"):
        torch.distributed.broadcast_object_list(box, src=0, device=distributed.local_device())
    return box[0]


def fail_alike(error: Exception, name: str, seconds: float = 30.0) -> bool:
    """Whether every rank has failed with the same user's error, so that all of them can go on with something else together.

    No collective: a rank that has not failed never calls it, and may be waiting in a collective for one that has. Ranks tell
    each other through the store of their process group.

    Args:
        error: what went wrong here.
        name: of what failed; another one each time.
        seconds: how long to wait for the others.
    """
    if distributed.world_size() == 1:
        return True
    if not isinstance(error, UserError):
        return False  # whatever it was may have come between the ranks
    same = f"unified_lm/fail_alike/{name}/{blake2b(str(error).encode(), digest_size=8).hexdigest()}"
    deadline = time.monotonic() + seconds
    with trace_span("compare failures", waits=False):
        try:
            store: Any = torch.distributed.distributed_c10d._get_default_store()
            store.add(same, 1)
            while store.add(same, 0) < distributed.world_size():
                if time.monotonic() > deadline:
                    return False
                time.sleep(0.05)
        except RuntimeError:  # the store has gone with the rank that kept it
            return False
    return True
