"""Every recipe runs from its first line to its export on a tiny random model of its family, full and with LoRA."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from unified_lm.cli.script import train
from unified_lm.composition.locate import list_recipes
from unified_lm.core.errors import UserError
from unified_lm.export.manifest import Manifest

QUIET = ["logging.progress=false", "validation.num_batches=1"]


def lines(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


WITH_LORA = {"grit_mixtral8x7b", "kto_smollm2"}
"""Experts, and a reference model that is the adapters' base; the chain below has adapters, too. The others are slow tests."""
RUNS = [
    pytest.param(recipe, lora, marks=[] if lora == "none" or recipe in WITH_LORA else pytest.mark.slow)
    for recipe in sorted(list_recipes())
    if recipe != "llm2vec" and not recipe.startswith("ablation_")
    for lora in ("none", "all_linear")
]


@pytest.mark.parametrize(("recipe", "lora"), RUNS)
def test_three_steps_and_an_export(recipe, lora, tmp_path):
    run_dir = train([f"recipe={recipe}", "model=tiny_random", f"lora={lora}", "max_steps=3", f"run_dir={tmp_path}/run", *QUIET])
    steps = [line for line in lines(run_dir) if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3]
    assert all(line["gradient_norm"] > 0 for line in steps)
    manifest = Manifest.load(run_dir / "export")
    assert manifest.recipe == recipe
    assert [stage.steps for stage in manifest.stages] == [3]
    assert (manifest.stages[0].adapter is not None) == (lora == "all_linear")
    assert (run_dir / "config.yaml").is_file()


def test_mixtral_trains_with_router_balance(tmp_path):
    run_dir = train(
        [
            "recipe=grit_mixtral8x7b",
            "model=tiny_random",
            "max_steps=3",
            "export.enabled=false",
            f"run_dir={tmp_path}/run",
            *QUIET,
        ]
    )
    steps = [line for line in lines(run_dir) if "loss" in line]
    assert len(steps) == 3
    for line in steps:
        assert 1.5 < line["generation/router_balance"] < 4, "of the 4 experts of the tiny model 2 are chosen"
        terms = line["loss/embedding"] + 0.003 * line["loss/generation"] + 0.02 * line["generation/router_balance"]
        assert line["loss"] == pytest.approx(terms, rel=1e-6)
    assert not any("router" in name for line in lines(run_dir) if "loss" not in line for name in line)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["model=tiny_random", "streams.generation.objective.router_aux_loss_coef=0.1"], "'llama' has no router balance loss"),
        (
            [
                "model=tiny_random",
                "model.family=mixtral",
                "streams.embedding.objective.name=unified_lm.objectives.contrastive.Contrastive",
                "streams.embedding.objective.router_aux_loss_coef=0.1",
                "~validation.retrieval",
            ],
            "streams.embedding.objective.router_aux_loss_coef: does not apply to the objective contrastive",
        ),
    ],
)
def test_router_balance_where_it_cannot_be_is_refused(arguments, text, tmp_path):
    with pytest.raises(UserError, match=text):
        train(["recipe=grit_smollm2", *arguments, f"run_dir={tmp_path}/run", *QUIET])


@pytest.mark.slow  # ablation_attention runs in tests/assembly/ablation/test_sweep.py
@pytest.mark.parametrize("recipe", sorted(name for name in list_recipes() if name.startswith("ablation_")))
def test_an_ablation_runs_every_default_arm(recipe, tmp_path):
    run_dir = train([f"recipe={recipe}", "model=tiny_random", "max_steps=3", f"run_dir={tmp_path}/runs", *QUIET])
    folders = [path.parent for path in run_dir.glob("*/finished.json")]
    assert len(folders) >= 2
    for folder in folders:
        assert [line["step"] for line in lines(folder) if "loss" in line] == [1, 2, 3]


def test_a_chain_keeps_the_history_of_its_adapters(tmp_path):
    run_dir = train(["recipe=llm2vec", "model=tiny_random", "max_steps=2", f"run_dir={tmp_path}/chain", *QUIET])
    manifest = Manifest.load(run_dir / "export")
    assert [stage.recipe for stage in manifest.stages] == ["llm2vec_mntp", "llm2vec_simcse"]
    assert all(stage.adapter is not None for stage in manifest.stages)
    assert manifest.modes == ("embed",)


def test_the_second_stage_starts_from_a_finished_run(tmp_path):
    first = train(["recipe=llm2vec_mntp", "model=tiny_random", "max_steps=2", f"run_dir={tmp_path}/1", *QUIET])
    second = train(
        [
            "recipe=llm2vec_simcse",
            "model=tiny_random",
            f"model.init_from={first}",
            "max_steps=2",
            f"run_dir={tmp_path}/2",
            *QUIET,
        ]
    )
    assert [stage.recipe for stage in Manifest.load(second / "export").stages] == ["llm2vec_mntp", "llm2vec_simcse"]


def test_the_saved_configuration_starts_the_run_again(tmp_path):
    arguments = ["recipe=generative_only", "model=tiny_random", "max_steps=2", "export.enabled=false", *QUIET]
    first = train([*arguments, f"run_dir={tmp_path}/first"])
    again = train([f"recipe={first}/config.yaml", f"run_dir={tmp_path}/again"])
    losses = [[line["loss"] for line in lines(run) if "loss" in line] for run in (first, again)]
    assert losses[0] == losses[1]


def test_a_lora_target_without_match_stops_before_the_first_step(tmp_path):
    with pytest.raises(UserError, match="q_projj"):
        train(
            [
                "recipe=generative_only",
                "model=tiny_random",
                "lora=all_linear",
                "lora.target_modules=[q_projj]",
                f"run_dir={tmp_path}/run",
            ]
        )
    assert not list((tmp_path / "run").glob("checkpoints/*"))
