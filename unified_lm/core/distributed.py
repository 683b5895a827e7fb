"""Rank helpers that also work without a process group, and the collectives that the engine uses."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from unified_lm.core.errors import UserError
from unified_lm.core.tracing import trace_span

T = TypeVar("T")

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def is_initialized() -> bool:
    """Whether a process group exists."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's rank; 0 without a process group."""
    return dist.get_rank() if is_initialized() else 0


def world_size() -> int:
    """The number of processes; 1 without a process group."""
    return dist.get_world_size() if is_initialized() else 1


def is_rank0() -> bool:
    """Whether this process is rank 0, the one that writes files and prints."""
    return rank() == 0


def local_device() -> torch.device:
    """The accelerator of this process (by LOCAL_RANK), or the CPU.

    Raises:
        UserError: more processes were started on this machine than it has accelerators.
    """
    if torch.cuda.is_available():
        index, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if index >= there:
            raise UserError(
                f"this process is number {index + 1} of its machine (LOCAL_RANK={index}), which shows it {there} GPUs. Start "
                f"at most one process for each (torchrun --nproc-per-node {there}); CUDA_VISIBLE_DEVICES can hide some."
            )
        return torch.device("cuda", index)
    return torch.device("cpu")


def find_device(name: str | torch.device) -> torch.device:
    """A device that a user names, after a tensor was put there.

    Raises:
        UserError: unknown, absent, or one that holds no values.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # torch's way to say "not compiled with CUDA" is an assertion
        accelerators = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
        reason = str(error).splitlines()[0] if str(error) else "it is not there"
        raise UserError(
            f"device '{name}' cannot be used here ({reason}). Here there are: {', '.join(['cpu', *accelerators])}."
        ) from error
    return device


def initialize(timeout_minutes: float = 30.0) -> None:
    """Join the process group that torchrun describes in the environment; does nothing if there is none.

    Args:
        timeout_minutes: the longest wait for other ranks.
    """
    terminate_with_agent()
    if is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    device = local_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=group_timeout(timeout_minutes))


def group_timeout(timeout_minutes: float) -> timedelta:
    """When the library gives up: later than the watchdog (core.watchdog), whose message says more."""
    return timedelta(minutes=1.25 * timeout_minutes + 1)


def terminate_with_agent() -> None:
    """Ask the kernel for SIGTERM when torchrun's agent dies. Does nothing without an agent, or outside Linux.

    Workers run in sessions of their own, so nothing else ends them: they would continue to train, unseen, while the run is
    restarted in the same folder. SIGTERM lets them save first (`engine.interruption`).
    """
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def initialize_alone() -> None:
    """Create a process group of this process alone, for libraries that need one; does nothing if a group exists."""
    if not is_initialized():
        backend = "nccl" if local_device().type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def full_shape(tensor: torch.Tensor) -> tuple[int, ...]:
    """The shape of the whole parameter, even if this rank holds only a part of it (ZeRO-3)."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def is_partitioned(tensor: torch.Tensor) -> bool:
    """Whether a parameter is one that ranks hold in parts (ZeRO-3), even if it is whole for the moment."""
    return hasattr(tensor, "ds_shape")


def shutdown() -> None:
    """Leave the process group, if there is one."""
    if is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Wait for every rank."""
    if is_initialized():
        with trace_span("wait for every rank"):
            dist.barrier()


def all_reduce_sum(value: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over ranks, in place, and return it. Shapes and dtypes must agree on every rank."""
    if world_size() > 1:
        with trace_span("sum over ranks"):
            dist.all_reduce(value)
    return value


def all_reduce_max(values: list[int]) -> list[int]:
    """The maximum over ranks of each integer."""
    if world_size() == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.int64, device=local_device())
    with trace_span("maximum over ranks"):
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return [int(value) for value in tensor.tolist()]


def all_gather_objects(value: T) -> list[T]:
    """The values of all ranks, in the order of ranks. They are pickled."""
    if world_size() == 1:
        return [value]
    values: list[T | None] = [None] * world_size()
    with trace_span("gather from every rank"):
        dist.all_gather_object(values, value)
    return cast("list[T]", values)


def all_gather_uneven(value: torch.Tensor) -> tuple[list[torch.Tensor], int]:
    """Gather tensors whose first dimension may differ between ranks (it may be 0).

    Args:
        value: `[N_rank, ...]`, same trailing shape and dtype on every rank. No gradient flows through the gather.

    Returns:
        One tensor per rank, in the order of ranks, and this process's rank.
    """
    if world_size() == 1:
        return [value.detach()], 0
    with trace_span("gather tensors from every rank"):
        # gloo gathers equal shapes only: agree on the longest, pad to it, and cut the padding off again
        sizes = torch.zeros(world_size(), dtype=torch.int64, device=value.device)
        sizes[rank()] = value.shape[0]
        dist.all_reduce(sizes)
        longest = int(sizes.max())
        padded = value.new_zeros((longest, *value.shape[1:]))
        padded[: value.shape[0]] = value.detach()
        parts = [torch.empty_like(padded) for _ in range(world_size())]
        dist.all_gather(parts, padded)
    return [part[:size] for part, size in zip(parts, sizes.tolist(), strict=True)], rank()
