"""Memory before the run: exact parameter counts, formulas that agree with what torch really keeps, nothing loaded."""

import io
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM

from unified_lm.composition.compose import compose, compose_run
from unified_lm.composition.locate import list_recipes
from unified_lm.config.schema import LoraConfig, ModelConfig
from unified_lm.core.errors import ModelError
from unified_lm.engine.accounting.dry_run import print_dry_run, training_teraflop
from unified_lm.engine.accounting.estimate import activation_bytes, estimate, model_configuration
from unified_lm.models.lora import apply_lora
from unified_lm.models.tiny import tiny_model

PUBLISHED = {
    "mistral7b": 7_241_732_096,
    "mixtral8x7b": 46_702_792_704,
    "llama2_7b": 6_738_415_616,
    "llama3_8b": 8_030_261_248,
    "sheared_llama_1_3b": 1_345_423_360,
    "qwen3": 596_049_920,
    "smollm2_135m": 134_515_008,
}


@pytest.mark.parametrize(("model", "parameters"), PUBLISHED.items())
def test_parameter_counts_are_those_of_the_published_models(model: str, parameters: int) -> None:
    found = estimate(compose_run(["recipe=grit_mistral7b", f"model={model}"]))
    assert found.num_parameters == found.num_trainable == parameters


def test_architectures_keep_what_changes_attention() -> None:
    v1 = model_configuration(compose_run(["recipe=grit_mistral7b"]).model)
    v2 = model_configuration(compose_run(["recipe=llm2vec_mntp"]).model)
    assert (v1.sliding_window, v1.rope_parameters["rope_theta"]) == (4096, 1e4)
    assert (v2.sliding_window, v2.rope_parameters["rope_theta"]) == (None, 1e6)


def test_lora_counts_agree_with_real_adapters() -> None:
    config = compose_run(["recipe=llm2vec_mntp", "model=tiny_random"])
    model = tiny_model("mistral")
    report = apply_lora(model, config.lora or LoraConfig(), seed=0)
    found = estimate(config)
    assert (found.num_trainable, found.num_parameters) == (report.num_trainable, report.num_total)
    mistral = estimate(compose_run(["recipe=llm2vec_mntp"]))
    assert mistral.num_trainable == 41_943_040, "r=16 on the seven projections of Mistral-7B"


def test_bytes_of_full_fine_tuning() -> None:
    parts = estimate(compose_run(["recipe=grit_mistral7b"]), world_size=8).bytes_by_part
    n, largest = PUBLISHED["mistral7b"], 4096 * 14336
    assert parts["weights"] == 2 * n
    assert 4 * n < parts["gradients"] <= 4 * n + 2 * max(largest, 32000 * 4096)
    assert parts["optimizer"] == 12 * n, "float32 master weights and two moments"
    float32 = estimate(compose_run(["recipe=grit_mistral7b", "model.dtype=float32"])).bytes_by_part
    assert (float32["weights"], float32["gradients"], float32["optimizer"]) == (4 * n, 4 * n, 8 * n)
    autocast = estimate(compose_run(["recipe=grit_mistral7b", "model.dtype=float32", "model.autocast=true"])).bytes_by_part
    assert autocast["weights"] == 6 * n
    assert parts["communication"] > float32["communication"] == 0


def test_quantized_weights_take_a_quarter() -> None:
    plain = estimate(compose_run(["recipe=llm2vec_mntp", "lora=all_linear"])).bytes_by_part
    quantized = estimate(compose_run(["recipe=llm2vec_mntp", "lora=qlora"])).bytes_by_part
    assert 0.25 < quantized["weights"] / plain["weights"] < 0.35


def test_logits_appear_only_where_tokens_are_predicted() -> None:
    assert estimate(compose_run(["recipe=embedding_only"])).bytes_by_part["logits"] == 0
    generative = estimate(compose_run(["recipe=generative_only"])).bytes_by_part
    assert 0 < generative["logits"] < 8192 * 32000 * 4, "never those of a whole pack"
    assert generative["embeddings"] == 0


def test_tokens_per_step_is_the_bound_of_the_limits() -> None:
    run = compose_run(["recipe=grit_mistral7b"])
    assert run.streams["embedding"].tokens_per_step == 2048 * (256 + 2 * 2048)
    found = estimate(run, world_size=8)
    assert found.tokens_per_step == 2048 * (256 + 2 * 2048) + 256 * 2048
    assert found.packs_per_rank == -(-found.tokens_per_step // 8 // 8192)
    views = compose_run(["recipe=llm2vec_simcse"]).streams["simcse"]
    assert views.tokens_per_step == 128 * 128 * 2


def kept_bytes(model: torch.nn.Module, run: Any) -> int:
    """Bytes that autograd keeps for the backward, each storage once, parameters and their views left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()} | {
        b.untyped_storage().data_ptr() for b in model.buffers()
    }
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run()
    size = sum(storage.nbytes() for storage in kept.values())
    del output
    return size


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen3"])
def test_the_activation_formula_is_near_what_autograd_keeps(dtype: str, family: str) -> None:
    tokens = 256
    values = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 64}
    own = {"mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2}, "qwen3": {"head_dim": 32}}
    config = AutoConfig.for_model(family, **values, num_key_value_heads=2, **own.get(family, {}))
    model = AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype)).train()
    ids = torch.randint(64, (1, tokens))
    measured = kept_bytes(model, lambda: model.model(ids, use_cache=False).last_hidden_state)
    run = compose_run(["recipe=grit_smollm2"])
    run = replace(run, model=replace(run.model, dtype=dtype))
    assert activation_bytes(run, config, tokens) == pytest.approx(measured, rel=0.08)


def test_checkpointing_keeps_one_layer_and_the_inputs_of_the_others() -> None:
    run = compose_run(["recipe=grit_mistral7b"])
    without = replace(run, model=replace(run.model, gradient_checkpointing=False))
    config = model_configuration(run.model)
    assert activation_bytes(run, config, 8192) * 8 < activation_bytes(without, config, 8192)


@pytest.mark.parametrize("recipe", [name for name in sorted(list_recipes()) if not name.startswith("ablation_")])
def test_every_recipe_dry_runs(recipe: str) -> None:
    out = io.StringIO()
    print_dry_run(compose([f"recipe={recipe}"]), Console(file=out, width=120), world_size=8)
    text = out.getvalue()
    for part in ("weights", "gradients", "optimizer", "activations", "logits", "tokens per step", "optimizer steps"):
        assert part in text
    assert "learning_rate" in text, "the resolved configuration is printed"
    if recipe == "llm2vec":
        assert "stage 2 of 2: llm2vec_simcse" in text


def test_what_cannot_be_estimated_says_why() -> None:
    with pytest.raises(ModelError, match="transformers knows no family 'lama'"):
        model_configuration(ModelConfig(name="x", family="lama", architecture={"hidden_size": 8}))
    with pytest.raises(ModelError, match=r"no configuration of the model 'no/such-model'(.|\n)*model.architecture"):
        model_configuration(ModelConfig(name="no/such-model"))
    run = compose_run(["recipe=llm2vec_mntp", "lora.target_modules=[q_porj]"])
    with pytest.raises(ModelError, match="q_porj"):
        estimate(run)


def test_a_local_folder_is_enough(tmp_path: Any) -> None:
    tiny_model("qwen3").config.save_pretrained(tmp_path)
    assert model_configuration(ModelConfig(name=str(tmp_path))).model_type == "qwen3"
    (tmp_path / "export").mkdir()
    tiny_model("llama").config.save_pretrained(tmp_path / "export")
    assert model_configuration(ModelConfig(init_from=str(tmp_path))).model_type == "llama"


@pytest.mark.parametrize("key", ["name", "init_from"])
def test_an_adapter_is_as_large_as_its_base(tmp_path: Any, key: str) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "base")
    settings = PeftConfig(target_modules=["q_proj"])
    get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), settings).save_pretrained(tmp_path / "adapter")
    found = model_configuration(ModelConfig(**{key: str(tmp_path / "adapter")}, architecture={}))
    assert found.model_type == "llama"
    arguments = ["recipe=llm2vec_simcse", f"model.{key}={tmp_path}/adapter", "model.family=llama", "model.architecture={}"]
    assert estimate(compose_run(arguments)).num_parameters >= sum(map(torch.numel, model.parameters()))


def test_an_export_counts_before_the_description_of_a_recipe(tmp_path: Any) -> None:
    """`grit_mistral7b` describes 7 billion parameters; a run from another export is as large as that."""
    tiny_model("mistral").save_pretrained(tmp_path)
    described = compose_run(["recipe=grit_mistral7b"]).model
    assert model_configuration(replace(described, init_from=str(tmp_path))).hidden_size < described.architecture["hidden_size"]
    assert model_configuration(replace(described, init_from="no/such")).hidden_size == described.architecture["hidden_size"]
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot estimate"):  # not by what it does not start from
        model_configuration(replace(described, init_from=str(tmp_path)))


def test_balanced_routers_forward_every_sample_twice() -> None:
    arguments = ["recipe=grit_mixtral8x7b", "model=tiny_random"]
    balanced, plain = (
        compose_run([*arguments, *more]) for more in ([], ["streams.generation.objective.router_aux_loss_coef=0"])
    )
    found = estimate(plain)
    assert found.packs_per_rank > 1
    again = 2 * found.num_parameters * found.tokens_by_stream["generation"] * found.optimizer_steps / 1e12
    assert training_teraflop(balanced, found) - training_teraflop(plain, found) == pytest.approx(again)


@pytest.mark.parametrize(
    ("architecture", "told"),
    [
        ("hidden_size: 64.5", "describe no llama model .*hidden_size"),
        ("num_attention_heads: 0", "describe no llama model"),
        (f"hidden_size: {2**40}", "describe no llama model"),
        ("num_hidden_layers: 2147483648", "got 2147483648 layers, expected at most 2000"),
        ("rope_scaling: linear", "describe no llama model"),
    ],
)
def test_odd_values_of_an_architecture_are_refused_by_name(architecture: str, told: str) -> None:
    config = compose_run(["recipe=grit_smollm2", "model.family=llama", f"model.architecture={{{architecture}}}"])
    with pytest.raises(ModelError, match=rf"model\.architecture: .*{told}"):
        estimate(config)


def test_adapters_of_an_estimate_take_no_memory() -> None:
    config = compose_run(["recipe=grit_smollm2", "lora=all_linear", "lora.r=65536"])
    assert estimate(config).num_trainable > 1e10, "40 GB that nobody allocates"


def test_a_float32_projection_is_whole_on_every_rank_under_zero() -> None:
    settings = ["recipe=grit_mistral7b", "model=tiny_random", "model.dtype=bfloat16", "parallel.persistence_threshold=0"]
    for stage in (1, 2, 3):
        plain, projected = (
            estimate(compose_run([*settings, f"parallel=zero{stage}", *more]), world_size=4).bytes_by_part
            for more in ([], ["model.projection_dim=32"])
        )
        parameters = (64 + 1) * 32
        assert projected["weights"] - plain["weights"] == 4 * parameters
        assert projected["gradients"] - plain["gradients"] == 4 * parameters
        assert projected["optimizer"] - plain["optimizer"] == 8 * parameters
