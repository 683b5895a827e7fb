"""Law 5: stop anywhere, also by SIGKILL, resume, and the parameters equal those of the uninterrupted run, bit for bit."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.engine.small_run import metrics, tensors
from tests.processes import Group
from unified_lm.cli.script import train
from unified_lm.core.errors import CheckpointError
from unified_lm.core.folder_lock import LOCK_FILE

COMMON = [
    "recipe=grit_smollm2",
    "model=tiny_random",
    "model.attention_dropout=0.1",
    "max_steps=6",
    "checkpoint.every=2",
    "streams.embedding.batch_size=4",
    "streams.generation.batch_size=2",
    "validation.every=3",
    "validation.num_batches=1",
    "~validation.retrieval",
    "export.enabled=false",
    "logging.progress=false",
]


def final_weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return tensors(run_dir / "checkpoints" / "step-00000006")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """As the processes that are killed have it: bits depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    whole = Group([*COMMON, f"run_dir={folder}/run"], 1, folder / "log")
    assert whole.wait() == [0], whole.output()
    return folder / "run"


@pytest.mark.parametrize("lines_before_kill", [pytest.param(1, marks=pytest.mark.slow), 5])
def test_sigkill_and_resume(uninterrupted, tmp_path, lines_before_kill):
    run_dir = tmp_path / "run"
    process = Group([*COMMON, f"run_dir={run_dir}"], 1, tmp_path / "log")
    while process.running:
        written = (run_dir / "metrics.jsonl").read_text().count("\n") if (run_dir / "metrics.jsonl").exists() else 0
        if written >= lines_before_kill:
            break
        time.sleep(0.001)
    process.kill()
    assert not (run_dir / "checkpoints" / "step-00000006").exists(), "killed before the end"

    train([*COMMON, f"run_dir={run_dir}", "resume=auto"])
    expected, resumed = final_weights(uninterrupted), final_weights(run_dir)
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    assert metrics(run_dir) == metrics(uninterrupted)


def test_another_seed_gives_other_weights(uninterrupted, tmp_path):
    """The test above can fail."""
    other = train([*COMMON, f"run_dir={tmp_path}/run", "seed=7"])
    first, second = final_weights(uninterrupted), final_weights(other)
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_a_finished_run_is_not_written_over(uninterrupted):
    with pytest.raises(CheckpointError, match="already holds a run"):
        train([*COMMON, f"run_dir={uninterrupted}"])


def test_a_checkpoint_of_another_recipe_is_refused(uninterrupted, tmp_path):
    arguments = [a.replace("grit_smollm2", "embedding_only") for a in COMMON if "generation" not in a]
    with pytest.raises(CheckpointError, match="recipe: the checkpoint has 'grit_smollm2'"):
        train([*arguments, f"run_dir={tmp_path}/run", f"resume={uninterrupted}"])


def test_an_older_checkpoint_is_not_continued_over_newer_ones(uninterrupted):
    """Pruning keeps the highest steps: new checkpoints with lower ones would vanish."""
    oldest = sorted((uninterrupted / "checkpoints").glob("step-*"))[0]
    with pytest.raises(CheckpointError, match="checkpoints newer than step-00000004"):
        train([*COMMON, f"run_dir={uninterrupted}", f"resume={oldest}"])


def test_resuming_leaves_the_saved_configuration_of_a_refused_run(uninterrupted):
    before = (uninterrupted / "config.yaml").read_text()
    with pytest.raises(CheckpointError, match=r"lora\.r: the checkpoint has null, this run 16"):
        train([*COMMON, f"run_dir={uninterrupted}", "resume=auto", "lora=all_linear"])
    assert (uninterrupted / "config.yaml").read_text() == before


def test_fewer_steps_than_the_checkpoint_has_taken_are_refused(uninterrupted):
    arguments = [a.replace("max_steps=6", "max_steps=3") for a in COMMON]
    with pytest.raises(CheckpointError, match="has taken 6 steps"):
        train([*arguments, f"run_dir={uninterrupted}", "resume=auto"])


def test_a_torn_checkpoint_is_skipped_with_a_message(uninterrupted, tmp_path, capsys):
    run_dir = tmp_path / "run"
    shutil.copytree(uninterrupted, run_dir)
    newest = run_dir / "checkpoints" / "step-00000006"
    shard = next(newest.glob("optimizer-*"))
    os.truncate(shard, shard.stat().st_size // 2)
    train([*COMMON, f"run_dir={run_dir}", "resume=auto"])
    told = capsys.readouterr().err
    assert f"checkpoint {newest} is torn and skipped: {shard.name} has" in told
    assert "resuming from step-00000004" in told
    expected, resumed = final_weights(uninterrupted), final_weights(run_dir)
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)


def test_a_lost_run_is_resumed_from_its_copies(uninterrupted, tmp_path, capsys):
    run_dir, copies = tmp_path / "run", tmp_path / "copies"
    arguments = [*COMMON, f"run_dir={run_dir}", f"checkpoint.copy_to={copies}"]
    train(arguments)
    assert sorted(path.name for path in copies.iterdir()) == [LOCK_FILE, "latest", "step-00000004", "step-00000006"]
    shutil.rmtree(run_dir)
    shutil.rmtree(copies / "step-00000006")
    with pytest.raises(CheckpointError, match=r"copy_to .* already holds checkpoints"):
        train(arguments)
    train([*arguments, "resume=auto"])
    assert "using the copy" in capsys.readouterr().err
    expected, resumed = final_weights(uninterrupted), final_weights(run_dir)
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    assert metrics(run_dir) == metrics(uninterrupted)
