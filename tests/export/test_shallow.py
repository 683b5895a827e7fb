"""A view of an export's first layers: stock tools read it as the export, and see what is wrong in these layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.export.export_cases import make_manifest
from tests.export.test_directory import write
from unified_lm.config.schema import VERIFICATIONS
from unified_lm.core.errors import CheckpointError
from unified_lm.data.prompts.templates import get_template
from unified_lm.export.directory import export_model
from unified_lm.export.shallow import shallow_view
from unified_lm.export.verify import Verification, verify_export
from unified_lm.export.weight_files import Digest
from unified_lm.models.tiny import tiny_model, tiny_tokenizer

DEPTH = {"llama": "num_hidden_layers", "gpt2": "n_layer", "gemma3_text": "num_hidden_layers", "mixtral": "num_hidden_layers"}


@pytest.mark.parametrize("family", DEPTH)
def test_a_view_computes_what_the_first_layers_do(family: str, tmp_path: Path) -> None:
    model = tiny_model(family, **{DEPTH[family]: 4})
    write(tmp_path / "export", model, verify="sampled", family=family, dtype="float32")
    with shallow_view(tmp_path / "export") as view:
        shallow = AutoModelForCausalLM.from_pretrained(view)
    tokens = torch.arange(3, 15)[None]
    whole = model(tokens, output_hidden_states=True).hidden_states
    found = shallow(tokens, output_hidden_states=True).hidden_states
    assert len(found) == 3
    assert torch.equal(found[1], whole[1])


def test_layers_that_share_a_router_stay_together(tmp_path: Path) -> None:
    model = tiny_model("monet", num_hidden_layers=8, moe_groups=4)
    write(tmp_path / "export", model, verify="sampled", family="monet", dtype="float32")
    with shallow_view(tmp_path / "export") as view:
        assert AutoModelForCausalLM.from_pretrained(view).config.num_hidden_layers == 4


def test_a_model_that_is_no_deeper_is_read_itself(tmp_path: Path) -> None:
    write(tmp_path / "export")
    with shallow_view(tmp_path / "export") as view:
        assert view == tmp_path / "export"


@pytest.mark.parametrize(("layer", "seen_by"), [(0, ("full", "sampled")), (3, ("full",))])
def test_a_wrong_tensor_is_seen_in_the_layers_that_are_read(layer: int, seen_by: tuple[str, ...], tmp_path: Path) -> None:
    model, manifest = tiny_model("llama", num_hidden_layers=4), make_manifest(modes=("generate",))
    template = get_template("grit")
    export_model(model, tiny_tokenizer(), tmp_path / "export", manifest=manifest, template=template, verify="off")
    digests = {name: Digest.of(tensor) for name, tensor in model.state_dict().items()}
    for verify in VERIFICATIONS:
        verify_export(tmp_path / "export", digests, manifest, template, Verification.parse(verify), True)
    path = tmp_path / "export" / "model.safetensors"
    tensors = load_file(path)
    tensors[f"model.layers.{layer}.mlp.up_proj.weight"][0, 0] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    for verify in VERIFICATIONS:
        if verify in seen_by:
            with pytest.raises(CheckpointError, match=rf"layers\.{layer}\.mlp\.up_proj\.weight' differs"):
                verify_export(tmp_path / "export", digests, manifest, template, Verification.parse(verify), True)
        else:
            verify_export(tmp_path / "export", digests, manifest, template, Verification.parse(verify), True)
