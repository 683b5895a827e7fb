"""A loss or gradient that is not finite: skipped, counted, its rows saved, and in the end an error."""

from __future__ import annotations

import json
import math
from typing import ClassVar

import pytest
import torch

from tests.engine.small_run import metrics, small_run
from tests.engine.tiny import WEIGHTS, embedding_objectives, make_samples, make_trainable
from tests.processes import NEEDS_DEEPSPEED, Group
from unified_lm.batch import make_batch
from unified_lm.config.schema import OptimConfig
from unified_lm.core.errors import ModelError
from unified_lm.engine.backends.backend import TorchBackend
from unified_lm.engine.embedding_term import EmbeddingTerm
from unified_lm.engine.skipping import SkippedSteps
from unified_lm.engine.step import GradCacheStep


def poison(rank: int, calls: set[int]) -> None:
    """Make some calls of the token objective return an infinite loss, with a gradient that is finite."""
    from unified_lm.engine import fit
    from unified_lm.objectives.token import NextToken

    original, step = NextToken.__call__, fit._train_step
    counted = [0]

    def counting(*arguments, **named):
        counted[0] += 1
        return step(*arguments, **named)

    def spoilt(self, hidden, head, part):
        term = original(self, hidden, head, part)
        return type(term)(term.sum + math.inf, term.count) if counted[0] in calls and rank == 1 else term

    fit._train_step = counting
    NextToken.__call__ = spoilt


def poison_one_step(rank: int) -> None:
    poison(rank, {2})


def poison_from_the_third(rank: int) -> None:
    poison(rank, set(range(3, 100)))


@pytest.mark.parametrize("backend", ["ddp", pytest.param("zero2", marks=[NEEDS_DEEPSPEED, pytest.mark.slow])])
def test_one_bad_step_is_skipped_and_counted(tmp_path, backend):
    arguments = small_run(tmp_path, tmp_path / "run", "max_steps=4", f"parallel={backend}")
    group = Group(arguments, 2, tmp_path / "log", prepare=poison_one_step)
    assert group.wait() == [0, 0], group.output()
    lines = metrics(tmp_path / "run")
    assert [line["skipped_steps"] for line in lines] == [0, 1, 1, 1]
    assert "loss" not in lines[1], "JSON has no infinity"
    assert math.isfinite(lines[2]["loss"])
    rows = [json.loads(line) for line in (tmp_path / "run" / "offending-step-2.jsonl").read_text().splitlines()]
    assert {row["rank"] for row in rows} == {0, 1}
    assert {row["stream"] for row in rows} == {"embedding", "generation"}
    assert len(rows) == lines[1]["samples"]
    assert any("say" in row["text"] for row in rows)
    if backend == "ddp":
        assert {row["finite_forward"] for row in rows if row["rank"] == 0} == {True}
        assert any(not row["finite_forward"] for row in rows if row["rank"] == 1)


def test_too_many_in_a_row_end_the_run(tmp_path):
    arguments = small_run(tmp_path, tmp_path / "run", "max_steps=20", "checkpoint.every=1", "optim.max_skipped_steps=3")
    group = Group(arguments, 2, tmp_path / "log", prepare=poison_from_the_third)
    assert group.wait() == [2, 2], group.output()
    assert "step 5: the loss or its gradient was not finite 3 times in a row" in group.output()
    assert "offending-step-5.jsonl" in group.output()
    assert "Traceback" not in group.output()


@pytest.mark.parametrize("poisoned", ["embedding", "generation", None])
def test_a_loss_that_is_not_finite_changes_nothing(poisoned):
    trainable = make_trainable()
    backend = TorchBackend(trainable, OptimConfig())
    objectives = embedding_objectives()
    holder = objectives if poisoned == "embedding" else trainable.token_objectives
    if poisoned is not None:
        original = holder[poisoned]

        class Spoilt:
            metrics: ClassVar[dict[str, float]] = {}

            def __call__(self, *arguments):
                term = original(*arguments)
                return type(term)(term.sum + math.inf, term.count)

        holder[poisoned] = Spoilt()
    before = {name: parameter.clone() for name, parameter in trainable.named_parameters()}
    step = GradCacheStep(backend.forward, backend.backward, WEIGHTS, [EmbeddingTerm(objectives, WEIGHTS)])
    samples, counts = make_samples()
    step(make_batch(samples, 64, counts))
    norm = backend.update(1e-3, 1.0)
    unchanged = all(torch.equal(parameter, before[name]) for name, parameter in trainable.named_parameters())
    assert (math.isfinite(norm), unchanged) == ((True, False) if poisoned is None else (False, True))


def test_a_good_step_starts_the_count_anew(tmp_path):
    skipped = SkippedSteps(limit=2)
    for bad in (True, False, True):
        skipped.count(skipped=bad)
        skipped.require_progress(1, {}, math.nan, tmp_path)
    assert (skipped.total, skipped.in_a_row) == (2, 1)
    skipped.count(skipped=True)
    with pytest.raises(ModelError, match="2 times in a row"):
        skipped.require_progress(4, {"a": math.inf}, math.nan, tmp_path)
