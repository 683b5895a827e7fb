"""Finding, keeping and copying checkpoints."""

from __future__ import annotations

import shutil
import time

import pytest

from tests.checkpoint.test_state import save
from unified_lm.checkpoint.state import LATEST, torn
from unified_lm.checkpoint.store import (
    CheckpointCopier,
    find_checkpoint,
    list_checkpoints,
    prune,
    remove_unfinished,
    restore_metrics,
)
from unified_lm.core.errors import CheckpointError


def test_nothing_to_resume(tmp_path):
    assert find_checkpoint("none", tmp_path).path is None
    assert find_checkpoint("auto", tmp_path).path is None
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        find_checkpoint(str(tmp_path), tmp_path)


def test_a_torn_checkpoint_is_skipped_with_a_message(tmp_path):
    first, second = save(tmp_path, 1), save(tmp_path, 2)
    assert find_checkpoint("auto", tmp_path).path == second
    (second / "rng.safetensors").unlink()
    found = find_checkpoint("auto", tmp_path)
    assert found.path == first
    assert found.notices == (f"checkpoint {second} is torn and skipped: rng.safetensors is missing",)
    with pytest.raises(CheckpointError, match=r"not a complete checkpoint: rng\.safetensors is missing"):
        find_checkpoint(str(second), tmp_path)
    assert find_checkpoint(str(tmp_path), tmp_path / "elsewhere").path == first


def test_copies_are_used_where_the_run_has_none(tmp_path):
    copy = save(tmp_path / "copies", 4)
    found = find_checkpoint("auto", tmp_path / "own", tmp_path / "copies")
    assert found.path == copy
    assert "using the copy" in found.notices[-1]
    own = save(tmp_path / "own", 3)
    assert find_checkpoint("auto", tmp_path / "own", tmp_path / "copies").path == own


def test_the_newest_and_the_milestones_are_kept(tmp_path):
    for step in range(1, 9):
        save(tmp_path, step)
        prune(tmp_path, keep_last=2, keep_every=3)
    assert [path.name[-1] for path in list_checkpoints(tmp_path)] == ["3", "6", "7", "8"]
    prune(tmp_path, keep_last=1, keep_every=0, protected={tmp_path / "step-00000007"})
    assert [path.name[-1] for path in list_checkpoints(tmp_path)] == ["7", "8"]


def test_what_a_killed_run_left_is_swept(tmp_path):
    kept = save(tmp_path, 1)
    left = (".step-00000002.building", ".step-00000000.removing", ".step-00000003.node7-99.building", ".step-00000004.N-1.old")
    mine = (".step-by-step", ".step-1", ".step-00000005.notes")
    for name in (*left, *mine):
        shutil.copytree(kept, tmp_path / name)
    assert [path.name for path in list_checkpoints(tmp_path)] == [kept.name]
    assert sorted(path.name for path in remove_unfinished(tmp_path)) == sorted(left)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([LATEST, kept.name, *mine])


def test_copies_are_complete_and_bring_their_metrics(tmp_path):
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.parent.mkdir()
    metrics.write_text('{"step": 1}\n')
    copier = CheckpointCopier(tmp_path / "copies", keep_last=1, keep_every=0)
    for step in (1, 2):
        copier.submit(save(tmp_path / "own", step), metrics)
        while copier.busy:
            time.sleep(0.01)
    assert copier.close() == []
    copy = tmp_path / "copies" / "step-00000002"
    assert list_checkpoints(tmp_path / "copies") == [copy]
    assert torn(copy) is None
    restore_metrics(copy, tmp_path / "lost")
    assert (tmp_path / "lost" / "metrics.jsonl").read_text() == metrics.read_text()
    metrics.write_text("of a start that was killed before its first checkpoint\n")
    restore_metrics(copy, tmp_path / "run")
    assert metrics.read_text() == '{"step": 1}\n'
    save(tmp_path / "run" / "checkpoints", 1)
    metrics.write_text("newer\n")
    restore_metrics(copy, tmp_path / "run")
    assert metrics.read_text() == "newer\n", "a run that has metrics keeps them"


def test_a_failed_copy_is_told_and_leaves_no_checkpoint(tmp_path):
    (tmp_path / "copies").write_text("a file where the folder should be")
    copier = CheckpointCopier(tmp_path / "copies", keep_last=1, keep_every=0)
    copier.submit(save(tmp_path / "own", 1), tmp_path / "metrics.jsonl")
    (problem,) = copier.close()
    assert problem.startswith("warning: step-00000001 was not copied to")
