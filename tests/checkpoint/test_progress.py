"""Saving and reading are progress in the watchdog's eyes, tensor by tensor."""

from pathlib import Path

import pytest
import torch

from unified_lm.checkpoint.tensor_shards import ShardReader, ShardWriter, write_shard
from unified_lm.core import tracing


def test_every_tensor_is_a_span_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    real = ShardWriter.add

    def add(self: ShardWriter, name: str, tensor: torch.Tensor) -> None:
        seen.append(tracing.current_span()[0])
        real(self, name, tensor)

    monkeypatch.setattr(ShardWriter, "add", add)
    names, failure = write_shard([(name, torch.ones(2)) for name in ("a", "b")], tmp_path)
    assert (names, failure, seen) == (["a", "b"], None, ["write a", "write b"])
    [file] = tmp_path.iterdir()
    with ShardReader(tmp_path, {file.name: names}) as read:
        read("b")
    assert tracing.current_span()[0] == "after 'read b'"
