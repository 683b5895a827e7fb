"""A rank that hangs ends the run on every rank, with its name and place; long work of rank 0 does not."""

from __future__ import annotations

import time

import pytest

from tests.engine.processes import Group
from tests.engine.small_run import small_run
from unified_lm.core.places import place, present
from unified_lm.core.watchdog import HUNG

TIMEOUT = 0.1  # minutes


def sleep_in_the_second_step(rank: int) -> None:
    from unified_lm.data.loader import StepLoader

    original = StepLoader.next_batch
    calls = []

    def next_batch(self):
        calls.append(None)
        if rank == 1 and len(calls) == 2:
            time.sleep(1000)
        return original(self)

    StepLoader.next_batch = next_batch


def sleep_in_the_export(rank: int) -> None:
    from unified_lm.build import stages

    stages.check_export = lambda run: None
    stages.export_run = lambda run, console: time.sleep(3 * TIMEOUT * 60)


def fail_in_the_export(rank: int) -> None:
    from unified_lm.build import stages
    from unified_lm.core.errors import CheckpointError

    def fail(run, console):
        raise CheckpointError("the export failed")

    stages.check_export = lambda run: None
    stages.export_run = fail


def test_a_hung_rank_is_named_and_every_rank_ends(tmp_path):
    arguments = small_run(tmp_path, tmp_path / "run", "max_steps=5", f"parallel.timeout_minutes={TIMEOUT}")
    group = Group(arguments, 2, tmp_path / "log", prepare=sleep_in_the_second_step)
    assert group.wait(90) == [HUNG, HUNG], group.output()
    output = group.output()
    assert "error: Rank 0 of 2 has waited" in output
    assert "in 'step 2 >" in output
    assert "Missing: rank 1 is outside any exchange" in output
    assert "in 'load a batch'" in output
    assert "Rank 0 has given up" in output, "the hung rank speaks, too"
    assert "in next_batch" in output, "and shows where it hangs"


def test_long_work_of_rank_0_is_no_hang(tmp_path):
    arguments = small_run(
        tmp_path, tmp_path / "run", "max_steps=1", f"parallel.timeout_minutes={TIMEOUT}", "export.enabled=true"
    )
    group = Group(arguments, 2, tmp_path / "log", prepare=sleep_in_the_export)
    assert group.wait(90) == [0, 0], group.output()


def test_a_failure_of_rank_0_reaches_the_ranks_that_wait_for_it(tmp_path):
    arguments = small_run(tmp_path, tmp_path / "run", "max_steps=1", "export.enabled=true")
    group = Group(arguments, 2, tmp_path / "log", prepare=fail_in_the_export)
    assert group.wait(90) == [2, 2], group.output()
    assert "the export failed" in group.output()


def test_places_are_told_apart_and_progress_starts_the_time_anew():
    with place("outer", waits=False):
        time.sleep(0.05)
        with place("inner"):
            where, waits, seconds = present()
            assert (where, waits) == ("outer > inner", True)
            assert seconds < 0.05
        assert present()[:2] == ("outer", False)
    assert present()[:2] == ("after 'outer'", False)


def test_a_place_is_left_when_it_fails():
    with pytest.raises(KeyError), place("somewhere"):
        raise KeyError
    assert present()[0] == "after 'somewhere'"
