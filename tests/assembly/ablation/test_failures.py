"""Arms of an ablation that fail: the others run, all is told at the end, and the same command tries again what failed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from tests.assembly.ablation.run_arms import run_sweep
from tests.processes import Group
from unified_lm.assembly import stages
from unified_lm.assembly.ablation import failures as sweep_failures
from unified_lm.assembly.ablation.folder import FAILED, FINISHED
from unified_lm.assembly.build import Run, RunResult
from unified_lm.cli.main import main
from unified_lm.cli.script import train
from unified_lm.composition.compose import compose
from unified_lm.config.schema import RunConfig, SweepConfig
from unified_lm.core.errors import CheckpointError, DataError, UserError
from unified_lm.reporting.compare import compare

SMALL = ("model=tiny_random", "max_steps=2", "logging.progress=false", "validation.num_batches=1", "~validation.retrieval")
LOSS = ("recipe=ablation_loss", *SMALL)
HEAD = ("recipe=ablation_head", *SMALL, "arms=[none,projection_64,matryoshka]")


class Runs:
    """Stands for training: notes which arms run, and fails those that it is told to.

    Args:
        errors: arm -> makes what it fails with.
    """

    def __init__(self, errors: dict[str, Callable[[RunConfig], Exception]]) -> None:
        self.errors = errors
        self.asked: list[str] = []

    def __call__(self, run: RunConfig) -> RunResult:
        arm = Path(run.run_dir).name.partition("-seed")[0]
        self.asked.append(arm)
        if arm in self.errors:
            raise self.errors[arm](run)
        Path(run.run_dir).mkdir(exist_ok=True)
        return RunResult(Path(run.run_dir), is_finished=True)


def ablation(tmp_path: Path, *more: str, arms: str = "token,sample,mixed,ratio_10_1") -> SweepConfig:
    config = compose([*LOSS, f"arms=[{arms}]", f"run_dir={tmp_path}", *more])
    assert isinstance(config, SweepConfig)
    return config


def marked(run_dir: Path, name: str) -> list[str]:
    return sorted(path.parent.name.partition("-seed")[0] for path in run_dir.glob(f"*/{name}"))


def test_the_other_arms_run_and_the_same_command_tries_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = ablation(tmp_path)
    runs = Runs({"token": lambda run: DataError(f"{run.run_dir}: no row"), "mixed": lambda run: RuntimeError("out of memory")})
    with pytest.raises(UserError) as caught:
        run_sweep(config, runs)
    assert runs.asked == ["token", "sample", "mixed", "ratio_10_1"]
    assert str(caught.value).splitlines()[:3] == [
        "2 of 4 runs of the ablation failed:",
        f"  token-seed42: {tmp_path}/token-seed42: no row",
        "  mixed-seed42: RuntimeError: out of memory",
    ]
    assert "The same command again" in str(caught.value)
    told = capsys.readouterr().err
    assert f"token-seed42 failed: {tmp_path}/token-seed42: no row" in told, "at once"
    assert "Traceback" in told, "of what is no user's error"
    assert (marked(tmp_path, FINISHED), marked(tmp_path, FAILED)) == (["ratio_10_1", "sample"], ["mixed", "token"])
    assert json.loads((tmp_path / "mixed-seed42" / FAILED).read_text())["reason"] == "RuntimeError: out of memory"

    runs = Runs({})
    run_sweep(config, runs, Console(quiet=True))
    assert runs.asked == ["token", "mixed"]
    assert (marked(tmp_path, FINISHED), marked(tmp_path, FAILED)) == (["mixed", "ratio_10_1", "sample", "token"], [])


def test_a_users_error_of_all_arms_ends_the_ablation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = Runs(
        dict.fromkeys(["token", "sample", "mixed", "ratio_10_1"], lambda run: DataError(f"{run.run_dir}: no such data"))
    )
    config = ablation(tmp_path, "seeds=[1,2]")
    with pytest.raises(UserError, match=r"no such data\ntoken-seed1 and token-seed2 and sample-seed1 failed like this before"):
        run_sweep(config, runs)
    assert runs.asked == ["token", "token", "sample"], "two seeds of one arm do not make it common"
    assert capsys.readouterr().err.count("no such data") == 1, "and once more in the error that is raised"

    runs = Runs({"token": lambda run: DataError("no such data"), "sample": lambda run: DataError("no such data")})
    with pytest.raises(UserError, match="4 of 8 runs of the ablation failed"):
        run_sweep(config, runs, Console(quiet=True))
    assert runs.asked[:5] == ["sample", "mixed", "mixed", "ratio_10_1", "ratio_10_1"], "what was not tried comes first"
    assert runs.asked[5:] == ["token", "token", "sample"]


def test_where_all_arms_fail_alike_none_is_said_to_be_left(tmp_path: Path) -> None:
    runs = Runs(dict.fromkeys(["token", "sample"], lambda run: DataError("no such data")))
    with pytest.raises(UserError, match="2 of 2 runs of the ablation failed:\n  token-seed42, sample-seed42: no such data"):
        run_sweep(ablation(tmp_path, arms="token,sample"), runs, Console(quiet=True))


def test_an_interrupt_is_no_failure_of_an_arm(tmp_path: Path) -> None:
    def interrupt(run: RunConfig) -> Exception:
        raise KeyboardInterrupt

    runs = Runs({"token": interrupt})
    with pytest.raises(KeyboardInterrupt):
        run_sweep(ablation(tmp_path), runs, Console(quiet=True))
    assert runs.asked == ["token"]


def test_a_signal_ends_the_ablation_and_what_had_failed_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run_one(run: RunConfig) -> RunResult:
        if "token" in run.run_dir:
            raise DataError("no row")
        Path(run.run_dir).mkdir()
        return RunResult(Path(run.run_dir), is_finished=True, stopped_by="SIGTERM")

    run_sweep(ablation(tmp_path), run_one)
    told = capsys.readouterr().err
    assert "stopped by SIGTERM after arm sample, seed 42" in told
    assert "1 of 4 runs of the ablation failed:" in told
    assert marked(tmp_path, FINISHED) == ["sample"]


def test_real_arms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An arm that fails while it trains; what it left keeps neither a comparison nor other settings from the next start."""
    arguments = [*HEAD, f"run_dir={tmp_path}"]
    assert main(["train", *arguments, "none.optim.learning_rate=1e30", "none.optim.max_skipped_steps=1"]) == 2
    told = capsys.readouterr().err
    assert "error: 1 of 3 runs of the ablation failed:\n  none-seed42: " in told
    assert marked(tmp_path, FINISHED) == ["matryoshka", "projection_64"]
    (tmp_path / "built-seed42").mkdir()
    (tmp_path / "built-seed42" / "metrics.jsonl").touch()  # one that failed before its configuration was written
    assert {"matryoshka", "projection_64"} <= {arm.name for arm in compare([tmp_path]).arms}
    # It has saved no step, so it may start with other settings; a finished one may not.
    with pytest.raises(CheckpointError, match=r"matryoshka-seed42: optim\.learning_rate"):
        train([*arguments, "matryoshka.optim.learning_rate=1"])
    train(arguments)
    assert marked(tmp_path, FINISHED) == ["matryoshka", "none", "projection_64"]
    assert marked(tmp_path, FAILED) == []


def fail_differently(rank: int) -> None:
    """Called in each process of the group: the first arm fails on all ranks, the second one on rank 1 alone."""
    real = stages.build_run

    def build_run(config: RunConfig) -> Run:
        if "/none-" in config.run_dir:
            raise DataError("no row")
        if "/projection_64-" in config.run_dir and rank == 1:
            raise DataError("this node lacks a file")
        return real(config)

    stages.build_run = build_run
    original = sweep_failures.fail_alike
    sweep_failures.fail_alike = lambda error, name: original(error, name, seconds=1.0)


@pytest.mark.slow  # the rule itself: core/test_agreement.py
def test_ranks_go_on_only_where_all_have_failed_alike(tmp_path: Path) -> None:
    arguments = [*HEAD, f"run_dir={tmp_path}/run"]
    group = Group(arguments, 2, tmp_path / "log", fail_differently)
    assert group.wait() == [2, 2], group.output()
    assert group.output().count("none-seed42 failed: no row") == 1
    assert "error on rank 1 of 2: this node lacks a file" in group.output()
    assert marked(tmp_path / "run", FAILED) == ["none", "projection_64"]
    assert marked(tmp_path / "run", FINISHED) == []
    # The same command gives the third arm its turn before the one that ends the process.
    group = Group(arguments, 2, tmp_path / "again", fail_differently)
    assert group.wait() == [2, 2], group.output()
    assert marked(tmp_path / "run", FINISHED) == ["matryoshka"]
