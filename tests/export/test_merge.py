"""Merged = adapter, for every kind of layer that carries one; a wrong merge is caught before anything is written."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from unified_lm.config.schema import LoraConfig
from unified_lm.core.errors import CheckpointError
from unified_lm.export import merge
from unified_lm.export.merge import ModelParts, has_adapters, merge_lora, merged_weights
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
        ("falcon", "all-linear"),
    ],
    ids=["linear", "transposed weights", "fused experts", "a family that changes outputs in place"],
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
    with pytest.raises(CheckpointError, match=r"outputs of model\.layers\.0\.mlp\.experts"):
        merge_lora(adapted("mixtral", ("experts.down_proj",)))
    merge_lora(adapted("llama"), verify=False)


class Recorder:
    """A `Gather` that notes what is whole at a time."""

    def __init__(self) -> None:
        self.entered: list[nn.Module] = []
        self.inside = 0

    @contextmanager
    def __call__(self, module: nn.Module, *, weights: bool = True) -> Iterator[None]:
        if weights:
            self.entered.append(module)
            self.inside += 1
            assert self.inside == 1
        yield
        self.inside -= weights


@pytest.mark.parametrize("family", ["llama", "mixtral", "deepseek_v3"])
def test_one_part_is_whole_at_a_time_and_all_are_once(family: str) -> None:
    model, recorder = adapted(family), Recorder()
    names = {name for name, _ in merged_weights(ModelParts(model, recorder))}
    assert names == set(tiny_model(family).state_dict())
    assert len({id(part) for part in recorder.entered}) == len(recorder.entered)
    whole = {id(parameter) for part in recorder.entered for parameter in part.parameters()}
    assert whole == {id(parameter) for parameter in model.parameters()}


def test_after_an_error_the_other_parts_are_still_gone_through() -> None:
    model, recorder = adapted("llama"), Recorder()
    everything = ModelParts(model, recorder)
    everything.finish()
    expected, recorder.entered = recorder.entered, []
    parts = ModelParts(model, recorder)
    for _ in merged_weights(parts):
        break
    parts.finish()
    assert recorder.entered == expected


def test_weights_are_given_up_as_they_are_merged() -> None:
    model = adapted("llama")
    expected = merge_lora(model).state_dict()
    for name, tensor in merged_weights(ModelParts(model, keep=False)):
        assert torch.equal(tensor, expected[name])
    assert sum(parameter.numel() for parameter in model.parameters()) == 0
