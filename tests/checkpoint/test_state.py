"""Checkpoints: whole or not at all, and only for the run they belong to."""

from __future__ import annotations

import errno
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from unified_lm.checkpoint import tensor_shards as module
from unified_lm.checkpoint.state import (
    LATEST,
    Identity,
    RunState,
    load_rng,
    load_state,
    open_tensors,
    save_state,
    torn,
)
from unified_lm.checkpoint.tensor_shards import ShardWriter
from unified_lm.core.errors import CheckpointError
from unified_lm.core.random import RngState

IDENTITY = Identity(recipe="grit", model="base abc", tokenizer="def", trained={"w": (3,)})


def save(folder: Path, step: int) -> Path:
    state = RunState(
        step=step,
        skipped=1,
        loader={"draws": step},
        metrics_bytes=10 * step,
        num_ranks=1,
        backend="single",
        identity=IDENTITY,
    )
    tensors = {"weight/w": torch.full((3,), float(step)), "step/w": torch.tensor(float(step))}
    return save_state(state, RngState.capture(), iter(tensors.items()), folder)


def test_round_trip(tmp_path):
    torch.manual_seed(5)
    path = save(tmp_path, 3)
    expected = torch.rand(4)
    state = load_state(path, IDENTITY)
    assert (state.step, state.skipped, state.loader, state.metrics_bytes) == (3, 1, {"draws": 3}, 30)
    with open_tensors(path) as read:
        assert read.names == {"weight/w", "step/w"}
        assert torch.equal(read("weight/w"), torch.full((3,), 3.0))
        assert read("step/w").shape == ()
    load_rng(path, 0).restore()
    assert torch.equal(torch.rand(4), expected)
    assert (tmp_path / LATEST).read_text() == "step-00000003\n"


def test_a_configuration_is_compared_where_both_sides_have_a_key():
    saved = replace(IDENTITY, configuration={"rope.theta": "10000", "eps": "1e-05", "old": "1", "torn": "{"})
    assert not replace(IDENTITY, configuration={"rope.theta": "10000.0", "eps": "0.00001", "new": "2"}).differences(saved)
    assert not IDENTITY.differences(saved)
    (told,) = replace(IDENTITY, configuration={"rope.theta": "500000.0"}).differences(saved)
    assert told == "configuration of the model, rope.theta: the checkpoint has 10000, this run 500000.0"
    assert len(replace(IDENTITY, configuration={"torn": "3"}).differences(saved)) == 1


@pytest.mark.parametrize("room", [2**20, 64], ids=["header fits", "header does not fit"])
def test_a_streamed_file_is_an_ordinary_safetensors_file(tmp_path, monkeypatch, room):
    monkeypatch.setattr(module, "_HEADER_BYTES", room)
    tensors = {
        "matrix": torch.randn(5, 7),
        "view": torch.randn(4, 6).T,
        "half": torch.randn(3).bfloat16(),
        "scalar": torch.tensor(4.0),
        "empty": torch.zeros(0, 2),
        "counts": torch.arange(3),
    }
    writer = ShardWriter(tmp_path / "file.safetensors")
    buffer = torch.empty(0)
    for name, tensor in tensors.items():
        buffer = tensor.clone()
        writer.add(name, buffer)
        buffer.zero_()  # what was handed over may be overwritten
    writer.close()
    loaded = load_file(tmp_path / "file.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) and loaded[name].dtype == tensors[name].dtype for name in tensors)
    assert [path.name for path in tmp_path.iterdir()] == ["file.safetensors"]


@pytest.mark.parametrize("where", ["add", "close"])
def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path, monkeypatch, where):
    save(tmp_path, 1)

    def refuse(self, *arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ShardWriter, where, refuse)
    with pytest.raises(CheckpointError, match=r"could not write .*step-00000002: .*No space left.* untouched"):
        save(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [LATEST, "step-00000001"]
    assert load_state(tmp_path / "step-00000001", IDENTITY).step == 1


def test_every_difference_is_named(tmp_path):
    path = save(tmp_path, 1)
    other = replace(IDENTITY, model="other", trained={"w": (4,), "v": (2,)})
    with pytest.raises(CheckpointError) as caught:
        load_state(path, other)
    assert "model: the checkpoint has 'base abc', this run 'other'" in str(caught.value)
    assert "trained: 2 parameters differ, e.g. w ([3] there, [4] here), v (absent there, [2] here)" in str(caught.value)
    assert "recipe" not in str(caught.value).split("another run.")[1].split("Use another")[0]


def test_what_is_torn_is_told(tmp_path):
    path = save(tmp_path, 1)
    assert torn(path) is None
    shard = path / "optimizer-00001-of-00001.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    assert torn(path) == f"{shard.name} has {len(content) - 1:,} bytes instead of {len(content):,}"
    shard.unlink()
    assert torn(path) == f"{shard.name} is missing"
    shard.write_bytes(content)
    index = path / "state.json"
    text = index.read_text()
    index.write_text(text[: len(text) // 2])
    assert "state.json cannot be read" in str(torn(path))
    index.write_text(json.dumps({"step": 1}))
    assert "format None, expected 2" in str(torn(path))
    whole = json.loads(text)
    for told, broken in (
        ("got [] (list)", []),
        ("files: got 5", {**whole, "files": 5}),
        ("files.rng.safetensors: got 'x'", {**whole, "files": {"rng.safetensors": "x"}}),
        ("identity.trained.w: got 5", {**whole, "identity": {**whole["identity"], "trained": {"w": 5}}}),
        ("tensors: got []", {**whole, "tensors": []}),
        ("missing field 'loader'", {name: value for name, value in whole.items() if name != "loader"}),
        ("nested too deeply", "[" * 100_000),
    ):
        index.write_text(broken if isinstance(broken, str) else json.dumps(broken))
        assert f"state.json cannot be read ({told}" in str(torn(path))
    index.unlink()
    assert torn(path) == "state.json is missing"
    with pytest.raises(CheckpointError, match=r"is not complete: state\.json is missing"):
        load_state(path, IDENTITY)
