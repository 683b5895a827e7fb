"""Every recipe composes, with every model and group of its; published numbers stay published."""

from pathlib import Path

import pytest

from unified_lm.composition.compose import compose, compose_run, from_yaml, to_yaml
from unified_lm.composition.locate import group_options, list_recipes, recipes_dir
from unified_lm.config.schema import ChainConfig, RunConfig

RECIPES = sorted(list_recipes())
LLM2VEC_MODELS = ("mistral7b", "llama2_7b", "llama3_8b", "sheared_llama_1_3b", "qwen3", "smollm2_135m")


def runs_of(*argv: str) -> tuple[RunConfig, ...]:
    config = compose(argv)
    return config.stages if isinstance(config, ChainConfig) else (config,)


def test_the_recipes_are_these() -> None:
    assert [
        *("ablation_attention", "ablation_base", "ablation_batch", "ablation_head", "ablation_loss", "ablation_monet"),
        *("ablation_negatives", "ablation_precision", "ablation_unified"),
        "embedding_only",
        "generative_only",
        "grit_mistral7b",
        "grit_mixtral8x7b",
        "grit_monet",
        "grit_olmoe",
        "grit_rag_mistral7b",
        "grit_rag_smollm2",
        "grit_smollm2",
        "grit_smollm2_short",
        "grit_upcycled_smollm2",
        "kto_gritlm7b",
        "kto_smollm2",
        "llm2vec",
        "llm2vec_mntp",
        "llm2vec_simcse",
        "llm2vec_supervised",
        *("moee_deepseek16b", "moee_olmoe", "moee_qwen15_moe"),
        *("monet_1.4b", "monet_4.1b", "monet_850m", "monet_chat", "monet_code", "monet_tiny"),
        "upcycled_smollm2",
    ] == RECIPES
    assert set(LLM2VEC_MODELS) < set(group_options()["model"])
    assert all(list_recipes().values()), "every recipe has a description"


@pytest.mark.parametrize("recipe", [name for name in RECIPES if not name.startswith("ablation_")])
def test_composes_and_round_trips(recipe: str, tmp_path: Path) -> None:
    config = compose([f"recipe={recipe}"])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert from_yaml(tmp_path / "config.yaml") == config


@pytest.mark.parametrize("model", LLM2VEC_MODELS)
def test_llm2vec_composes_with_every_model(model: str) -> None:
    for run in (*runs_of("recipe=llm2vec", f"model={model}"), *runs_of("recipe=llm2vec_supervised", f"model={model}")):
        assert run.model.architecture["hidden_size"] > 0
        assert all(stream.sources for stream in run.streams.values())


@pytest.mark.parametrize("recipe", ["grit_mistral7b", "grit_smollm2", "embedding_only", "generative_only"])
@pytest.mark.parametrize("model", ["smollm2_135m", "mixtral8x7b"])
def test_other_recipes_compose_with_other_models(recipe: str, model: str) -> None:
    run = compose_run([f"recipe={recipe}", f"model={model}"])
    assert run.model.family == {"smollm2_135m": "llama", "mixtral8x7b": "mixtral"}[model]
    assert all(stream.sources for stream in run.streams.values())


@pytest.mark.parametrize("group", ["lora", "optim", "parallel", "packing", "logging"])
def test_composes_with_every_option_of_every_group(group: str) -> None:
    for option in group_options()[group]:
        needs = ["model.dtype=float32"] if option == "zero0" else []
        assert compose_run(["recipe=llm2vec_mntp", f"{group}={option}", "optim.horizon_steps=null", *needs])


@pytest.mark.parametrize("recipe", RECIPES)
def test_stays_short(recipe: str) -> None:
    lines = (recipes_dir() / f"{recipe}.yaml").read_text().splitlines()
    own = [line for line in lines if line.strip() and not line.startswith(("#", "  - ", "defaults"))]
    assert len(own) <= 40


def test_gritlm_7b_is_as_published() -> None:
    run = compose_run(["recipe=grit_mistral7b"])
    embedding, generation = run.streams["embedding"], run.streams["generation"]
    assert (embedding.batch_size, generation.batch_size, run.max_steps) == (2048, 256, 1253)
    assert (run.optim.learning_rate, run.optim.warmup_ratio, run.optim.weight_decay) == (2e-5, 0.03, 0.0)
    assert (embedding.objective.temperature, embedding.num_hard_negatives) == (0.02, 1)
    assert (embedding.max_query_tokens, embedding.max_document_tokens, generation.max_tokens) == (256, 2048, 2048)
    assert (generation.objective.normalization, generation.objective.micro_batch_size) == ("mixed", 32)
    assert (embedding.attention, generation.attention, run.model.pooling) == ("bidirectional", "causal", "mean")
    assert embedding.objective.gradient_scale == "exact"
    compat = compose_run(["recipe=grit_mistral7b", "streams.embedding.objective.gradient_scale=inverse_world_size"])
    assert compat.streams["embedding"].objective.reference_world_size == 8


def test_gritlm_8x7b_is_as_published() -> None:
    run = compose_run(["recipe=grit_mixtral8x7b"])
    assert {stream.batch_size for stream in run.streams.values()} == {256}
    objective = run.streams["generation"].objective
    assert (objective.normalization, objective.weight, objective.router_aux_loss_coef) == ("sum_per_sample", 0.003, 0.02)
    assert run.streams["embedding"].objective.router_balance == 0.0


@pytest.mark.parametrize(
    ("size", "shape"),
    [("850m", (24, 1536, 12, 12, 6)), ("1.4b", (24, 2048, 16, 16, 8)), ("4.1b", (32, 3072, 24, 24, 12))],
)
def test_monet_is_as_published(size: str, shape: tuple[int, ...]) -> None:
    run = compose_run([f"recipe=monet_{size}"])
    keys = ("num_hidden_layers", "hidden_size", "num_attention_heads", "moe_dim", "moe_heads")
    assert tuple(run.model.architecture[key] for key in keys) == shape
    stream = run.streams["text"]
    assert stream.tokens_per_step == 2**21
    assert run.max_steps * stream.tokens_per_step == pytest.approx(100e9, rel=1e-4)
    assert (run.optim.learning_rate, run.optim.frozen) == (5e-4, ())
    assert (stream.objective.router_uniformity_coef, stream.objective.router_ambiguity_coef) == (1e-3, 1e-3)
    assert stream.is_flowing


def test_monet_is_fine_tuned_with_frozen_routers() -> None:
    for recipe in ("monet_chat", "monet_code", "grit_monet"):
        run = compose_run([f"recipe={recipe}"])
        assert (run.model.source, run.optim.frozen) == ("hub", ("router",))
        assert (run.model.name, run.model.tokenizer) == ("MonetLLM/monet-vd-1.4B-100BT-hf", None)
        assert all(getattr(s.objective, "router_uniformity_coef", None) is None for s in run.streams.values())


def test_llm2vec_adapts_monets_attention() -> None:
    for run in runs_of("recipe=llm2vec", "model=monet_vd_1.4b"):
        assert run.lora is not None
        assert run.lora.target_modules == ("q_proj", "k_proj", "v_proj", "o_proj")


def test_kto_is_as_published() -> None:
    run = compose_run(["recipe=kto_gritlm7b"])
    stream = run.streams["preference"]
    assert (run.model.name, run.lora, run.optim.learning_rate, run.optim.warmup_ratio) == ("GritLM/GritLM-7B", None, 5e-7, 0.0)
    assert (stream.objective.beta, stream.batch_size, stream.objective.reference) == (0.1, 32, "auto")
    assert run.max_steps * stream.batch_size == pytest.approx(2 * 61_135, rel=1e-3)
    assert run.export.modes == ("embed", "generate")


@pytest.mark.parametrize("model", LLM2VEC_MODELS)
def test_mistral_alone_has_its_own_masking(model: str) -> None:
    masking = compose_run(["recipe=llm2vec_mntp", f"model={model}"]).streams["mntp"].masking
    assert masking is not None
    expected = (0.8, "all_mask") if model == "mistral7b" else (0.2, "bert")
    assert (masking.probability, masking.scheme, masking.mask_token) == (*expected, "_")


def test_llm2vec_is_as_published() -> None:
    mntp, simcse, supervised = (compose_run([f"recipe=llm2vec_{stage}"]) for stage in ("mntp", "simcse", "supervised"))
    for run in (mntp, simcse, supervised):
        assert run.lora is not None
        assert (run.lora.r, run.lora.alpha, run.lora.dropout) == (16, 32.0, 0.05)
        assert set(run.lora.target_modules) == {f"{n}_proj" for n in ("q", "k", "v", "o", "gate", "up", "down")}
        assert run.model.name == "mistralai/Mistral-7B-Instruct-v0.2"
        assert run.model.architecture["sliding_window"] is None
        assert run.max_steps == 1000
        assert run.model.gradient_checkpointing
    assert [run.optim.learning_rate for run in (mntp, simcse, supervised)] == [5e-5, 3e-5, 2e-4]
    assert [next(iter(run.streams.values())).batch_size for run in (mntp, simcse, supervised)] == [32, 128, 512]
    assert (simcse.model.attention_dropout, simcse.streams["simcse"].objective.temperature) == (0.3, 0.05)
    assert (supervised.optim.warmup_steps, supervised.streams["embedding"].objective.temperature) == (300, 0.02)
    assert supervised.streams["embedding"].num_hard_negatives == 1


def test_the_embedded_model_brings_its_own_data_unless_told_otherwise() -> None:
    run = compose_run(["recipe=llm2vec_mntp", "model=smollm2_135m"])
    assert run.streams["mntp"].sources[0].builtin == "pydocs"
    assert any("data=pydocs" in notice for notice in run.notices)
    chosen = compose_run(["recipe=llm2vec_mntp", "model=smollm2_135m", "data=wikitext103"])
    assert chosen.streams["mntp"].sources[0].hub == "Salesforce/wikitext"
    assert not chosen.notices
    assert compose_run(["recipe=llm2vec_simcse", "model=smollm2_135m"]).streams["simcse"].sources[0].subset == "sentences"
    assert not compose_run(["recipe=grit_smollm2"]).notices


@pytest.mark.parametrize("recipe", [name for name in list_recipes() if not name.startswith("ablation_")])
def test_a_long_recipe_saves_on_the_way(recipe: str) -> None:
    """What a crash may cost at most: a tenth of the run, or 200 steps."""
    for run in runs_of(f"recipe={recipe}"):
        longest = max(run.max_steps / 10, 200)
        assert run.max_steps <= 150 or 0 < run.checkpoint.every <= longest
