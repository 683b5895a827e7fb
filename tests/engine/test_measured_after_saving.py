"""A checkpoint comes before the measurements of its step: what goes wrong while measuring loses no step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.small_run import equal, metrics, tensors
from unified_lm.cli.script import train
from unified_lm.engine.validation import Validator

COMMON = [
    "recipe=grit_smollm2",
    "model=tiny_random",
    "model.attention_dropout=0.1",
    "max_steps=4",
    "checkpoint.every=2",
    "validation.every=2",
    "validation.num_batches=1",
    "export.enabled=false",
    "logging.progress=false",
]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train([*COMMON, f"run_dir={tmp_path_factory.mktemp('whole')}/run"])


@pytest.mark.parametrize("fails_at", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_validation_that_runs_out_of_memory_loses_nothing(
    uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    """After step 2 or 4; the resume measures what is missing, and takes the same steps."""
    run_dir, calls = tmp_path / "run", []
    real = Validator.__call__

    def measure(self: Validator, **options: Any) -> Any:
        calls.append(len(calls))
        if len(calls) == fails_at + 1:
            torch.rand(3)  # had it drawn before it failed, the resume must not notice
            raise torch.OutOfMemoryError("of the device")
        return real(self, **options)

    monkeypatch.setattr(Validator, "__call__", measure)
    with pytest.raises(torch.OutOfMemoryError):
        train([*COMMON, f"run_dir={run_dir}"])
    assert (run_dir / "checkpoints" / f"step-0000000{2 * fails_at}" / "state.json").is_file()
    train([*COMMON, f"run_dir={run_dir}", "resume=auto"])
    last = Path("checkpoints", "step-00000004")
    assert equal(tensors(run_dir / last), tensors(uninterrupted / last))
    assert metrics(run_dir) == metrics(uninterrupted)


def test_what_was_measured_after_the_last_checkpoint_is_kept(
    uninterrupted: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A finished run that is resumed has nothing to measure again."""
    before = (uninterrupted / "metrics.jsonl").read_bytes()
    monkeypatch.setattr(Validator, "__call__", lambda *_, **__: pytest.fail("measured again"))
    train([*COMMON, f"run_dir={uninterrupted}", "resume=auto"])
    assert (uninterrupted / "metrics.jsonl").read_bytes() == before


def test_measuring_draws_nothing_from_the_run(tmp_path: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Validator.__call__

    def draw(self: Validator, **options: Any) -> Any:
        torch.rand(5)
        return real(self, **options)

    monkeypatch.setattr(Validator, "__call__", draw)
    run_dir = train([*COMMON, f"run_dir={tmp_path}/run"])
    last = Path("checkpoints", "step-00000004")
    assert equal(tensors(run_dir / last), tensors(uninterrupted / last))
