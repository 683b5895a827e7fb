"""Under a real torchrun of two processes a mistake is one message, and a rank that fails alone says which one it is."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.processes import Group
from unified_lm.core import distributed, failures
from unified_lm.core.errors import DataError

ROOT = Path(__file__).resolve().parents[2]


def group(prepare: Callable[[int], None] | None, log: Path, *arguments: str) -> str:
    """What two ranks print that fail, with the store of torchrun's agent."""
    ranks = Group(["recipe=grit_smollm2", "model=tiny_random", *arguments], 2, log, prepare, agent_store=True)
    assert all(ranks.wait()), ranks.output()
    return ranks.output()


def lose_a_file_on_rank_1(rank: int) -> None:
    distributed.initialize(1.0)
    if rank == 0:
        distributed.barrier()  # fails when the other rank ends
    raise DataError("no such file: shard-7.jsonl")


def divide_by_zero_on_rank_1(rank: int) -> None:
    distributed.initialize(1.0)
    if rank == 0:
        distributed.barrier()
    raise ZeroDivisionError("a bug")


def lose_two_files(rank: int) -> None:
    distributed.initialize(1.0)
    raise DataError(f"file of rank {rank}")


@pytest.mark.slow
def test_under_torchrun_a_mistake_of_every_rank_is_printed_once() -> None:
    """The test below with torchrun itself, which imports everything three times."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "train.py", "recipe=grit_smollm2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "max_stepss=3"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1, done.stderr
    assert "error on rank" not in done.stderr
    assert "Traceback" not in done.stderr.split("torch/distributed/elastic")[0]
    assert "exitcode  : 2" in done.stderr  # torchrun ends a rank that is still on its way out with SIGTERM


def test_a_mistake_that_is_found_before_the_ranks_know_each_other_is_printed_once(tmp_path: Path) -> None:
    printed = group(None, tmp_path / "log", "max_stepss=3")
    assert printed.count("error: ") == 1, printed
    assert "unknown key 'max_stepss'" in printed
    assert "error on rank" not in printed
    assert "Traceback" not in printed


def test_a_mistake_of_every_rank_is_printed_once(tmp_path: Path) -> None:
    printed = group(None, tmp_path / "log", "streams.embedding.sources=[{path: nowhere.jsonl}]", f"run_dir={tmp_path}/run")
    assert printed.count("error: ") == 1, printed
    assert "error on rank" not in printed
    assert "Traceback" not in printed


def test_a_rank_that_fails_alone_is_named_and_the_waiting_one_keeps_quiet(tmp_path: Path) -> None:
    printed = group(lose_a_file_on_rank_1, tmp_path / "log")
    assert printed.count("error") == 1, printed
    assert "error on rank 1 of 2: no such file: shard-7.jsonl" in printed
    assert "Traceback" not in printed


def test_a_bug_keeps_its_traceback_and_only_its_own(tmp_path: Path) -> None:
    printed = group(divide_by_zero_on_rank_1, tmp_path / "log")
    assert printed.count("ZeroDivisionError: a bug") == 1
    assert printed.count("Traceback") == 1, printed


def test_ranks_that_say_different_things_are_all_heard(tmp_path: Path) -> None:
    printed = group(lose_two_files, tmp_path / "log")
    for rank in range(2):
        assert f"error on rank {rank} of 2: file of rank {rank}" in printed


def test_a_single_process_needs_no_store(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    failures.report("no such file")
    assert capsys.readouterr().err == "error: no such file\n"
    assert not failures.is_consequence(RuntimeError("Connection closed by peer"))


def test_without_a_store_the_rank_speaks_for_itself(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    failures.report("no such file")
    assert capsys.readouterr().err == "error on rank 1 of 2: no such file\n"
