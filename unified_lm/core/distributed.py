"""Rank helpers that also work without a process group, and the collectives that the engine uses."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from unified_lm.core.parent import follow_agent
from unified_lm.core.tracing import trace_span

T = TypeVar("T")


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
    """Whether this process writes files and prints."""
    return rank() == 0


def local_device() -> torch.device:
    """The accelerator of this process (by LOCAL_RANK), or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def initialize(timeout_minutes: float = 30.0) -> None:
    """Join the process group that torchrun describes in the environment; does nothing when there is none."""
    follow_agent()
    if is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    device = local_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    # the watchdog (core.watchdog) knows more than the library's timeout, so it speaks first
    dist.init_process_group(backend, timeout=timedelta(minutes=1.25 * timeout_minutes + 1))


def initialize_alone() -> None:
    """Make a group of this process alone, for libraries that need one; does nothing where a group exists."""
    if not is_initialized():
        backend = "nccl" if local_device().type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def full_shape(tensor: torch.Tensor) -> tuple[int, ...]:
    """The shape of a parameter, also where this rank holds only a part of it (ZeRO-3)."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


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
    """Sum a tensor over ranks, in place; returns it. Shapes must agree on every rank."""
    if world_size() > 1:
        with trace_span("sum over ranks"):
            dist.all_reduce(value)
    return value


def all_reduce_max(values: list[int]) -> list[int]:
    """The largest over ranks of every integer."""
    if world_size() == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.int64, device=local_device())
    with trace_span("maximum over ranks"):
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return [int(value) for value in tensor.tolist()]


def all_gather_objects(value: T) -> list[T]:
    """A picklable value of every rank, by rank."""
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
        The parts by rank, and this process's rank.
    """
    if world_size() == 1:
        return [value.detach()], 0
    with trace_span("gather tensors from every rank"):
        sizes = torch.zeros(world_size(), dtype=torch.int64, device=value.device)
        sizes[rank()] = value.shape[0]
        dist.all_reduce(sizes)
        longest = int(sizes.max())
        padded = value.new_zeros((longest, *value.shape[1:]))
        padded[: value.shape[0]] = value.detach()
        parts = [torch.empty_like(padded) for _ in range(world_size())]
        dist.all_gather(parts, padded)
    return [part[:size] for part, size in zip(parts, sizes.tolist(), strict=True)], rank()
