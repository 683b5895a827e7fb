"""Contradictions: each is found, and sound configurations have none."""

import ast
import dataclasses
import inspect
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed import HashStore

from unified_lm.composition.compose import compose_run, to_yaml
from unified_lm.composition.convert import convert, from_yaml, schema_keys, to_plain
from unified_lm.composition.validate import LONGEST_WAIT, find_notices, find_problems
from unified_lm.config.schema import ModelConfig, ObjectiveConfig, RunConfig, StreamConfig
from unified_lm.core.distributed import group_timeout
from unified_lm.core.errors import ConfigError
from unified_lm.data.formats import FORMATS, MaskingConfig
from unified_lm.objectives import OBJECTIVES, NextTokenConfig


@pytest.fixture(scope="module")
def resolved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The resolved YAML of a recipe, composed once: to change one key of it is quick."""
    folder = tmp_path_factory.mktemp("resolved")

    @cache
    def make(recipe: str) -> Path:
        path = folder / f"{recipe}.yaml"
        path.write_text(to_yaml(compose_run([f"recipe={recipe}"])))
        return path

    return make


@pytest.mark.parametrize(
    ("recipe", "argument", "message"),
    [
        ("grit_smollm2", "~streams.generation.sources", "streams.generation.sources: is empty"),
        ("grit_smollm2", "max_steps=0", "max_steps: got 0, expected at least 1"),
        ("grit_smollm2", "optim.max_skipped_steps=0", "optim.max_skipped_steps: got 0, expected at least 1"),
        ("grit_smollm2", "parallel.timeout_minutes=1e12", "timeout_minutes: got 1000000000000.0, expected at most 525600"),
        ("grit_smollm2", "checkpoint={every: 10, keep_every: 25}", "expected a multiple of checkpoint.every (10)"),
        (
            "grit_smollm2",
            "streams.embedding.objective.name=next_token",
            "over embeddings, and next_token is",
        ),
        ("grit_smollm2", "streams.embedding.objective.name=contrastiv", "Did you mean 'contrastive'?"),
        (
            "llm2vec_simcse",
            "streams.simcse.objective={name: next_token, temperature: 0.02}",
            "is trained by an objective over embeddings",
        ),
        ("llm2vec_mntp", "~streams.mntp.masking", "streams.mntp.masking: is missing"),
        ("llm2vec_mntp", "streams.mntp.masking.probability=1.5", "expected a share between 0 and 1"),
        ("llm2vec_mntp", "streams.mntp.masking.scheme=all", "unknown value 'all'"),
        (
            "grit_smollm2",
            "streams.generation.masking={}",
            "is set to {}; it belongs to masked_text",
        ),
        (
            "grit_smollm2",
            "streams.generation.objective.temperature=0.05",
            "does not apply to the objective next_token",
        ),
        (
            "grit_smollm2",
            "streams.embedding.objective.normalization=sample",
            "does not apply to the objective contrastive",
        ),
        (
            "grit_smollm2",
            "streams.embedding.objective.router_aux_loss_coef=0.02",
            "router_aux_loss_coef: does not apply to the objective contrastive",
        ),
        (
            "grit_smollm2",
            "streams.generation.objective.router_aux_loss_coef=-1",
            "router_aux_loss_coef: got -1.0, expected a number of at least 0",
        ),
        (
            "grit_mixtral8x7b",
            "model.attention_kernel=padded",
            "router_aux_loss_coef: the attention kernel mixes padding",
        ),
        ("grit_smollm2", "streams.generation.objective.normalization=mixed", "'mixed' needs the samples of one micro-batch"),
        ("grit_smollm2", "streams.generation.objective.micro_batch_size=2", "only applies to normalization 'mixed'"),
        ("grit_mistral7b", "streams.generation.objective.micro_batch_size=33", "which does not divide the batch of 256"),
        (
            "grit_smollm2",
            "streams.generation.attention=bidirectional",
            "format chat cannot use 'bidirectional'",
        ),
        ("kto_smollm2", "streams.preference.objective.beta=0", "objective.beta: got 0.0, expected more than 0"),
        ("kto_smollm2", "streams.preference.objective.undesirable_weight=-1", "undesirable_weight: got -1.0, expected more"),
        ("kto_smollm2", "streams.preference.objective.reference=adapters_off", "Did you mean 'adapter_off'?"),
        ("kto_smollm2", "streams.preference.objective.temperature=0.5", "temperature: does not apply to the objective kto"),
        (
            "kto_smollm2",
            "streams.preference.objective={name: next_token}",
            "over scores of whole samples, and",
        ),
        (
            "kto_smollm2",
            "streams.preference.format=chat",
            "over tokens, and kto is one over scores",
        ),
        ("kto_smollm2", "streams.preference.attention=bidirectional", "format preference cannot use 'bidirectional'"),
        (
            "kto_gritlm7b",
            "streams.preference.objective.reference=adapter_off",
            "'adapter_off' needs adapters, and lora is none",
        ),
        ("kto_gritlm7b", "export.modes=[embed, chat]", "export.modes.1: unknown value 'chat'"),
        ("grit_smollm2", "streams.generation.objective.beta=0.5", "beta: does not apply to the objective next_token"),
        (
            "grit_smollm2",
            "streams.embedding.attention=bidirectional_prompt",
            "or it has no prompt of its own. Possible: causal, bidirectional, bidirectional_keep_first.",
        ),
        ("grit_smollm2", "streams.embedding.chunking=concatenate", "chunking: does not apply to the format pairs"),
        (
            "llm2vec_simcse",
            "streams.simcse.num_hard_negatives=1",
            "and is set to 1; it belongs to pairs",
        ),
        ("grit_smollm2", "streams.embedding.batch_size=1", "contrastive training needs at least 2 groups"),
        ("grit_smollm2", "streams.embedding.objective.temperature=0", "temperature: got 0.0, expected more than 0"),
        (
            "grit_smollm2",
            "streams.embedding.objective.matryoshka_dims=[64,128]",
            "numbers, largest first",
        ),
        ("grit_smollm2", "streams.embedding.objective.gradient_scale=inverse_world_size", "needs the world size"),
        ("grit_smollm2", "streams.embedding.source_temperature=2", "expected 0 to 1"),
        ("grit_smollm2", "streams.embedding.sources=[{}]", "got none of path, hub, builtin; expected exactly one"),
        ("grit_smollm2", "streams.embedding.sources=[{path: a, hub: b}]", "got path and hub of path, hub, builtin"),
        ("grit_smollm2", "streams.embedding.sources=[{builtin: pydoc}]", "Did you mean 'pydocs'?"),
        ("grit_smollm2", "streams.embedding.sources=[{path: a, streaming: true}]", "only as running text, got format pairs"),
        ("grit_smollm2", "streams.embedding.sources=[{hub: a, streaming: true}]", "set limit"),
        ("grit_smollm2", "model.autocast=true", "but model.dtype is auto"),
        ("grit_smollm2", "model.name=''", "model.name: is empty"),
        ("grit_smollm2", "model.attention_dropout=1.0", "expected a share from 0 to below 1"),
        ("llm2vec_simcse", "model.attention_kernel=flex", "the flex kernel has no dropout"),
        ("generative_only", "model.projection_dim=64", "no stream trains any"),
        ("generative_only", "validation.retrieval={queries: {builtin: pydocs}}", "no stream trains embeddings"),
        (
            "grit_smollm2",
            "validation.sources={embeding: [{builtin: pydocs}]}",
            "Did you mean 'embedding'?",
        ),
        ("llm2vec_mntp", "lora.target_modules=[]", "lora.target_modules: is empty"),
        ("llm2vec_mntp", "lora.target_modules=all", "unknown value 'all'"),
        ("grit_smollm2", "optim.schedule=cosin", "Did you mean 'cosine'?"),
        ("grit_smollm2", "optim.learning_rate=0", "expected more than 0"),
        ("grit_smollm2", "resume=auto", "which is not set; add run_dir"),
        ("grit_smollm2", "resume=no/such/folder", "there is no such folder"),
        ("grit_smollm2", "push_to_hub=name", "expected ORGANIZATION/NAME"),
        ("grit_smollm2", "export={enabled: false, push_to_hub: a/b}", "there is nothing to upload"),
    ],
)
def test_contradictions_are_found(resolved: Callable[[str], Path], recipe: str, argument: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose_run([f"recipe={resolved(recipe)}", argument])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["recipe=grit_smollm2", "lora=qlora"], "lora.quantize_4bit: needs weights from the Hub"),
        (["recipe=llm2vec_mntp", "optim=constant"], "'constant' does not decay"),
        (
            ["recipe=grit_smollm2", "run_dir=a", "checkpoint.copy_to=a/checkpoints"],
            "checkpoint.copy_to: a/checkpoints is where",
        ),
    ],
)
def test_contradictions_between_groups_are_found(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose_run(arguments)
    assert message in str(caught.value)


def test_identical_views_are_a_contradiction() -> None:
    arguments = ["recipe=llm2vec_simcse", "lora=none"]
    assert compose_run(arguments)
    with pytest.raises(ConfigError, match="views differ by dropout alone"):
        compose_run([*arguments, "model.attention_dropout=0"])
    assert "set model.attention_dropout" in " ".join(compose_run([*arguments, "model.attention_dropout=null"]).notices)


def test_notices_are_not_problems() -> None:
    config = compose_run(["recipe=llm2vec_supervised", "max_steps=10", "packing.token_budget=100"])
    assert len(find_notices(config)) == 2
    assert not find_problems(config)


def test_a_dotted_objective_is_imported_and_its_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"objective\.name: cannot import the objective 'my_package\.Loss'"):
        compose_run(["recipe=grit_smollm2", "streams.generation.objective.name=my_package.Loss"])
    path = "unified_lm.objectives.token.NextToken"
    config = compose_run(["recipe=grit_smollm2", f"streams.generation.objective={{name: {path}, cross_entropy: chunked}}"])
    assert (type(config.streams["generation"].objective), config.streams["generation"].objective.name) == (
        NextTokenConfig,
        path,
    )
    with pytest.raises(ConfigError, match=r"unknown key 'streams\.generation\.objective\.cross_entropi'.*Did you mean"):
        compose_run(["recipe=grit_smollm2", f"streams.generation.objective={{name: {path}, cross_entropi: chunked}}"])


@pytest.mark.parametrize("base", [StreamConfig, ObjectiveConfig])
def test_settings_of_other_kinds_at_their_defaults_are_read(
    resolved: Callable[[str], Path], base: type, tmp_path: Path
) -> None:
    """Configurations saved when all kinds shared one list of settings hold every key."""
    values = yaml.safe_load(resolved("grit_smollm2").read_text())
    table = FORMATS if base is StreamConfig else OBJECTIVES
    for stream in values["streams"].values():
        node = stream if base is StreamConfig else stream["objective"]
        for kind in table.values():
            for field in dataclasses.fields(kind):
                if field.default is not dataclasses.MISSING:
                    node.setdefault(field.name, to_plain(field.default))
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(values))
    assert from_yaml(tmp_path / "old.yaml") == from_yaml(resolved("grit_smollm2"))


def test_conversion_names_every_key_and_survives_what_has_a_default() -> None:
    values: dict[str, Any] = {"dtype": 3, "projection_dim": "x", "autocast": 1, "nmae": "a", "pooling": "cls"}
    model, problems = convert(ModelConfig, values)
    assert model == ModelConfig(pooling="cls")
    assert problems == [
        "unknown key 'nmae'. Did you mean 'name'?",
        "dtype: got 3 (int), expected text.",
        "autocast: got 1 (int), expected true or false.",
        "projection_dim: got 'x' (str), expected a whole number.",
    ]
    run, problems = convert(RunConfig, {"recipe": "x", "model": {}, "streams": {"a": {"format": "text"}}})
    assert run is None
    assert problems == ["missing key 'streams.a.objective' (keys and values), which has no default."]


def test_schema_keys_reach_every_leaf() -> None:
    keys = schema_keys()
    for key in ("lora.r", "streams.*.objective.temperature", "streams.*.sources.*.path", "validation.sources.*.*.hub"):
        assert key in keys
    assert len(set(keys)) == len(keys)


def test_every_field_is_documented_frozen_and_keyword_only() -> None:
    from unified_lm.config import schema

    own = [cls for cls in vars(schema).values() if isinstance(cls, type) and issubclass(cls, object)]
    classes = {base for cls in (*own, *FORMATS.values(), *OBJECTIVES.values(), MaskingConfig) for base in cls.__mro__}
    for cls in classes:
        if not dataclasses.is_dataclass(cls) or not cls.__name__.endswith(("Config", "Stream")):
            continue
        assert cls.__dataclass_params__.frozen  # type: ignore[attr-defined]
        assert all(field.kw_only for field in dataclasses.fields(cls))
        body = ast.parse(inspect.getsource(cls)).body[0].body  # type: ignore[attr-defined]
        for node, after in zip(body, [*body[1:], None], strict=True):
            if (
                isinstance(node, ast.AnnAssign)
                and isinstance(node.target, ast.Name)
                and "ClassVar" not in ast.unparse(node.annotation)
            ):
                sentence = getattr(getattr(after, "value", None), "value", None)
                assert isinstance(sentence, str), f"{cls.__name__}.{ast.unparse(node.target)}: one sentence under each field"


def test_plain_values_have_no_tuples() -> None:
    plain = to_plain(compose_run(["recipe=llm2vec_mntp"]))
    assert isinstance(plain["lora"]["target_modules"], list)
    assert isinstance(plain["streams"]["mntp"]["sources"][0], dict)


def test_the_longest_wait_fits_what_waits() -> None:
    config = compose_run(["recipe=grit_smollm2", f"parallel.timeout_minutes={LONGEST_WAIT}"])
    store = HashStore()
    store.set_timeout(group_timeout(config.parallel.timeout_minutes))
    assert store.timeout == timedelta(minutes=1.25 * LONGEST_WAIT + 1)
