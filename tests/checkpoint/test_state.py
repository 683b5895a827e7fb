"""Checkpoints: whole or not at all, and only for the run they belong to."""

from __future__ import annotations

import errno
from dataclasses import replace

import pytest
import torch
from safetensors import SafetensorError

from unified_lm.checkpoint import state as module
from unified_lm.checkpoint.state import Identity, RunState, find_checkpoint, list_checkpoints, load_state, save_state
from unified_lm.core.errors import CheckpointError
from unified_lm.core.random import RngState

IDENTITY = Identity(recipe="grit", model="base abc", tokenizer="def", trained="012")


def make_state(step: int) -> RunState:
    return RunState(
        step=step,
        optimizer={"weight/w": torch.full((3,), float(step))},
        loader={"draws": step},
        rng=(RngState.capture(),),
        metrics_bytes=10 * step,
        identity=IDENTITY,
    )


def test_round_trip_and_the_newest_is_found(tmp_path):
    torch.manual_seed(5)
    for step in (1, 2, 3):
        save_state(make_state(step), tmp_path, keep_last=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000002", "step-00000003"]
    expected = torch.rand(4)
    found = find_checkpoint("auto", tmp_path)
    assert found is not None
    loaded = load_state(found, IDENTITY)
    assert (loaded.step, loaded.loader, loaded.metrics_bytes) == (3, {"draws": 3}, 30)
    assert torch.equal(loaded.optimizer["weight/w"], torch.full((3,), 3.0))
    loaded.rng[0].restore()
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: no space")])
def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path, monkeypatch, failure):
    save_state(make_state(1), tmp_path, keep_last=2)

    def refuse(tensors, path):
        path.write_bytes(b"half")
        raise failure

    monkeypatch.setattr(module, "save_file", refuse)
    with pytest.raises(CheckpointError, match=r"could not write .*step-00000002.* untouched"):
        save_state(make_state(2), tmp_path, keep_last=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert load_state(tmp_path / "step-00000001", IDENTITY).step == 1


def test_what_differs_is_named(tmp_path):
    path = save_state(make_state(1), tmp_path, keep_last=1)
    with pytest.raises(CheckpointError, match=r"model: the checkpoint has 'base abc', this run 'other'"):
        load_state(path, replace(IDENTITY, model="other"))


def test_a_torn_file_is_told_apart(tmp_path):
    path = save_state(make_state(1), tmp_path, keep_last=1)
    content = (path / "optimizer.safetensors").read_bytes()
    (path / "optimizer.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_state(path, IDENTITY)


def test_resume_names_nothing(tmp_path):
    assert find_checkpoint("none", tmp_path) is None
    assert find_checkpoint("auto", tmp_path) is None
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        find_checkpoint(str(tmp_path), tmp_path)
