"""Speed of a step, utilization of the device, and balance of the work between ranks."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch

from unified_lm.batch import Batch, Pack
from unified_lm.batch.pack import padded_tokens
from unified_lm.core import distributed
from unified_lm.engine.accounting.flops import ModelFlops
from unified_lm.engine.accounting.peaks import Peak, device_peak
from unified_lm.engine.step import GradCacheStep
from unified_lm.engine.training_module import TrainingModule
from unified_lm.models.backbone import PADDED

P = ParamSpec("P")
R = TypeVar("R")

_GIB = 2**30


def describe_device() -> str:
    """Name of this rank's device, for messages."""
    device = distributed.local_device()
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


class ComputeClock:
    """Sums the device time of wrapped calls: the computation of a rank, without waiting for other ranks.

    On CUDA, calls return before the work is done, so events are recorded around them and read at the end of the step. Under
    ZeRO-3 the time includes gathering weights during a forward.
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def timed(self, call: Callable[P, R]) -> Callable[P, R]:
        """Wrap a function so that its calls are timed."""

        def measured(*args: P.args, **kwargs: P.kwargs) -> R:
            """`call`, with its duration (device time on CUDA) added to the clock."""
            if distributed.local_device().type == "cuda":
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                begin.record()
                result = call(*args, **kwargs)
                end.record()
                self._events.append((begin, end))
                return result
            started = time.perf_counter()
            result = call(*args, **kwargs)
            self._seconds += time.perf_counter() - started
            return result

        return measured

    def read(self) -> float:
        """Seconds since the last reading; resets the clock to zero. Waits for the device."""
        if self._events:
            torch.cuda.synchronize()
            self._seconds += sum(begin.elapsed_time(end) for begin, end in self._events) / 1000
        seconds, self._seconds, self._events = self._seconds, 0.0, []
        return seconds


class StepMeter:
    """Computes the speed metrics of a step for `metrics.jsonl` and wandb. Collective: every rank calls it.

    Args:
        trainable: the module, for its sizes.
        step: what is measured; it knows what is forwarded beside once per pack.
        clock: times the step's forwards and backwards.
        recomputes: whether layers are computed again in the backward (gradient checkpointing).
    """

    def __init__(
        self, trainable: TrainingModule, step: GradCacheStep, clock: ComputeClock, *, recomputes: bool = False
    ) -> None:
        backbone = trainable.backbone
        self.flops = ModelFlops.of(trainable)
        self.step = step
        self.clock = clock
        self._padded = backbone.kernel == PADDED
        self._recomputes = recomputes
        self._dtype = trainable.autocast or backbone.head_weight.dtype
        self._peak: Peak | None = None

    @property
    def peak(self) -> Peak:
        """The peak of one device, to which MFU is relative."""
        if self._peak is None:
            self._peak = device_peak(distributed.local_device(), self._dtype)
        return self._peak

    def __call__(self, batch: Batch, seconds: float, data_seconds: float) -> dict[str, float]:
        """Speed metrics of one optimizer step over all ranks; docs/monitoring.md explains their names.

        Args:
            batch: this rank's part of the step.
            seconds: duration of the whole step on this rank.
            data_seconds: the part of `seconds` spent on loading the batch.
        """
        samples = [sample for pack in batch.packs for sample in pack.samples]
        model, hardware = self._step_flops(batch)
        memory, memory_peak = _memory()
        ranks = _gather(
            {
                "tokens": sum(map(len, samples)),
                "samples": len(samples),
                "packs": len(batch.packs),
                "truncated": batch.num_truncated,
                "positions": sum(_computed_positions(pack) if self._padded else len(pack) for pack in batch.packs),
                "positions_if_padded": padded_tokens(samples),
                "model_flops": model,
                "hardware_flops": hardware,
                "peak_flops": self.peak.flops,
                "seconds": seconds,
                "data_seconds": data_seconds,
                "compute_seconds": self.clock.read(),
                "memory": memory,
                "memory_peak": memory_peak,
            }
        )
        return _summarize(ranks)

    def _step_flops(self, batch: Batch) -> tuple[float, float]:
        """Operations that the step needs, and all that it executes: with GradCache's first forwards and recomputed layers."""
        model = sum(self.flops.training(pack) for pack in batch.packs)
        scored, again = self.step.extra_forwards(batch)
        model += sum(self.flops.forward(pack) for pack in scored)
        extra = sum(self.flops.forward(pack, tokens=False) for pack in again)
        if self._recomputes:
            extra += sum(self.flops.forward(pack, tokens=False) for pack in batch.packs)
        return model, model + extra


def _summarize(ranks: dict[str, torch.Tensor]) -> dict[str, float]:
    """Metrics of a step from the measurements of all ranks, float64 `[ranks]` by name."""
    total = {name: float(values.sum()) for name, values in ranks.items()}
    # The slowest rank determines the step's time: the others wait for it.
    most = {name: float(values.max()) for name, values in ranks.items()}
    seconds, tokens = most["seconds"], total["tokens"]
    return {
        **{name: total[name] for name in ("tokens", "samples", "packs", "truncated")},
        "tokens_per_second": tokens / seconds,
        "samples_per_second": total["samples"] / seconds,
        "padding_free_share": tokens / max(total["positions"], 1),
        "padding_share_if_padded": 1 - tokens / max(total["positions_if_padded"], 1),
        "model_teraflops_per_second": total["model_flops"] / seconds / 1e12,
        "mfu": total["model_flops"] / seconds / total["peak_flops"],
        "hfu": total["hardware_flops"] / seconds / total["peak_flops"],
        "memory_gib": most["memory"] / _GIB,
        "memory_peak_gib": most["memory_peak"] / _GIB,
        "imbalance_tokens": _max_over_mean(ranks["tokens"]),
        "imbalance_compute": _max_over_mean(ranks["compute_seconds"]),
        "compute_seconds": most["compute_seconds"],
        "data_seconds": most["data_seconds"],
        "data_share": most["data_seconds"] / seconds,
        "step_seconds": seconds,
    }


def _computed_positions(pack: Pack) -> int:
    """Number of positions of a pack with the kernel that pads samples to the longest one."""
    return len(pack.plan.lengths) * pack.plan.max_seqlen


def _max_over_mean(values: torch.Tensor) -> float:
    """1.0 if all ranks have the same value; N if one of N ranks has everything."""
    mean = float(values.mean())
    return float(values.max()) / mean if mean else 1.0


def _gather(values: dict[str, float]) -> dict[str, torch.Tensor]:
    """The values of every rank by name, float64 `[ranks]`."""
    row = torch.tensor(list(values.values()), dtype=torch.float64, device=distributed.local_device())
    parts, _ = distributed.all_gather_uneven(row[None])
    return dict(zip(values, torch.cat(parts).cpu().unbind(1), strict=True))


def _memory() -> tuple[float, float]:
    """Current and maximum bytes: allocated by torch on CUDA, resident memory of the process on the CPU."""
    device = distributed.local_device()
    if device.type == "cuda":
        return float(torch.cuda.memory_allocated(device)), float(torch.cuda.max_memory_allocated(device))
    # ru_maxrss is in bytes on macOS and in KiB elsewhere
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    statm = Path("/proc/self/statm")
    now = int(statm.read_text().split()[1]) * resource.getpagesize() if statm.exists() else peak
    return float(now), float(max(now, peak))
