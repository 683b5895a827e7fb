import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from torch import nn

from unified_lm.config.schema import LoraConfig
from unified_lm.core.errors import ModelError
from unified_lm.core.random import RngState
from unified_lm.models.dropout import adapted_linear, draw_dropped, draw_keep_mask, keep_probability
from unified_lm.models.lora import (
    apply_lora,
    expert_parameter_names,
    linear_module_names,
    lora_deltas,
    remove_lora,
)
from unified_lm.models.tiny import tiny_model

TOKENS = torch.tensor([[1, 70, 80, 90, 100, 110, 120, 130], [1, 9, 8, 7, 6, 5, 4, 3]])
EXPERTS = ("q_proj", "gate_up_proj", "down_proj")


def randomize(model: nn.Module, seed: int = 5) -> None:
    """Give B (zero at first) values, so that the adapters do something."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.1


def adapter_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters() if "lora_" in name}


def loss_of(model: nn.Module) -> torch.Tensor:
    return model(TOKENS).logits.float().logsumexp(-1).mean()


# --- targets


def test_all_linear_adapts_everything_but_the_head_and_changes_nothing_at_first() -> None:
    model = tiny_model("llama")
    before = model(TOKENS).logits
    report = apply_lora(model, LoraConfig(r=4), seed=0)
    assert len(report.targets) == 14
    assert not any("lm_head" in target for target in report.targets)
    assert torch.equal(model(TOKENS).logits, before)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trainable)
    assert report.num_trainable == sum(p.numel() for p in model.parameters() if p.requires_grad) > 0
    assert report.num_total == sum(p.numel() for p in model.parameters())


def test_the_inner_decoder_uses_the_adapters() -> None:
    model = tiny_model("llama")
    before = model.model(TOKENS)[0]
    apply_lora(model, LoraConfig(r=4, target_modules=("q_proj",)), seed=0)
    randomize(model)
    assert (model.model(TOKENS)[0] - before).abs().max() > 1e-3


def test_targets_by_suffix() -> None:
    model = tiny_model("llama")
    report = apply_lora(model, LoraConfig(target_modules=("mlp.down_proj", "v_proj")), seed=0)
    assert sorted({t.rpartition(".")[2] for t in report.targets}) == ["down_proj", "v_proj"]


def test_every_target_without_a_match_is_named() -> None:
    with pytest.raises(ModelError) as error:
        apply_lora(tiny_model("llama"), LoraConfig(target_modules=("q_proj", "query", "c_attn")), seed=0)
    assert "'query', 'c_attn' matches no linear layer" in str(error.value)
    assert "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj" in str(error.value)
    with pytest.raises(ModelError, match="Did you mean 'q_proj'"):
        apply_lora(tiny_model("llama"), LoraConfig(target_modules=("q_prj",)), seed=0)
    with pytest.raises(ModelError, match="output head, which is never adapted"):
        apply_lora(tiny_model("llama"), LoraConfig(target_modules=("lm_head",)), seed=0)
    with pytest.raises(ModelError, match="target_modules is empty"):
        apply_lora(tiny_model("llama"), LoraConfig(target_modules=()), seed=0)


def test_partial_suffixes_do_not_match() -> None:
    with pytest.raises(ModelError, match="'proj' matches no linear layer"):
        apply_lora(tiny_model("llama"), LoraConfig(target_modules=("proj",)), seed=0)


def test_a_second_adapter_and_a_missing_quantization_are_refused() -> None:
    model = tiny_model("llama")
    apply_lora(model, LoraConfig(), seed=0)
    with pytest.raises(ModelError, match="already has an adapter"):
        apply_lora(model, LoraConfig(), seed=0)
    with pytest.raises(ModelError, match="not loaded in 4 bit"):
        apply_lora(tiny_model("llama"), LoraConfig(quantize_4bit=True), seed=0)


def test_works_without_storage_for_estimates() -> None:
    with torch.device("meta"):
        model = tiny_model("mixtral")
    real = tiny_model("mixtral")
    assert apply_lora(model.to("meta"), LoraConfig(), 0).num_trainable == apply_lora(real, LoraConfig(), 0).num_trainable


# --- initialization


def test_initialization_depends_on_seed_and_name_alone() -> None:
    states = []
    for global_seed, seed in ((1, 7), (2, 7), (2, 8)):
        torch.manual_seed(global_seed)
        model = tiny_model("llama")
        before = torch.get_rng_state()
        apply_lora(model, LoraConfig(), seed=seed)
        assert torch.equal(before, torch.get_rng_state())
        states.append(adapter_of(model))
    name = "model.layers.1.self_attn.q_proj.lora_A.default.weight"
    assert torch.equal(states[0][name], states[1][name])
    assert not torch.equal(states[0][name], states[2][name])
    assert states[0][name].abs().max() <= 64**-0.5
    assert not torch.equal(states[0][name], states[0][name.replace("layers.1", "layers.0")])


def test_adapters_have_the_dtype_of_the_weights() -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    apply_lora(model, LoraConfig(), seed=0)
    assert {tensor.dtype for tensor in adapter_of(model).values()} == {torch.bfloat16}


# --- the layer


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gpt_neox", "deepseek_v3"])
def test_outputs_and_gradients_equal_pefts_own_layers(family: str) -> None:
    ours, theirs = tiny_model(family), tiny_model(family)
    wanted = linear_module_names(ours)
    if family == "deepseek_v3":  # peft rewrites gate_proj and others into fused experts: compare attention alone
        wanted = tuple(name for name in wanted if "attn" in name)
    targets = apply_lora(ours, LoraConfig(r=4, alpha=7.0, dropout=0.0, target_modules=wanted), seed=0).targets
    randomize(ours)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fan_in_fan_out, which peft sets right by itself
        theirs = get_peft_model(theirs, PeftConfig(r=4, lora_alpha=7, target_modules=list(targets))).base_model.model
    theirs.load_state_dict(ours.state_dict())
    loss, reference = loss_of(ours.eval()), loss_of(theirs.eval())
    torch.testing.assert_close(loss, reference, rtol=1e-6, atol=1e-6)
    loss.backward()
    reference.backward()
    gradients = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    expected = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-7, msg=name)


def plain_formula(x, weight, bias, a, b, scaling, dropout, dropped):
    kept = torch.ones(x.numel())
    if dropped is not None:
        kept[dropped] = 0.0
    return x @ weight.T + bias + scaling * ((x * kept.view(x.shape) / (1 - dropout)) @ a.T) @ b.T


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_layer_equals_the_plain_formula_under_a_given_mask(dropout: float) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (12, 6), "weight": (10, 6), "bias": (10,), "a": (3, 6), "b": (10, 3)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    dropped = draw_dropped(72, dropout) if dropout else None
    upstream = torch.randn(12, 10, generator=generator)
    results = []
    for layer in (adapted_linear, plain_formula):
        inputs = {name: t.clone().requires_grad_(name in "xab") for name, t in tensors.items()}
        out = layer(**inputs, scaling=2.0, dropout=dropout, dropped=dropped)
        out.backward(upstream)
        results.append((out, *(inputs[name].grad for name in "xab")))
    for mine, expected in zip(*results, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)
    if dropout:  # able to fail: another mask gives another result
        other = adapted_linear(**tensors, scaling=2.0, dropout=dropout, dropped=draw_dropped(72, dropout))
        assert (other - results[0][0]).abs().max() > 1e-2


def kept_by_mask(shape: tuple[int, int], probability: float) -> torch.Tensor:
    keep = draw_keep_mask(shape, probability)
    assert keep.shape == shape
    assert set(keep.unique().tolist()) == {-1, 0}
    return -keep.double()


def kept_by_places(shape: tuple[int, int], probability: float) -> torch.Tensor:
    kept = torch.ones(shape[0] * shape[1], dtype=torch.float64)
    kept[draw_dropped(len(kept), probability)] = 0.0
    return kept.view(shape)


@pytest.mark.parametrize("draw", [kept_by_mask, kept_by_places])
@pytest.mark.parametrize("probability", [0.05, 0.1, 0.5])
def test_dropout_rate_and_independence(probability: float, draw: Callable[[tuple[int, int], float], torch.Tensor]) -> None:
    torch.manual_seed(0)
    shape = (1000, 1001)  # several blocks, and no multiple of eight
    kept = draw(shape, probability)
    deviation = (probability * (1 - probability) / kept.numel()) ** 0.5
    assert abs(kept.mean() - (1 - probability)) < 5 * deviation
    assert abs(keep_probability(probability) - (1 - probability)) < 2**-24
    centered = kept - kept.mean()
    for shifted in (centered.roll(1, 0), centered.roll(1, 1), centered.roll(4, 1)):
        assert abs((centered * shifted).mean()) < 5 * deviation**2 * kept.numel() ** 0.5


def test_dropout_repeats_with_the_generator_and_differs_between_modules() -> None:
    model = tiny_model("llama")
    apply_lora(model, LoraConfig(dropout=0.3), seed=0)
    randomize(model)
    model.train()
    state = RngState.capture()
    first, second = loss_of(model), loss_of(model)
    state.restore()
    assert torch.equal(loss_of(model), first)
    assert not torch.equal(second, first)
    assert torch.equal(loss_of(model.eval()), loss_of(model))
    state.restore()
    assert not torch.equal(draw_keep_mask((4, 64), 0.3), draw_keep_mask((4, 64), 0.3))


def test_gradients_agree_with_gradient_checkpointing_and_dropout() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model("llama").train()
        apply_lora(model, LoraConfig(dropout=0.2), seed=0)
        randomize(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(3)
        loss_of(model).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=0, msg=name)


def test_autocast_computes_in_bfloat16_with_float32_gradients() -> None:
    model = tiny_model("llama").train()
    apply_lora(model, LoraConfig(dropout=0.1), seed=0)
    randomize(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.model.layers[0].mlp.down_proj(torch.randn(2, 3, 128))
        loss_of(model).backward()
    assert hidden.dtype == torch.bfloat16
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


# --- experts


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe", "gpt_oss", "deepseek_v2", "deepseek_v3"])
def test_all_linear_says_that_fused_experts_are_left_out(family: str) -> None:
    model = tiny_model(family)
    report = apply_lora(model, LoraConfig(), seed=0)
    assert not any(target.endswith("gate_up_proj") for target in report.targets)
    assert "experts.gate_up_proj" in report.notices[0]


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe", "gpt_oss"])
def test_named_experts_are_adapted_and_their_updates_exact(family: str) -> None:
    model = tiny_model(family)
    report = apply_lora(model, LoraConfig(r=2, dropout=0.05, target_modules=EXPERTS), seed=0)
    assert sum(".experts." in target for target in report.targets) == len(expert_parameter_names(tiny_model(family))) == 4
    assert "without dropout" in report.notices[0]
    randomize(model)
    merged = merge(model)
    torch.testing.assert_close(merged(TOKENS).logits, model(TOKENS).logits, rtol=1e-4, atol=1e-5)
    assert (tiny_model(family)(TOKENS).logits - merged(TOKENS).logits).abs().max() > 1e-2
    loss_of(model.train()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


def test_unfused_expert_names_are_an_error_that_names_the_fused_ones() -> None:
    with pytest.raises(ModelError, match=r"'w1' matches no linear layer.*experts\.gate_up_proj, experts\.down_proj"):
        apply_lora(tiny_model("mixtral"), LoraConfig(target_modules=("q_proj", "w1")), seed=0)


# --- state, merging, removal


def merge(model: nn.Module) -> nn.Module:
    merged = copy.deepcopy(model)
    updates = {update.name: update for update in lora_deltas(merged)}
    remove_lora(merged)
    for name, parameter in merged.named_parameters():
        if name in updates:
            parameter.data = (parameter.float() + updates.pop(name).delta).to(parameter.dtype)
    assert not updates, "an update has no parameter"
    return merged


@pytest.mark.parametrize("family", ["llama", "gpt2", "deepseek_v2", "falcon"])
def test_merged_equals_adapter(family: str) -> None:
    model = tiny_model(family)
    apply_lora(model, LoraConfig(r=4), seed=0)
    randomize(model)
    torch.testing.assert_close(merge(model)(TOKENS).logits, model(TOKENS).logits, rtol=1e-4, atol=1e-5)


def test_deltas_are_float32_whatever_the_weights() -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    apply_lora(model, LoraConfig(target_modules=("q_proj",)), seed=0)
    for update in lora_deltas(model):
        assert update.delta.dtype == torch.float32
        assert update.base.dtype == torch.bfloat16
        assert update.delta.shape == update.base.shape


@pytest.mark.parametrize("targets", ["all-linear", EXPERTS])
def test_removal_restores_the_model(targets) -> None:
    model = tiny_model("mixtral")
    names = [name for name, _ in model.named_parameters()]
    before = model(TOKENS).logits
    apply_lora(model, LoraConfig(target_modules=targets), seed=0)
    randomize(model)
    remove_lora(model)
    assert [name for name, _ in model.named_parameters()] == names
    assert torch.equal(model(TOKENS).logits, before)
    assert all(p.requires_grad for p in model.parameters())
