"""Settings that the machine decides: `model.dtype=auto` and `parallel.backend=auto`, filled in before anything is built."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch

from unified_lm.composition.validate import find_problems
from unified_lm.config.schema import RunConfig
from unified_lm.core import distributed
from unified_lm.core.agreement import run_on_rank0
from unified_lm.core.errors import ConfigError
from unified_lm.engine.accounting.estimate import estimate
from unified_lm.models.precision import AUTO, auto_dtype

_BACKENDS = ("ddp", "zero1", "zero2", "zero3")
"""What `parallel.backend=auto` tries, in this order: each holds less on a rank, and communicates more, than the one before."""
_USABLE = 0.9
"""Share of a device's memory that an estimate may fill; the rest is for what it does not count."""
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def settle_dtype(config: RunConfig, earlier: RunConfig | None = None) -> tuple[RunConfig, list[str]]:
    """Fill in `model.dtype=auto`. Collective.

    Args:
        config: the run.
        earlier: the settings of the run that it goes on from, whose dtype it keeps on any machine.

    Returns:
        The run, and a notice of what was chosen and why.

    Raises:
        ConfigError: another setting cannot go with what this machine has.
    """
    if config.model.dtype != AUTO:
        return config, []
    if earlier is not None and earlier.model.dtype != AUTO:
        dtype, reason = earlier.model.dtype, "as this run began"
    else:
        # nodes may differ: bfloat16 where all of them have it
        found = distributed.all_gather_objects(auto_dtype(distributed.local_device()))
        dtype, reason = max(found)
    settled = replace(config, model=replace(config.model, dtype=dtype))
    notice = f"model.dtype=auto is {dtype}: {reason}."
    if problems := find_problems(settled):
        raise ConfigError([f"{problem} ({notice})" for problem in problems])
    return settled, [notice]


def settle_backend(config: RunConfig) -> tuple[RunConfig, list[str]]:
    """Fill in `parallel.backend=auto` where several ranks train: the first whose estimate fits every device. Collective.

    One process keeps everything, whatever fits.

    Returns:
        The run, and a notice of what was chosen and why.

    Raises:
        ModelError: the model's configuration cannot be found.
    """
    ranks = distributed.world_size()
    if config.parallel.backend != AUTO or ranks == 1:
        return config, []
    memory = min(distributed.all_gather_objects(device_memory(distributed.local_device())))
    backend, reason = run_on_rank0(lambda: choose_backend(config, ranks, memory))
    return with_backend(config, backend), [f"parallel=auto is {backend}: {reason}."]


def choose_backend(config: RunConfig, ranks: int, memory: int) -> tuple[str, str]:
    """The first of ddp, zero1, zero2 and zero3 that fits, among those that the run's other settings allow.

    Args:
        config: the run, with its dtype filled in.
        ranks: processes of the run, above 1.
        memory: bytes of the smallest device.

    Returns:
        The backend (the one that takes least where none fits), and a clause that says why.
    """
    tried: dict[str, float] = {}
    for backend in _BACKENDS:
        candidate = with_backend(config, backend)
        if find_problems(candidate):
            continue
        needed = estimate(candidate, ranks).total_bytes
        tried[backend] = needed / 2**30
        if needed <= _USABLE * memory:
            break
    fits = f"{_USABLE:.0%} of {memory / 2**30:,.1f} GiB a device"
    if needed <= _USABLE * memory:
        others = ", ".join(f"{name} {size:,.1f}" for name, size in tried.items() if name != backend)
        return backend, f"its estimate, {tried[backend]:,.1f} GiB, fits {fits}" + (f"; too large: {others}" if others else "")
    least = min(tried, key=tried.__getitem__)
    sizes = ", ".join(f"{name} {size:,.1f}" for name, size in tried.items())
    return least, f"NO BACKEND'S ESTIMATE FITS {fits} (GiB: {sizes}); lower packing.token_budget, or use more devices"


def with_backend(config: RunConfig, backend: str) -> RunConfig:
    """The run on another backend."""
    return replace(config, parallel=replace(config.parallel, backend=backend))


def device_memory(device: torch.device) -> int:
    """Bytes of a rank's device; on a CPU its share of the node's memory (of its control group's, where that is less)."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _CGROUP_LIMIT.read_text().strip() if _CGROUP_LIMIT.is_file() else "max"
    if limit != "max":
        total = min(total, int(limit))
    return total // int(os.environ.get("LOCAL_WORLD_SIZE", distributed.world_size()))
