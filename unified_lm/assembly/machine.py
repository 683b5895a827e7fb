"""Settings that the machine decides, filled in before anything is built: `model.dtype=auto`, `parallel.backend=auto`, and how
many graphs GradCache keeps (`packing.num_retained`)."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch

from unified_lm.composition.validate import find_problems
from unified_lm.config.schema import RunConfig
from unified_lm.core import distributed
from unified_lm.core.agreement import run_on_rank0
from unified_lm.core.errors import ConfigError, ModelError
from unified_lm.engine.accounting.estimate import estimate, packs_twice
from unified_lm.models.precision import AUTO, auto_dtype

_BACKENDS = ("ddp", "zero1", "zero2", "zero3")
"""What `parallel.backend=auto` tries, in this order: each holds less on a rank, and communicates more, than the one before."""
_USABLE = 0.9
"""Share of a device's memory that an estimate may fill; the rest is for what it does not count."""
_SPARE = {"cuda": 0.75, "cpu": 0.5}
"""Share of the free memory that a run may fill with graphs it could do without; on a CPU other programs want some, too."""
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_CGROUP_USED = Path("/sys/fs/cgroup/memory.current")
_MEMINFO = Path("/proc/meminfo")


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
        try:
            needed = estimate(candidate, ranks).total_bytes
        except ModelError as unknown:  # a family that only its own code describes, say
            return _BACKENDS[0], f"{unknown} Set parallel to choose another"
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


def settle_retained(config: RunConfig, earlier: RunConfig | None = None) -> tuple[RunConfig, list[str]]:
    """Fill in `packing.num_retained` where the run forwards packs twice: as many as fit every rank's free memory. Collective.

    Compiled blocks may round differently with a graph than without one, so such a run keeps the number that it began with.

    Args:
        config: the run, with its dtype and backend filled in.
        earlier: the settings of the run that it goes on from.

    Returns:
        The run, and a notice of what was chosen where there is a choice.
    """
    if config.packing.num_retained is not None:
        return config, []
    if config.model.compile and earlier is not None and earlier.packing.num_retained is not None:
        return replace(config, packing=replace(config.packing, num_retained=earlier.packing.num_retained)), []
    ranks = distributed.world_size()
    free = min(distributed.all_gather_objects(free_memory(distributed.local_device())))
    retained, reason = run_on_rank0(lambda: choose_retained(config, ranks, free))
    notices = [f"packing.num_retained is {retained}: {reason}"] if reason else []
    return replace(config, packing=replace(config.packing, num_retained=retained)), notices


def choose_retained(config: RunConfig, ranks: int, free: int) -> tuple[int, str]:
    """How many graphs of packs that are forwarded twice fit the free memory, at least one, and a clause that says why.

    Args:
        config: the run, with its dtype and backend filled in.
        ranks: processes of the run.
        free: bytes that are free on the fullest device before anything is loaded.
    """
    twice = packs_twice(config, ranks)
    # Without checkpointing a graph holds views of weights that ZeRO-3 gathered: every one that is kept would be a whole model.
    if twice <= 1 or (config.parallel.zero_stage == 3 and not config.model.gradient_checkpointing):
        return 1, ""
    try:
        found = estimate(replace(config, packing=replace(config.packing, num_retained=1)), ranks)
    except ModelError as unknown:  # a family that only its own code describes, say
        return 1, f"{unknown} Set it to keep more."
    share = _SPARE.get(distributed.local_device().type, min(_SPARE.values()))
    each = found.bytes_by_part["activations"]
    room = int(share * free) - found.total_bytes
    retained = max(1, min(twice, 1 + room // max(1, each)))
    return retained, (
        f"of up to {twice} packs a step that GradCache would forward twice, {retained} keep their graphs, "
        f"{each / 2**30:,.2f} GiB each by the estimate ({share:.0%} of {free / 2**30:,.1f} GiB free may be filled)."
    )


def free_memory(device: torch.device) -> int:
    """Bytes of a rank's device that nobody uses; on a CPU its share of what the node (or its control group) has available."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    available = device_memory(device) * _local_ranks()
    if _MEMINFO.is_file():
        lines = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
        available = min(available, 1024 * int(lines["MemAvailable"].split()[0]))
    if _CGROUP_LIMIT.is_file() and (limit := _CGROUP_LIMIT.read_text().strip()) != "max" and _CGROUP_USED.is_file():
        available = min(available, max(0, int(limit) - int(_CGROUP_USED.read_text())))
    return available // _local_ranks()


def device_memory(device: torch.device) -> int:
    """Bytes of a rank's device; on a CPU its share of the node's memory (of its control group's, where that is less)."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _CGROUP_LIMIT.read_text().strip() if _CGROUP_LIMIT.is_file() else "max"
    if limit != "max":
        total = min(total, int(limit))
    return total // _local_ranks()


def _local_ranks() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", distributed.world_size()))
