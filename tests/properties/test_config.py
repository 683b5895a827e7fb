"""Whatever stands in a recipe or in arguments: a configuration that is written and read back equal, or a clear error."""

from __future__ import annotations

import io
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import strategies as st
from rich.console import Console

from tests.properties.cases import MANY, NUMBERS, SCALARS, TEXTS, VALUES, Case, mutated, require_text, run_cases
from unified_lm.composition.compose import compose
from unified_lm.composition.convert import from_yaml, schema_keys, to_plain, to_yaml
from unified_lm.composition.locate import read_yaml, recipes_dir
from unified_lm.config.schema import SweepConfig
from unified_lm.core.errors import ConfigError, UserError
from unified_lm.engine.accounting.dry_run import print_dry_run, print_sweep
from unified_lm.models.tiny import TINY_FAMILIES

RECIPES = ("grit_smollm2", "llm2vec_mntp", "kto_smollm2", "llm2vec_supervised")


@cache
def _resolved(recipe: str) -> dict[str, Any]:
    found = to_plain(compose([f"recipe={recipe}", "model=tiny_random"]))
    assert isinstance(found, dict)
    return found


def _keys() -> list[str]:
    """Every key and section of the schema, with names in place of `*`."""
    named = [
        key.replace("streams.*", "streams.embedding").replace("sources.*.*", "sources.embedding.0") for key in schema_keys()
    ]
    named = [key.replace(".*", ".0") for key in named]
    sections = {key.rpartition(".")[0] for key in named} - {""}
    others = {"data.pairs", "data.held_out", "data", "streams.other", "streams.other.format", "model.architecture.hidden_size"}
    return sorted({*named, *sections, *others})


def _hydra(value: Any) -> str:
    """A value in Hydra's grammar; texts as they are, since quoting mistakes are mistakes too."""
    if isinstance(value, list):
        return f"[{','.join(map(_hydra, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{_hydra(item)}' for key, item in value.items())}}}"
    return "null" if value is None else str(value)


ARGUMENTS = st.one_of(
    st.tuples(st.sampled_from(_keys()), VALUES).map(lambda item: f"{item[0]}={_hydra(item[1])}"),
    st.sampled_from(_keys()).map(lambda key: f"~{key}"),
    st.tuples(st.sampled_from(["", "+", "++", "~", "a.", "streams."]), TEXTS).map(lambda item: "".join(item)),
    st.tuples(st.sampled_from(["model", "data", "lora", "optim", "push_to_hub", "recipe", "hydra.x"]), VALUES).map(
        lambda item: f"{item[0]}={_hydra(item[1])}"
    ),
    st.sampled_from(
        ["model=tiny_random", "model=mistral7b", "lora=llm2vec", "parallel=zero3", "optim=cosine", "model.family=mixtral"]
    ),
)

_ITSELF = "{this file}"
"""Stands for the path of the file that is written, which is known only then."""
_CHAIN = {"chain": [_ITSELF, "grit_smollm2"], "description": "a chain"}
_ABLATION = {
    "ablation": {
        "base": {"grit_smollm2": ["max_steps=2"], _ITSELF: []},
        "overrides": ["model=tiny_random"],
        "arms": {"a": [], "b": ["model.pooling=cls"]},
        "grid": {"x": {"one": [], "two": ["seed=1"]}},
        "exclude": ["one-one"],
        "default": ["a"],
        "seeds": [1, 2],
    }
}
FILES = st.one_of(
    *(st.deferred(lambda name=name: mutated(_resolved(name))) for name in RECIPES[:2]),
    *(st.deferred(lambda name=name: mutated(read_yaml(recipes_dir() / f"{name}.yaml"))) for name in RECIPES),
    mutated(_CHAIN),
    mutated(_ABLATION),
    mutated({"defaults": ["grit_smollm2", "self", "_self_"], "max_steps": 2}),
    VALUES,
)
CASES = st.one_of(
    st.fixed_dictionaries({"recipe": st.sampled_from(RECIPES), "arguments": st.lists(ARGUMENTS, min_size=1, max_size=3)}),
    st.fixed_dictionaries({"file": FILES, "arguments": st.lists(ARGUMENTS, max_size=1)}),
)


def check(case: Case) -> None:
    with tempfile.TemporaryDirectory() as folder:
        recipe = case.get("recipe")
        if recipe is None:
            path = Path(folder, "self.yaml")
            text = yaml.safe_dump(case["file"], allow_unicode=True).replace(_ITSELF, str(path))
            path.write_bytes(text.encode("utf-8", "surrogatepass"))
            recipe = str(path)
        try:
            config = compose([f"recipe={recipe}", *case["arguments"]])
        except UserError as error:
            require_text(error)
            return
        if not isinstance(config, SweepConfig):
            path = Path(folder, "config.yaml")
            path.write_text(to_yaml(config), encoding="utf-8")
            assert repr(to_plain(from_yaml(path))) == repr(to_plain(config)), "nan equals nan"


SIZES = st.one_of(NUMBERS, SCALARS, st.sampled_from([8, 16, 64, 3, 2**20]))
ARCHITECTURES = st.fixed_dictionaries(
    {"family": st.sampled_from([*TINY_FAMILIES, "t5", "bert", "no_such_family", ""])},
    optional={
        "architecture": st.dictionaries(
            st.sampled_from(
                [
                    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size"),
                    *(
                        "vocab_size",
                        "head_dim",
                        "rope_theta",
                        "num_experts_per_tok",
                        "n_embd",
                        "n_layer",
                        "tie_word_embeddings",
                    ),
                    *(
                        "max_position_embeddings",
                        "hidden_act",
                        "pad_token_id",
                        "rope_scaling",
                        "layer_types",
                        "dtype",
                        "name_or_path",
                    ),
                ]
            ),
            SIZES,
            max_size=4,
        ),
        "lora": st.sampled_from(["llm2vec", "all_linear", "none"]),
        "arguments": st.lists(
            st.tuples(
                st.sampled_from(
                    [
                        *("max_steps", "packing.token_budget", "model.projection_dim", "streams.embedding.batch_size"),
                        *("streams.generation.max_tokens", "lora.r", "model.gradient_checkpointing", "model.dtype"),
                    ]
                ),
                SIZES,
            ).map(lambda item: f"{item[0]}={_hydra(item[1])}"),
            max_size=2,
        ),
    },
)


def check_dry_run(case: Case) -> None:
    arguments = [
        f"model.family={case['family']}",
        "model.source=hub",
        "model.name=/no/such/folder",
        f"lora={case.get('lora', 'none')}",
    ]
    tiny = dict(TINY_FAMILIES.get(case["family"], {})) | case.get("architecture", {})
    try:
        config = compose(["recipe=grit_smollm2", *arguments, f"model.architecture={_hydra(tiny)}", *case.get("arguments", [])])
        console = Console(file=io.StringIO(), width=200)
        if isinstance(config, SweepConfig):
            print_sweep(config, console)
        else:
            print_dry_run(config, console, 2)
    except UserError as error:
        require_text(error)


def test_a_configuration_is_read_or_refused() -> None:
    run_cases(CASES, check, 12)


def test_a_dry_run_prints_or_refuses() -> None:
    run_cases(ARCHITECTURES, check_dry_run, 4)


@pytest.mark.slow
def test_many_configurations_are_read_or_refused() -> None:
    run_cases(CASES, check, MANY)


@pytest.mark.slow
def test_many_dry_runs_print_or_refuse() -> None:
    run_cases(ARCHITECTURES, check_dry_run, MANY)


@pytest.mark.parametrize("content", ["true", "5", "1.5", "null", "[1]", "''", ".nan"])
def test_a_recipe_that_is_no_mapping_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"own\.yaml"):
        compose([f"recipe={path}"])
