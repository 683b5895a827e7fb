"""The numbers of a report: held-out results before and after training with their intervals, and what the run cost."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unified_lm.core.errors import DataError
from unified_lm.engine.metrics import held_out_lines
from unified_lm.engine.validation_items import ItemScores, items_path, read_items
from unified_lm.evaluation.bootstrap import Interval, bootstrap_interval

FEWEST_ITEMS = 8
"""With fewer items a bootstrap has too few distinct resamples for a 95 % interval, and none is shown."""

_TITLES = {"ndcg@10": "nDCG@10", "recall@1": "recall@1"}


@dataclass(frozen=True)
class Score:
    """A number, with its confidence interval if there is one."""

    value: float
    interval: Interval | None = None


@dataclass(frozen=True)
class HeldOutResult:
    """One held-out metric before and after training.

    Attributes:
        name: as in metrics.jsonl.
        title: in words.
        lower_is_better: true for losses; None for a metric without a preferred direction (a log-probability).
        before: score at the first validation; None if the run has only one.
        after: score at the last validation.
        change: after minus before, paired by item; None if `before` is None.
        num_items: number of items averaged; None if the run has not stored them.
        unit: what an item is.
    """

    name: str
    title: str
    lower_is_better: bool | None
    before: Score | None
    after: Score
    change: Score | None
    num_items: int | None
    unit: str

    @property
    def verdict(self) -> str:
        """ "better", "worse" or "changed" if the interval of the change excludes 0, else "unclear"; "" without an interval."""
        if self.change is None or self.change.interval is None:
            return ""
        if self.change.interval.low <= 0 <= self.change.interval.high:
            return "unclear"
        if self.lower_is_better is None:
            return "changed"
        return "better" if (self.change.value < 0) == self.lower_is_better else "worse"


@dataclass(frozen=True)
class HeldOutTable:
    """Held-out results of a run.

    Attributes:
        first_step: step of the first validation.
        last_step: step of the last validation.
        results: one result per metric, in the order of metrics.jsonl.
        has_items: whether both validations stored scores by item.
    """

    first_step: int
    last_step: int
    results: Sequence[HeldOutResult]
    has_items: bool


def held_out_table(run_dir: Path, *, level: float = 0.95, num_resamples: int = 1000) -> HeldOutTable | None:
    """Compare the first and the last validation of a run; None if it has no validation.

    Intervals are percentile bootstraps over the items of a metric (queries; batches for losses); the change is resampled in
    pairs, so the variation common to both validations cancels. They cover variation of the held-out items, not of the
    training seed.

    Args:
        run_dir: the folder of the run.
        level: nominal coverage of the intervals.
        num_resamples: number of resamples per bootstrap.

    Raises:
        DataError: the scores of a validation are damaged or do not agree with metrics.jsonl.
    """
    lines = held_out_lines(run_dir)
    if not lines:
        return None
    first, last = lines[0], lines[-1]
    items_first, items_last = (_checked_items(run_dir, line) for line in (first, last))
    results = []
    for name in (name for name in last if name != "step"):
        before = first.get(name) if len(lines) > 1 else None
        results.append(_result(name, before, last[name], items_first.get(name), items_last.get(name), level, num_resamples))
    has_items = bool(items_first) and bool(items_last)
    return HeldOutTable(int(first["step"]), int(last["step"]), results, has_items)


def _checked_items(run_dir: Path, line: Mapping[str, Any]) -> dict[str, ItemScores]:
    step = int(line["step"])
    items = read_items(run_dir, step)
    for name, scores in items.items():
        reported = line.get(name)
        if reported is not None and not _agree(scores.mean, reported):
            raise DataError(
                f"{items_path(run_dir, step)}: the mean of {name} is {scores.mean:.6g}, metrics.jsonl says {reported:.6g}. "
                "The file belongs to another run; remove it."
            )
    return items


def _agree(first: float, second: float) -> bool:
    return math.isclose(first, second, rel_tol=1e-9, abs_tol=1e-12) or (math.isnan(first) and math.isnan(second))


def _result(
    name: str,
    before: float | None,
    after: float,
    items_before: ItemScores | None,
    items_after: ItemScores | None,
    level: float,
    num_resamples: int,
) -> HeldOutResult:
    def interval(*items: ItemScores | None) -> Interval | None:
        """The interval of one validation, or of the difference between two; see `_interval`."""
        return _interval(items, level, num_resamples)

    kept = items_after or items_before
    return HeldOutResult(
        name=name,
        title=metric_title(name),
        lower_is_better=lower_is_better(name),
        before=None if before is None else Score(before, interval(items_before)),
        after=Score(after, interval(items_after)),
        change=None if before is None else Score(after - before, interval(items_before, items_after)),
        num_items=None if kept is None else len(kept.scores),
        unit="" if kept is None else kept.unit,
    )


def lower_is_better(name: str) -> bool | None:
    """True for a loss, False for a metric to maximize, None for one without a preferred direction."""
    if name.startswith("heldout/") and name.count("/") == 1:
        return True
    return False if name.startswith("retrieval") or name.endswith("/accuracy") else None


def metric_title(name: str) -> str:
    """The display name of a held-out metric of metrics.jsonl."""
    kind, _, rest = name.partition("/")
    if kind == "heldout":
        return rest.replace("/", " ").replace("_", " ") if "/" in rest else f"{rest} loss"
    mask = kind.partition("_")[2]
    return f"retrieval {_TITLES.get(rest, rest)}" + (f", read {mask}ly" if mask else "")


def _interval(items: Sequence[ItemScores | None], level: float, num_resamples: int) -> Interval | None:
    """Interval of a weighted mean, or of the difference (second minus first) between two on the same items."""
    found = [scores for scores in items if scores is not None]
    sizes = {len(scores.scores) for scores in found}
    if len(found) < len(items) or len(sizes) != 1 or min(sizes) < FEWEST_ITEMS:
        return None
    arrays = [np.stack([scores.scores, scores.weights or np.ones(len(scores.scores))], axis=1) for scores in found]
    if not all(np.isfinite(array).all() for array in arrays):  # a diverged run: an interval would mean nothing
        return None

    def statistic(*drawn: np.ndarray) -> float:
        """Weighted mean of the last array `[items, (score, weight)]`, minus that of the first if there are two."""
        means = [float(array[:, 0] @ array[:, 1] / array[:, 1].sum()) for array in drawn]
        return means[-1] - (means[0] if len(means) > 1 else 0.0)

    return bootstrap_interval(statistic, *arrays, level=level, num_resamples=num_resamples)


@dataclass(frozen=True)
class Cost:
    """The cost of the steps of a run, without validation, saving and loading.

    Attributes:
        num_steps: optimizer steps taken.
        num_measured: number of steps in metrics.jsonl (`logging.every`); if smaller, sums are scaled up to all steps.
        seconds: duration of all steps.
        tokens: non-padding tokens over all ranks.
        samples: samples over all ranks.
        device_hours: hours times ranks; None if the run has not recorded the number of ranks.
        device_type: "cuda", "cpu"; "" if not recorded.
        model_flops: floating-point operations of the steps over all ranks; None if not measured.
        mfu: model FLOPs utilization, weighted by step time; None if not measured.
        memory_peak_gib: peak memory of the fullest rank, in GiB; None if not measured.
    """

    num_steps: int
    num_measured: int
    seconds: float
    tokens: float
    samples: float
    device_hours: float | None
    device_type: str
    model_flops: float | None
    mfu: float | None
    memory_peak_gib: float | None

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second over all steps and ranks."""
        return self.tokens / self.seconds


def run_cost(lines: Iterable[Mapping[str, Any]], starts: Sequence[Mapping[str, Any]]) -> Cost | None:
    """Sum the steps of metrics.jsonl; None if no step was measured.

    Args:
        lines: lines of metrics.jsonl.
        starts: the starts recorded in run.json, each with "from_step", "num_ranks" and "device_type", in order.
    """
    steps = {int(line["step"]): line for line in lines if "step_seconds" in line}  # the later line of a repeated step wins
    if not steps:
        return None
    taken = max(steps)
    scale = taken / len(steps)
    measured = list(steps.values())
    seconds = [float(line["step_seconds"]) for line in measured]

    def total(name: str) -> float:
        """Sum over all steps; steps without a measurement count as an average one."""
        return math.fsum(float(line.get(name, 0.0)) for line in measured) * scale

    def weighted(name: str) -> float | None:
        """Sum of value times seconds over the measured steps; None if a step lacks the value."""
        if not all(name in line for line in measured):
            return None
        return math.fsum(float(line[name]) * time for line, time in zip(measured, seconds, strict=True))

    teraflops, busy = weighted("model_teraflops_per_second"), weighted("mfu")
    device_seconds = [time * ranks for step, time in zip(steps, seconds, strict=True) if (ranks := _ranks(step, starts))]
    return Cost(
        num_steps=taken,
        num_measured=len(steps),
        seconds=math.fsum(seconds) * scale,
        tokens=total("tokens"),
        samples=total("samples"),
        device_hours=math.fsum(device_seconds) * scale / 3600 if len(device_seconds) == len(steps) else None,
        device_type=str(starts[-1]["device_type"]) if starts else "",
        model_flops=None if teraflops is None else teraflops * 1e12 * scale,
        mfu=None if busy is None else busy / math.fsum(seconds),
        memory_peak_gib=max((float(line["memory_peak_gib"]) for line in measured if "memory_peak_gib" in line), default=None),
    )


def _ranks(step: int, starts: Sequence[Mapping[str, Any]]) -> int:
    """Number of processes that took a step; 0 if unknown."""
    return int(next((start["num_ranks"] for start in reversed(starts) if start["from_step"] < step), 0))
