"""Under a real torchrun of two processes a mistake is one message, and a rank that fails alone says which one it is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from unified_lm.core import failures

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = """
import os, sys
from unified_lm.cli.main import run_command
from unified_lm.core import distributed
from unified_lm.core.errors import DataError

def command():
    distributed.initialize(1.0)
    if {alone} and os.environ["RANK"] == "0":
        distributed.barrier()  # fails when the other rank ends
    raise {error}

sys.exit(run_command(command))
"""


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)


def ours(stderr: str) -> str:
    """What the ranks printed, before torchrun's own summary."""
    return stderr.split("torch/distributed/elastic")[0]


@pytest.mark.parametrize("argument", ["streams.embedding.sources=[{path: nowhere.jsonl}]", "max_stepss=3"])
def test_a_mistake_of_every_rank_is_printed_once(argument: str, tmp_path: Path) -> None:
    """Also one that is found before the ranks know each other (an unknown key)."""
    done = torchrun("train.py", "recipe=grit_smollm2", "model=tiny_random", argument, f"run_dir={tmp_path}/run")
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1, done.stderr
    assert "error on rank" not in done.stderr
    assert "Traceback" not in ours(done.stderr)
    assert "exitcode  : 2" in done.stderr  # torchrun ends a rank that is still on its way out with SIGTERM


def test_a_rank_that_fails_alone_is_named_and_the_waiting_one_keeps_quiet(tmp_path: Path) -> None:
    script = tmp_path / "alone.py"
    script.write_text(SCRIPT.format(alone=True, error="DataError('no such file: shard-7.jsonl')"))
    done = torchrun(str(script))
    assert ours(done.stderr).count("error") == 1, done.stderr
    assert "error on rank 1 of 2: no such file: shard-7.jsonl" in done.stderr
    assert "Traceback" not in ours(done.stderr)


def test_a_bug_keeps_its_traceback_and_only_its_own(tmp_path: Path) -> None:
    script = tmp_path / "bug.py"
    script.write_text(SCRIPT.format(alone=True, error="ZeroDivisionError('a bug')"))
    done = torchrun(str(script))
    assert done.stderr.count("ZeroDivisionError: a bug") == 1
    assert ours(done.stderr).count("Traceback") == 1, done.stderr


def test_ranks_that_say_different_things_are_all_heard(tmp_path: Path) -> None:
    script = tmp_path / "different.py"
    script.write_text(SCRIPT.format(alone=False, error="DataError('file of rank ' + os.environ['RANK'])"))
    done = torchrun(str(script))
    for rank in range(2):
        assert f"error on rank {rank} of 2: file of rank {rank}" in done.stderr


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
