"""Merged = adapter, for every kind of layer that carries one; a wrong merge is caught before anything is written."""

import pytest
import torch
from transformers import PreTrainedModel

from unified_lm.config.schema import LoraConfig
from unified_lm.core.errors import CheckpointError
from unified_lm.export import merge
from unified_lm.export.merge import has_adapters, merge_lora
from unified_lm.models.backbone import Backbone
from unified_lm.models.lora import apply_lora
from unified_lm.models.tiny import tiny_model

TOKENS = torch.arange(3, 27)[None]


def adapted(family: str, targets: tuple[str, ...] | str = "all-linear", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A tiny model whose adapter does something (a fresh one has B = 0)."""
    model = tiny_model(family, dtype=dtype)
    apply_lora(model, LoraConfig(r=4, alpha=8.0, dropout=0.1, target_modules=targets), seed=0)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05)
    return model.eval()


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("llama", "all-linear"),
        ("gpt2", "all-linear"),
        ("mixtral", ("q_proj", "experts.down_proj", "experts.gate_up_proj")),
    ],
    ids=["linear", "transposed weights", "fused experts"],
)
@torch.no_grad()
def test_merged_equals_adapter(family: str, targets: tuple[str, ...] | str) -> None:
    model = adapted(family, targets)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    merged = merge_lora(model)
    assert not has_adapters(merged)
    assert set(merged.state_dict()) == set(tiny_model(family).state_dict())
    expected, got = model(TOKENS).logits, merged(TOKENS).logits
    assert (expected - got).abs().max() <= 1e-5 * expected.abs().max()
    plain = tiny_model(family)(TOKENS).logits
    assert (expected - plain).abs().max() > 1e-2 * expected.abs().max(), "the adapter must matter for this test to mean it"
    assert has_adapters(model), "the model that trains on is left as it was"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_bfloat16_rounds_once() -> None:
    model = adapted("llama", dtype=torch.bfloat16)
    layer = model.model.layers[0].self_attn.q_proj
    a, b, scaling = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]
    expected = (layer.base_layer.weight.float() + scaling * b.float() @ a.float()).to(torch.bfloat16)
    merged = merge_lora(model)
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}
    assert torch.equal(merged.model.layers[0].self_attn.q_proj.weight, expected)


def test_a_model_inside_a_backbone_keeps_its_attention() -> None:
    model = adapted("llama")
    backbone = Backbone(model, "sdpa")
    packed = model.config._attn_implementation
    merged = merge_lora(backbone.causal_lm)
    assert model.config._attn_implementation == packed
    assert merged.config._attn_implementation in ("sdpa", "eager")


def test_training_mode_is_not_disturbed() -> None:
    model = adapted("llama").train()
    merged = merge_lora(model)
    assert model.training
    assert not merged.training


def test_a_wrong_merge_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    right = merge.lora_deltas

    def halved(model: PreTrainedModel):
        for update in right(model):
            update.delta.mul_(0.5)
            yield update

    monkeypatch.setattr(merge, "lora_deltas", halved)
    with pytest.raises(CheckpointError, match="merged model differs"):
        merge_lora(adapted("llama"))
    merge_lora(adapted("llama"), verify=False)
