"""Agreement between ranks: they succeed or fail together, so that none waits for a rank that has stopped."""

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
    """Collect the errors of all ranks. Collective.

    Args:
        error: this rank's error, or None.

    Returns:
        The same text on every rank: "rank 1: No space left on device; ...", or None if no rank failed.
    """
    texts = distributed.all_gather_objects(None if error is None else str(error))
    if distributed.world_size() == 1:
        return texts[0]
    found = [f"rank {rank}: {text}" for rank, text in enumerate(texts) if text is not None]
    return "; ".join(found) or None


def run_on_rank0(work: Callable[[], T]) -> T:
    """Do short work on rank 0 alone and give every rank its result. Collective.

    Args:
        work: its result is pickled.

    Raises:
        UserError: the error of rank 0, on every rank.
        RuntimeError: on the other ranks, if rank 0 fails in any other way; rank 0 raises the original error.
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
    # Rank 0 broadcasts even if it failed: the other ranks are already waiting in this collective.
    value, failure_of_rank0 = broadcast_object(result)
    if failure is not None or failure_of_rank0 is not None:
        raise failure or failure_of_rank0 or AssertionError
    return value  # type: ignore[return-value]


def broadcast_object(value: T) -> T:
    """Rank 0's value on every rank; it is pickled. Collective."""
    if distributed.world_size() == 1:
        return value
    box = [value]
    with trace_span("receive from rank 0"):
        torch.distributed.broadcast_object_list(box, src=0, device=distributed.local_device())
    return box[0]


def fail_alike(error: Exception, name: str, seconds: float = 30.0) -> bool:
    """Whether every rank has failed with the same user error, so that all of them can continue with something else.

    Not a collective: a rank that has not failed never calls it, and may be waiting in a collective for one that has. Instead,
    ranks count each other through the key-value store of their process group.

    Args:
        error: this rank's error.
        name: of what failed; it must differ between calls.
        seconds: how long to wait for the other ranks.
    """
    if distributed.world_size() == 1:
        return True
    if not isinstance(error, UserError):
        return False  # any other error may have left the ranks in different collectives
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
        except RuntimeError:  # the rank that hosts the store has exited
            return False
    return True
