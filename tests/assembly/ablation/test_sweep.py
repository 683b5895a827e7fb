"""Ablations run, stop, continue and refuse; their results are put side by side."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from tests.assembly.ablation.run_arms import run_sweep
from unified_lm.assembly.ablation.folder import FINISHED
from unified_lm.assembly.build import RunResult
from unified_lm.cli.main import main
from unified_lm.cli.script import train
from unified_lm.composition.compose import compose
from unified_lm.config.schema import RunConfig, SweepConfig
from unified_lm.core.errors import CheckpointError
from unified_lm.reporting.compare import compare

SMALL = (
    *("recipe=ablation_attention", "model=tiny_random", "max_steps=2", "logging.progress=false"),
    *("arms=[causal-mean-causal,bidirectional-mean-causal]", "validation.num_batches=1"),
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train([*SMALL, f"run_dir={tmp_path_factory.mktemp('sweep')}/runs"])


def test_arms_run_with_the_same_data_order_and_leave_no_checkpoint(finished: Path) -> None:
    folders = sorted(path.name for path in finished.iterdir() if path.is_dir())
    assert folders == ["bidirectional-mean-causal-seed42", "causal-mean-causal-seed42"]
    tokens = []
    for folder in folders:
        assert json.loads((finished / folder / FINISHED).read_text())["steps"] == 2
        assert not (finished / folder / "checkpoints").exists()
        lines = [json.loads(line) for line in (finished / folder / "metrics.jsonl").read_text().splitlines()]
        tokens.append([line["tokens"] for line in lines if "tokens" in line] or [len(lines)])
    assert tokens[0] == tokens[1]


def test_finished_arms_are_skipped(finished: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.glob("*/metrics.jsonl")}
    train([*SMALL, f"run_dir={finished}"])
    assert before == {path: path.stat().st_mtime_ns for path in finished.glob("*/metrics.jsonl")}


def test_changed_settings_are_refused_by_name(finished: Path) -> None:
    with pytest.raises(CheckpointError, match=r"causal-mean-causal-seed42: optim.learning_rate was 3e-05, is 0.5"):
        train([*SMALL, f"run_dir={finished}", "optim.learning_rate=0.5"])
    train([*SMALL, f"run_dir={finished}", "logging.every=5", "checkpoint.every=1"])  # changes no number: allowed


def test_a_stopped_arm_ends_the_sweep_and_goes_on_next_time(tmp_path: Path) -> None:
    config = compose([*SMALL, f"run_dir={tmp_path}"])
    assert isinstance(config, SweepConfig)
    asked: list[str] = []

    def run_one(run: RunConfig) -> RunResult:
        folder = Path(run.run_dir)
        folder.mkdir(exist_ok=True)
        asked.append(folder.name)
        assert run.resume == "auto"
        return RunResult(folder, is_finished=len(asked) != 1)  # a signal stops the first one

    run_sweep(config, run_one, Console(quiet=True))
    assert asked == ["causal-mean-causal-seed42"]
    run_sweep(config, run_one, Console(quiet=True))
    assert asked == ["causal-mean-causal-seed42", "causal-mean-causal-seed42", "bidirectional-mean-causal-seed42"]


def test_comparison_names_what_differs_and_writes_its_files(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    comparison = compare([finished])
    assert list(comparison.differing) == ["streams.embedding.attention"]
    assert [arm.name for arm in comparison.arms] == ["bidirectional-mean-causal", "causal-mean-causal"], "the recipe's order"
    other = comparison.arms[1]
    interval = comparison.difference(other, "retrieval/ndcg@10")
    assert interval is not None
    ours, theirs = (arm.mean("retrieval/ndcg@10") for arm in (other, comparison.reference))
    assert ours is not None
    assert theirs is not None
    assert interval.value == pytest.approx(ours - theirs)
    assert interval.low <= interval.value <= interval.high
    assert main(["compare", str(finished)]) == 0
    assert "causal-mean-causal" in capsys.readouterr().out
    for ending in ("csv", "json", "md", "png"):
        assert (finished / f"compare.{ending}").stat().st_size > 100
    rows = (finished / "compare.csv").read_text().splitlines()
    assert len(rows) == 3
    assert '"""causal"""' in rows[2]


def test_an_unknown_reference_is_a_users_mistake(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(finished), "--reference", "causal-mean-causl"]) == 2
    assert "causal-mean-causal" in capsys.readouterr().err


def test_dry_run_lists_the_arms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train([*SMALL, f"run_dir={tmp_path}/none", "dry_run=true"])
    out = capsys.readouterr().out
    assert "causal-mean-causal" in out
    assert "FLOP" in out
    assert not (tmp_path / "none").exists()
