"""The scores behind every held-out number of a run, in `RUN/validation/step-N.json`: what confidence intervals are made of.

A file holds `{"step": N, "metrics": {NAME: {"unit": UNIT, "scores": [...], "weights": [...] | null}}}`; UNIT is one of
`UNITS`, and the metric of that name in `metrics.jsonl` is the weighted mean of the scores.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from unified_lm.core.errors import DataError
from unified_lm.core.files import write_text
from unified_lm.core.user_files import read_json

FOLDER = "validation"
UNITS = ("query", "batch", "sample")
"""What one score is of."""


@dataclass(frozen=True)
class ItemScores:
    """Scores whose mean is a metric.

    Attributes:
        unit: what one score is of: "query" (0 to 1), "batch" (a loss in nats) or "sample" (a log-probability in nats, or 0 or
            1).
        scores: one per item, in the order of the held-out data.
        weights: one per item, >= 0 (supervised tokens of a batch); None weighs all the same.
    """

    unit: str
    scores: Sequence[float]
    weights: Sequence[float] | None = None

    @property
    def mean(self) -> float:
        """The metric: the weighted mean, computed exactly and rounded once."""
        weights = [1.0] * len(self.scores) if self.weights is None else self.weights
        return math.fsum(score * weight for score, weight in zip(self.scores, weights, strict=True)) / math.fsum(weights)


def items_path(run_dir: Path, step: int) -> Path:
    """Where the scores of a validation lie."""
    return run_dir / FOLDER / f"step-{step:08d}.json"


def write_items(run_dir: Path, step: int, items: Mapping[str, ItemScores]) -> None:
    """Write the scores of one validation, replacing those of the same step. Call it on one rank."""
    content = {"step": step, "metrics": {name: asdict(scores) for name, scores in items.items()}}
    write_text(items_path(run_dir, step), json.dumps(content) + "\n")


def read_items(run_dir: Path, step: int) -> dict[str, ItemScores]:
    """The scores of one validation by metric; empty where the run has not kept them (it is older).

    Raises:
        DataError: the file is damaged.
    """
    path = items_path(run_dir, step)
    if not path.is_file():
        return {}
    fix = "Remove it: its step is then shown without intervals."
    content = read_json(path, fix=fix)
    try:
        return {str(name): _item_scores(value) for name, value in content["metrics"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise DataError(f"{path} is damaged ({error!r}). {fix}") from error


def _item_scores(value: Mapping[str, Any]) -> ItemScores:
    scores = [float(score) for score in value["scores"]]
    weights = None if value["weights"] is None else [float(weight) for weight in value["weights"]]
    if value["unit"] not in UNITS or not scores or (weights is not None and len(weights) != len(scores)):
        raise ValueError(f"unit {value['unit']!r}, {len(scores)} scores, {'no' if weights is None else len(weights)} weights")
    if not all(0 <= weight < math.inf for weight in weights or ()):
        raise ValueError("a weight that is below 0 or not finite")
    found = ItemScores(value["unit"], scores, weights)
    _ = found.mean  # raises where there is none: all weights are 0, or infinities cancel out
    return found
