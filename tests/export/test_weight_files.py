"""The files are those of transformers' own `save_pretrained`, byte for byte, and only one tensor waits in memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.export.test_merge import adapted
from unified_lm.core.errors import CheckpointError
from unified_lm.core.raw_tensors import DTYPE_NAMES
from unified_lm.export.merge import ModelParts, merged_weights, skeleton_of
from unified_lm.export.weight_files import _Plan, write_weights
from unified_lm.models.tiny import TINY_FAMILIES, tiny_model


def weight_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("model*"))}


def check_same(model: PreTrainedModel, folder: Path, dtype: torch.dtype, size: str) -> None:
    (folder / "ours").mkdir()
    write_weights(skeleton_of(model), merged_weights(ModelParts(model)), folder / "ours", dtype, size, digests=False)
    model.save_pretrained(folder / "theirs", max_shard_size=size)
    assert weight_files(folder / "ours") == weight_files(folder / "theirs")


@pytest.mark.parametrize("size", ["5GB", "60KB"])
@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_files_are_those_of_transformers(family: str, size: str, tmp_path: Path) -> None:
    check_same(tiny_model(family), tmp_path, torch.float32, size)
    assert (len(weight_files(tmp_path / "ours")) > 1) == (size == "60KB")


def test_tied_weights_are_written_once(tmp_path: Path) -> None:
    check_same(tiny_model("llama", tie_word_embeddings=True), tmp_path, torch.float32, "50KB")


def test_what_loading_has_converted_is_converted_back(tmp_path: Path) -> None:
    tiny_model("mixtral").save_pretrained(tmp_path / "loaded")
    check_same(AutoModelForCausalLM.from_pretrained(tmp_path / "loaded"), tmp_path, torch.float32, "60KB")
    assert b"experts.3.w2.weight" in weight_files(tmp_path / "ours")["model.safetensors.index.json"]


def test_a_layer_is_written_before_the_next_one_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted("mixtral", ("q_proj", "experts.down_proj"))
    written: set[str] = set()
    write = _Plan.write

    def noting(plan: _Plan, folder: Path, tensors: dict[str, torch.Tensor]) -> None:
        written.update(tensors)
        write(plan, folder, tensors)

    monkeypatch.setattr(_Plan, "write", noting)

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in merged_weights(ModelParts(model)):
            if name.startswith("model.layers.1."):
                assert {key for key in tiny_model("mixtral").state_dict() if key.startswith("model.layers.0.")} <= written
            yield name, tensor

    write_weights(skeleton_of(model), weights(), tmp_path, torch.float32, "5GB", digests=False)
    assert "model.layers.1.mlp.experts.down_proj" in written


def test_the_order_of_types_is_that_of_safetensors(tmp_path: Path) -> None:
    tensors = {f"{number}": torch.ones(2, 3).to(dtype) for number, dtype in enumerate([*DTYPE_NAMES, *DTYPE_NAMES])}
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    plan = _Plan(tiny_model("llama"), torch.float32, "5GB")
    plan._lay_out("ours", tensors)
    assert (tmp_path / "theirs.safetensors").read_bytes().startswith(plan._headers["ours"])


def test_a_tensor_that_does_not_come_is_an_error(tmp_path: Path) -> None:
    model = tiny_model("llama")
    weights = (pair for pair in merged_weights(ModelParts(model)) if pair[0] != "model.norm.weight")
    with pytest.raises(CheckpointError, match=r"1 tensors of the model were not written, e\.g\. 'model\.norm\.weight'"):
        write_weights(skeleton_of(model), weights, tmp_path, torch.float32, "5GB", digests=False)
