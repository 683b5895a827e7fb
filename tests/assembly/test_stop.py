"""A signal that comes at the very end of a stage or an arm keeps the next one from starting; the same command goes on."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.processes import Group
from unified_lm.assembly.ablation.folder import FINISHED
from unified_lm.cli.script import train

QUIET = ("logging.progress=false", "validation.num_batches=1")
CHAIN = ("recipe=llm2vec", "model=tiny_random", "max_steps=2", "resume=auto", *QUIET)
SWEEP = ("recipe=ablation_precision", "model=tiny_random", "max_steps=2", "resume=auto", "~validation.retrieval", *QUIET)
LAST = 2

MOMENTS = {
    "the last step": ("unified_lm.engine.fit.learning_rate", lambda config, taken, *_: taken == LAST - 1),
    "the last validation": ("unified_lm.engine.fit.write_items", lambda run_dir, step, *_: step == LAST),
    "the last save": ("unified_lm.engine.fit.save_state", lambda state, *_: state.step == LAST),
    "the export": ("unified_lm.assembly.stages.write_export", lambda *_: True),
}
"""Where the signal comes: the function during which it does, and whether its arguments are those of the end."""


def signal_once(monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """Have the first stage or arm that comes to this moment receive SIGTERM during it."""
    target, is_it = MOMENTS[moment]
    module, _, name = target.rpartition(".")
    real: Callable[..., Any] = getattr(__import__(module, fromlist=[name]), name)
    sent: list[int] = []

    def then_signal(*arguments: Any, **options: Any) -> Any:
        result = real(*arguments, **options)
        if not sent and is_it(*arguments):
            sent.append(signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    monkeypatch.setattr(target, then_signal)


def last_step(run_dir: Path) -> int:
    return max(json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines())


def moments(*fast: str) -> list[Any]:
    """All moments of a parametrized test; those that are not named are for the slow ones."""
    return [pytest.param(moment, marks=[] if moment in fast else pytest.mark.slow) for moment in MOMENTS]


@pytest.mark.parametrize("moment", moments("the last save", "the export"))
def test_a_chain_stops_and_goes_on(moment, tmp_path, monkeypatch, capsys):
    signal_once(monkeypatch, moment)
    first = train([*CHAIN, f"run_dir={tmp_path}"])
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["1-llm2vec_mntp"] == [first.name]
    assert last_step(first) == LAST
    assert (first / "export").exists() == (moment == "the export")
    told = capsys.readouterr().err
    assert told.count("stopped by SIGTERM after") == 1
    assert "Start it again with resume=auto to go on" in told
    metrics = (first / "metrics.jsonl").read_bytes()

    second = train([*CHAIN, f"run_dir={tmp_path}"])
    assert (first / "metrics.jsonl").read_bytes() == metrics, "no step is taken twice"
    assert (second.name, last_step(second)) == ("2-llm2vec_simcse", LAST)
    assert (second / "export" / "unified_lm.json").is_file()
    assert "stopped" not in capsys.readouterr().err


@pytest.mark.parametrize("moment", [each for each in moments("the last step") if each.values != ("the export",)])
def test_an_ablation_stops_and_goes_on(moment, tmp_path, monkeypatch, capsys):
    signal_once(monkeypatch, moment)
    train([*SWEEP, f"run_dir={tmp_path}"])
    assert [path.parent.name for path in tmp_path.glob(f"*/{FINISHED}")] == ["float32-seed42"]
    assert not (tmp_path / "bfloat16-seed42").exists()
    told = capsys.readouterr().err
    assert "stopped by SIGTERM after arm float32, seed 42, which is finished. Start it again with resume=auto" in told

    metrics = (tmp_path / "float32-seed42" / "metrics.jsonl").read_bytes()
    train([*SWEEP, f"run_dir={tmp_path}"])
    assert (tmp_path / "float32-seed42" / "metrics.jsonl").read_bytes() == metrics
    assert (tmp_path / "bfloat16-seed42" / FINISHED).is_file()


def test_a_signal_that_leaves_nothing_undone_changes_nothing(tmp_path, monkeypatch, capsys):
    signal_once(monkeypatch, "the last save")
    train([*SWEEP, "arms=[float32]", f"run_dir={tmp_path}"])
    assert (tmp_path / "float32-seed42" / FINISHED).is_file()
    assert "stopped" not in capsys.readouterr().err


def signal_rank_1(rank: int) -> None:
    """Called in each process of the group."""
    if rank == 1:
        signal_once(pytest.MonkeyPatch(), "the last save")


def test_a_signal_to_one_rank_stops_all(tmp_path):
    group = Group([*CHAIN, f"run_dir={tmp_path}/run"], 2, tmp_path / "log", signal_rank_1)
    assert group.wait() == [0, 0], group.output()
    assert "stopped by SIGTERM after step 2, the last one, which is saved; the export is not written" in group.output()
    assert [path.name for path in (tmp_path / "run").iterdir() if path.is_dir()] == ["1-llm2vec_mntp"]
    assert not (tmp_path / "run" / "1-llm2vec_mntp" / "export").exists()
