"""`model=tiny_random`: small, offline, and it says so."""

import pytest

from unified_lm.composition.compose import compose, compose_run
from unified_lm.composition.locate import list_recipes
from unified_lm.config.schema import ChainConfig, RunConfig

FAMILY = {
    "grit_mixtral8x7b": "mixtral",
    "grit_smollm2": "llama",
    "grit_rag_smollm2": "llama",
    "grit_smollm2_short": "llama",
    "kto_smollm2": "llama",
    "grit_upcycled_smollm2": "mixtral",
    "upcycled_smollm2": "mixtral",
    "grit_olmoe": "olmoe",
    "moee_olmoe": "olmoe",
    "moee_qwen15_moe": "qwen2_moe",
    "moee_deepseek16b": "deepseek_v2",
    **dict.fromkeys(
        ("monet_1.4b", "monet_4.1b", "monet_850m", "monet_chat", "monet_code", "monet_tiny", "grit_monet"), "monet"
    ),
}


@pytest.mark.parametrize("lora", [None, "all_linear"])
@pytest.mark.parametrize("recipe", [name for name in sorted(list_recipes()) if not name.startswith("ablation_")])
def test_every_recipe_has_a_rehearsal(recipe: str, lora: str | None) -> None:
    config = compose([f"recipe={recipe}", "model=tiny_random", *([f"lora={lora}"] if lora else [])])
    for run in config.stages if isinstance(config, ChainConfig) else (config,):
        assert run.model.tiny_random
        assert run.model.family == FAMILY.get(recipe, "mistral")
        assert run.model.dtype == "float32"
        assert run.model.tokenizer is None, "a tiny model has a tokenizer of its own; no download"
        assert run.max_steps <= 20
        assert run.packing.token_budget <= 1024
        assert any("tiny random" in notice for notice in run.notices)
        for stream in run.streams.values():
            assert [source.builtin for source in stream.sources] == ["pydocs"]
            assert stream.batch_size <= 4
            assert getattr(stream, "num_hard_negatives", 0) == 0
            sizes = {getattr(stream, key) for key in stream.limit_keys}
            assert sizes == ({256, 512} if stream.format == "grounded" else {256})
            assert stream.longest_sample <= run.packing.token_budget
        for sources in run.validation.sources.values():
            assert {(source.builtin, source.split) for source in sources} == {("pydocs", "test")}


def test_what_was_given_stays() -> None:
    run = compose_run(
        [
            "recipe=grit_mistral7b",
            "model=tiny_random",
            "model.family=qwen3",
            "model.dtype=bfloat16",
            "max_steps=1253",
            "data=files",
            "data.path=rows",
            "streams.embedding.batch_size=64",
            "streams.embedding.num_hard_negatives=2",
            "streams.generation.objective.micro_batch_size=2",
            "packing.token_budget=4096",
        ]
    )
    assert (run.model.family, run.model.dtype, run.max_steps, run.packing.token_budget) == ("qwen3", "bfloat16", 1253, 4096)
    embedding, generation = run.streams["embedding"], run.streams["generation"]
    assert (embedding.batch_size, embedding.num_hard_negatives, generation.batch_size) == (64, 2, 4)
    assert generation.objective.micro_batch_size == 2
    assert embedding.sources[0].path == "rows"
    assert "streams.generation.batch_size 256 -> 4" in " ".join(run.notices)
    assert "pydocs" not in " ".join(run.notices)


def test_sources_given_for_one_stream_leave_the_other_to_the_rehearsal() -> None:
    run = compose_run(["recipe=grit_mistral7b", "model=tiny_random", "streams.generation.sources=[{path: x}]"])
    assert run.streams["generation"].sources[0].path == "x"
    assert run.streams["embedding"].sources[0].builtin == "pydocs"


def test_the_flag_does_the_same_as_the_choice() -> None:
    by_choice, by_flag = (compose(["recipe=grit_smollm2", a]) for a in ("model=tiny_random", "model.tiny_random=true"))
    assert isinstance(by_choice, RunConfig)
    assert by_choice == by_flag


def test_sentences_for_views() -> None:
    run = compose_run(["recipe=llm2vec_simcse", "model=tiny_random"])
    assert run.streams["simcse"].sources[0].subset == "sentences"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["streams.generation.batch_size=2"], (2, 2)),
        (["streams.generation.batch_size=6"], (6, 6)),
        (["streams.generation.batch_size=16", "streams.generation.objective.micro_batch_size=16"], (16, 16)),
        ([], (4, 4)),
    ],
)
def test_a_micro_batch_is_no_larger_than_the_batch_of_the_rehearsal(arguments, expected) -> None:
    stream = compose_run(["recipe=grit_mistral7b", "model=tiny_random", *arguments]).streams["generation"]
    assert (stream.batch_size, stream.objective.micro_batch_size) == expected
