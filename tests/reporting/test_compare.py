"""Differences between arms: what the interval is made of, and when there is none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from unified_lm.engine.validation_items import ItemScores
from unified_lm.evaluation.bootstrap import bootstrap_interval
from unified_lm.reporting.compare import Arm, ComparedRun, Comparison, compare

METRIC = "retrieval/ndcg@10"


def _run(name: str, seed: int, scores: np.ndarray, settings: dict[str, Any] | None = None) -> ComparedRun:
    items = {METRIC: ItemScores("query", scores.tolist())}
    after = {METRIC: float(scores.mean())}
    return ComparedRun(name, Path(name), settings or {}, seed, 1, True, {}, after, items)


def _comparison(ours: Arm, reference: Arm, differing: tuple[str, ...] = ()) -> Comparison:
    return Comparison([reference, ours], differing, [METRIC], reference, [])


def test_queries_measured_under_several_seeds_do_not_count_several_times() -> None:
    rng = np.random.default_rng(0)
    base, gain = rng.random(40), rng.normal(0.05, 0.2, 40)
    one = _comparison(Arm("a", [_run("a", 1, base + gain)]), Arm("b", [_run("b", 1, base)]))
    three = _comparison(
        Arm("a", [_run("a", seed, base + gain) for seed in (1, 2, 3)]), Arm("b", [_run("b", seed, base) for seed in (1, 2, 3)])
    )
    found = [comparison.difference(comparison.arms[1], METRIC) for comparison in (one, three)]
    expected = bootstrap_interval(lambda d: float(d.mean()), gain)
    for interval in found:
        assert interval is not None
        assert (interval.value, interval.low, interval.high) == pytest.approx((expected.value, expected.low, expected.high))


def test_other_queries_are_not_paired() -> None:
    key = "validation.retrieval.queries.path"
    scores = np.linspace(0, 1, 20)
    arms = [Arm(name, [_run(name, 1, scores, {key: path})]) for name, path in (("a", "x"), ("b", "y"), ("c", "x"))]
    comparison = Comparison(arms, [key], [METRIC], arms[0], [])
    assert comparison.difference(arms[1], METRIC) is None
    assert comparison.difference(arms[2], METRIC) is not None


def test_runs_that_are_not_finished_are_left_out_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = np.linspace(0, 1, 20)
    settings = {"max_steps": 20, "optim.learning_rate": 1.0}
    done, begun = (_run("a", seed, scores - seed, settings) for seed in (0, 1))
    begun = replace(begun, name="a-seed1", step=0, finished=False)
    monkeypatch.setattr("unified_lm.reporting.compare._load", lambda folders: [done, begun])
    found = compare([])
    assert found.reference.mean(METRIC) == pytest.approx(0.5)
    assert "Not finished, left out: a-seed1 (step 0 of 20)." in found.notes
    monkeypatch.setattr("unified_lm.reporting.compare._load", lambda folders: [begun])
    found = compare([])
    assert found.reference.mean(METRIC) == pytest.approx(-0.5)
    assert "Not finished: a-seed1 (step 0 of 20)." in found.notes
