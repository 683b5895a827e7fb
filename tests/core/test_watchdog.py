"""A rank that hangs ends the run on every rank, with its name and place; long work of rank 0 does not."""

from __future__ import annotations

import threading
import time

import pytest

from tests.engine.small_run import small_run
from tests.processes import Group
from unified_lm.core.tracing import current_span, trace_span
from unified_lm.core.watchdog import HUNG, Watchdog

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
    from unified_lm.assembly import stages

    stages.check_export = lambda run: None
    stages.write_export = lambda run, console: time.sleep(1.5 * TIMEOUT * 60)


def slowed(call, share):
    """A function after a part of the time that ranks wait for each other."""

    def slow_call(*args):
        time.sleep(share * TIMEOUT * 60)
        return call(*args)

    return slow_call


def write_slowly(rank: int) -> None:
    """Each of about 60 tensors takes rank 0 a little, ending its file and flushing all of them takes longer than ranks wait."""
    from unified_lm.checkpoint import state
    from unified_lm.checkpoint.tensor_shards import ShardWriter

    if rank == 0:
        ShardWriter.add = slowed(ShardWriter.add, 0.04)
        ShardWriter.close = slowed(ShardWriter.close, 1.2)
        state.sync = slowed(state.sync, 0.3)


def read_slowly(rank: int) -> None:
    from unified_lm.checkpoint.tensor_shards import ShardReader

    if rank == 0:
        ShardReader.__call__ = slowed(ShardReader.__call__, 0.04)


def fail_in_the_export(rank: int) -> None:
    from unified_lm.assembly import stages
    from unified_lm.core.errors import CheckpointError

    def fail(run, console):
        raise CheckpointError("the export failed")

    stages.check_export = lambda run: None
    stages.write_export = fail


def test_a_hung_rank_is_named_and_every_rank_ends(tmp_path):
    arguments = small_run(tmp_path, tmp_path / "run", "max_steps=5", f"parallel.timeout_minutes={TIMEOUT}")
    group = Group(arguments, 2, tmp_path / "log", prepare=sleep_in_the_second_step)
    assert group.wait(90) == [HUNG, HUNG], group.output()
    output = group.output()
    assert "error: Rank 0 of 2 has waited" in output
    assert "in 'step 2 >" in output
    assert "Missing: rank 1 is outside any collective" in output
    assert "in 'load a batch'" in output
    assert "Rank 0 has given up" in output, "the hung rank speaks, too"
    assert "in next_batch" in output, "and shows where it hangs"


def test_long_work_of_rank_0_is_no_hang(tmp_path):
    arguments = small_run(
        tmp_path, tmp_path / "run", "max_steps=1", f"parallel.timeout_minutes={TIMEOUT}", "export.enabled=true"
    )
    group = Group(arguments, 2, tmp_path / "log", prepare=sleep_in_the_export)
    assert group.wait(90) == [0, 0], group.output()


@pytest.mark.slow
def test_slow_files_are_no_hang(tmp_path):
    for prepare, more in ((write_slowly, ["max_steps=1"]), (read_slowly, ["max_steps=2", "resume=auto"])):
        arguments = small_run(tmp_path, tmp_path / "run", f"parallel.timeout_minutes={TIMEOUT}", *more)
        group = Group(arguments, 2, tmp_path / f"{len(more)}.log", prepare=prepare)
        assert group.wait(120) == [0, 0], group.output()


class Store(dict):
    """What a watchdog needs of the store of a process group."""

    set = dict.__setitem__
    get = dict.__getitem__

    def check(self, keys):
        return all(key in self for key in keys)


@pytest.mark.parametrize("moves", [True, False])
def test_a_rank_is_waited_for_while_it_moves(moves):
    watchdog = Watchdog(0.4, Store())

    def work():
        for number in range(12):
            span = f"write {number if moves else 0}"
            watchdog._put("1", {"span": span, "waits": False, "seconds": 0.0 if moves else 0.1 * number, "time": time.time()})
            time.sleep(0.1)
        watchdog.set_flag("done")

    thread = threading.Thread(target=work)
    thread.start()
    watchdog.wait_while_it_moves("done", 1)
    assert (watchdog._lookup("done") is not None) == moves
    thread.join()


def test_a_failure_of_rank_0_reaches_the_ranks_that_wait_for_it(tmp_path):
    arguments = small_run(tmp_path, tmp_path / "run", "max_steps=1", "export.enabled=true")
    group = Group(arguments, 2, tmp_path / "log", prepare=fail_in_the_export)
    assert group.wait(90) == [2, 2], group.output()
    assert "the export failed" in group.output()


def test_places_are_told_apart_and_progress_starts_the_time_anew():
    with trace_span("outer", waits=False):
        time.sleep(0.05)
        with trace_span("inner"):
            where, waits, seconds = current_span()
            assert (where, waits) == ("outer > inner", True)
            assert seconds < 0.05
        assert current_span()[:2] == ("outer", False)
    assert current_span()[:2] == ("after 'outer'", False)


def test_a_place_is_left_when_it_fails():
    with pytest.raises(KeyError), trace_span("somewhere"):
        raise KeyError
    assert current_span()[0] == "after 'somewhere'"
