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
"""Below so many items a bootstrap has too few different draws for an interval of 95%, and none is shown."""

_TITLES = {"ndcg@10": "nDCG@10", "recall@1": "recall@1"}


@dataclass(frozen=True)
class Score:
    """A number, with its interval where there is one."""

    value: float
    interval: Interval | None = None


@dataclass(frozen=True)
class HeldOutResult:
    """One held-out metric before and after training.

    Attributes:
        name: as in metrics.jsonl.
        title: in words.
        lower_is_better: true for losses; None for what is neither good nor bad in itself (a log-probability).
        before: at the first validation; None where the run has only one.
        after: at the last one.
        change: after minus before, paired item by item; None with `before`.
        num_items: how many items it is the mean of; None where the run has not kept them.
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
        """What the change is where its interval excludes 0 (better, worse, or only changed), else "unclear"; "" without one."""
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
        first_step: of the first validation.
        last_step: of the last one.
        results: by metric, in the order of metrics.jsonl.
        has_items: whether both validations kept their scores by item.
    """

    first_step: int
    last_step: int
    results: Sequence[HeldOutResult]
    has_items: bool


def held_out_table(run_dir: Path, *, level: float = 0.95, num_resamples: int = 1000) -> HeldOutTable | None:
    """First against last validation of a run; None where it has none.

    Intervals are percentile bootstraps over the items of a metric (queries; batches for losses); the change is resampled in
    pairs, so what the items have in common cancels. They tell how far the numbers would move with other held-out items, not
    with another training seed.

    Args:
        run_dir: the folder of the run.
        level: coverage of the intervals.
        num_resamples: draws of each bootstrap.

    Raises:
        DataError: the scores of a validation are damaged, or are not those that metrics.jsonl tells of.
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
                "The file is of another run; remove it."
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
        """The interval of one validation, or of the difference of two; see `_interval`."""
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
    """A held-out metric of metrics.jsonl in words."""
    kind, _, rest = name.partition("/")
    if kind == "heldout":
        return rest.replace("/", " ").replace("_", " ") if "/" in rest else f"{rest} loss"
    mask = kind.partition("_")[2]
    return f"retrieval {_TITLES.get(rest, rest)}" + (f", read {mask}ly" if mask else "")


def _interval(items: Sequence[ItemScores | None], level: float, num_resamples: int) -> Interval | None:
    """Of a weighted mean, or of the difference (second minus first) of two on the same items."""
    found = [scores for scores in items if scores is not None]
    sizes = {len(scores.scores) for scores in found}
    if len(found) < len(items) or len(sizes) != 1 or min(sizes) < FEWEST_ITEMS:
        return None
    arrays = [np.stack([scores.scores, scores.weights or np.ones(len(scores.scores))], axis=1) for scores in found]
    if not all(np.isfinite(array).all() for array in arrays):
        return None

    def statistic(*drawn: np.ndarray) -> float:
        """The weighted mean of the last of arrays `[items, (score, weight)]`, less that of the first if there are two."""
        means = [float(array[:, 0] @ array[:, 1] / array[:, 1].sum()) for array in drawn]
        return means[-1] - (means[0] if len(means) > 1 else 0.0)

    return bootstrap_interval(statistic, *arrays, level=level, num_resamples=num_resamples)


@dataclass(frozen=True)
class Cost:
    """What the steps of a run took; validation, saving and loading are not in it.

    Attributes:
        num_steps: optimizer steps taken.
        num_measured: of them those in metrics.jsonl (`logging.every`); where fewer, sums are scaled up to all steps.
        seconds: of the steps.
        tokens: real tokens, over all ranks.
        samples: over all ranks.
        device_hours: seconds times ranks; None where the run has not recorded how many there were.
        device_type: "cuda", "cpu"; "" where not recorded.
        model_flops: operations that the steps needed, over all ranks; None where not measured.
        mfu: of the steps, weighted by their time; None where not measured.
        memory_peak_gib: of the fullest rank; None where not measured.
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
        """Over all steps and ranks."""
        return self.tokens / self.seconds


def run_cost(lines: Iterable[Mapping[str, Any]], starts: Sequence[Mapping[str, Any]]) -> Cost | None:
    """Add up the steps of metrics.jsonl; None where no step was measured.

    Args:
        lines: of metrics.jsonl.
        starts: of run.json, each with "from_step", "num_ranks" and "device_type", in order.
    """
    steps = {int(line["step"]): line for line in lines if "step_seconds" in line}  # of a step taken twice the later counts
    if not steps:
        return None
    taken = max(steps)
    scale = taken / len(steps)
    measured = list(steps.values())
    seconds = [float(line["step_seconds"]) for line in measured]

    def total(name: str) -> float:
        """Sum over all steps taken, those without a measurement counted as the average one."""
        return math.fsum(float(line.get(name, 0.0)) for line in measured) * scale

    def weighted(name: str) -> float | None:
        """Sum over the measured steps of value times seconds; None where a step lacks the value."""
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
    """Processes that took a step; 0 where nothing tells."""
    return int(next((start["num_ranks"] for start in reversed(starts) if start["from_step"] < step), 0))
