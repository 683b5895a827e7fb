"""Ablations: arms of a base recipe, chosen, crossed and composed."""

from __future__ import annotations

from pathlib import Path

import pytest

from unified_lm.composition.ablation_plan import read_plan
from unified_lm.composition.compose import compose, compose_run
from unified_lm.composition.locate import list_recipes
from unified_lm.config.schema import SweepConfig
from unified_lm.core.errors import ConfigError

ABLATIONS = sorted(name for name in list_recipes() if name.startswith("ablation_"))


def sweep(*argv: str) -> SweepConfig:
    config = compose(argv)
    assert isinstance(config, SweepConfig)
    return config


@pytest.mark.parametrize("recipe", ABLATIONS)
def test_every_arm_composes_and_none_equals_another(recipe: str) -> None:
    config = sweep(f"recipe={recipe}", "arms=all", "model=tiny_random")
    runs = [repr(arm.run).replace(arm.run.run_dir, "") for arm in config.arms]
    assert len(set(runs)) == len(runs) or recipe in ("ablation_batch", "ablation_base")
    assert len({arm.run.run_dir for arm in config.arms}) == len(runs)
    assert len({arm.run.max_steps for arm in config.arms}) == 1, "the same budget in every arm"
    assert all(arm.run.resume == "auto" and not arm.run.export.enabled for arm in config.arms)


@pytest.mark.parametrize("recipe", sorted(set(ABLATIONS) - {"ablation_base", "ablation_monet"}))
def test_the_published_size_composes_too(recipe: str) -> None:
    config = sweep(f"recipe={recipe}", "base=grit_mistral7b")
    assert {arm.run.max_steps for arm in config.arms} == {1253}


def test_the_grid_crosses_its_axes_and_leaves_out() -> None:
    problems: list[str] = []
    grid = {"a": {"x": ["k=1"], "y": []}, "b": {"p": ["l=1"], "q": ["l=2", "m=3"]}}
    plan = read_plan("t", {"ablation": {"base": {"r": []}, "grid": grid, "exclude": ["y-p"]}}, problems)
    assert problems == []
    assert dict(plan.arms) == {"x-p": ("k=1", "l=1"), "x-q": ("k=1", "l=2", "m=3"), "y-q": ("l=2", "m=3")}


def test_all_mistakes_of_a_file_are_told() -> None:
    problems: list[str] = []
    raw = {
        "ablation": {"base": {"r": []}, "arms": {"A b": [], "c": "k=1"}, "grid": ["x"], "defautl": [], "seeds": ["x"]},
        "more": 1,
    }
    read_plan("t", raw, problems)
    text = "\n".join(problems)
    assert all(word in text for word in ("'more'", "default", "'A b'", "arms.c", "ablation.grid", "seeds"))


def test_seeds_arms_and_overrides(tmp_path: Path) -> None:
    config = sweep(
        *("recipe=ablation_loss", "arms=[sample,token]", "seeds=[1,2]", f"run_dir={tmp_path}", "optim.learning_rate=1e-4"),
        "token.max_steps=7",
    )
    assert [(arm.name, arm.run.seed) for arm in config.arms] == [("sample", 1), ("sample", 2), ("token", 1), ("token", 2)]
    assert {arm.run.optim.learning_rate for arm in config.arms} == {1e-4}
    assert [arm.run.max_steps for arm in config.arms] == [20, 20, 7, 7]
    assert config.arms[3].run.run_dir == f"{tmp_path}/token-seed2"


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        ("arms=[tokne]", "Did you mean 'token'"),
        ("seeds=[a]", "whole numbers"),
        ("resume=none", "always continues"),
        ("push_to_hub=a/b export.enabled=true", "not uploaded"),
        ("arms=[token] optim.learning_rat=1", "arm token: unknown key"),
    ],
)
def test_mistakes_on_the_command_line(argument: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told.replace("'", ".")):
        sweep("recipe=ablation_loss", *argument.split())


def test_what_is_wrong_with_several_arms_is_told_once() -> None:
    with pytest.raises(ConfigError) as caught:
        sweep(
            "recipe=ablation_loss", "arms=[token,sample,mixed]", "optim.learning_rat=1", "token.max_stps=1", "sample.max_stps=1"
        )
    assert {problem.partition(".")[0] for problem in caught.value.problems} == {
        "every arm: unknown key 'optim",
        "arms token, sample: unknown key 'max_stps'",
    }
    assert len(caught.value.problems) == 2


def test_an_arm_may_not_be_named_like_a_part_of_the_configuration(tmp_path: Path) -> None:
    """`optim.learning_rate=1` would be taken from the command line for the arm `optim` alone."""
    problems: list[str] = []
    parts = (
        "model",
        "data",
        "lora",
        "streams",
        "optim",
        "parallel",
        "packing",
        "logging",
        "checkpoint",
        "validation",
        "export",
    )
    read_plan("t", {"ablation": {"base": {"r": []}, "arms": {name: [] for name in (*parts, "none", "fast")}}}, problems)
    assert [problem.partition(" is named like a part")[0] for problem in problems] == [f"t: arm '{name}'" for name in parts]
    file = tmp_path / "mine.yaml"
    file.write_text("ablation: {base: {grit_smollm2_short: []}, arms: {optim: [], other: []}}\n")
    with pytest.raises(ConfigError, match="arm 'optim' is named like a part of the configuration"):
        sweep(f"recipe={file}", "optim.learning_rate=1")


def test_a_caller_of_one_run_is_told() -> None:
    with pytest.raises(ConfigError, match="ablation of several runs"):
        compose_run(["recipe=ablation_loss"])
