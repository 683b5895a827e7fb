"""MONET's uniformity and ambiguity over a step: neither packs nor ranks change losses, gradients or statistics."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from tests.engine.backends.test_zero import Results, assert_same_steps
from tests.engine.exactness import MANY_PACKS, ONE_PACK, Case, State, run
from tests.engine.small_run import equal, metrics, small_run, tensors
from tests.engine.test_step import distance
from tests.engine.tiny import NEXT_TOKEN, WEIGHTS, embedding_terms, make_samples
from tests.processes import NEEDS_DEEPSPEED, any_slow, run_on_ranks
from unified_lm.batch import Batch, make_batch
from unified_lm.cli.script import train
from unified_lm.composition.compose import compose
from unified_lm.core.errors import ConfigError, ModelError
from unified_lm.engine.routing_spread import RoutingSpread, SpreadReadout, product_key_routers
from unified_lm.engine.step import GradCacheStep, StepLosses
from unified_lm.engine.training_module import TrainingModule
from unified_lm.models.backbone import Backbone
from unified_lm.models.tiny import tiny_model
from unified_lm.objectives import build_objective
from unified_lm.objectives.routing_spread import ambiguity, uniformity

EVEN, CLEAR = 3.0, 5.0


def make_trainable(**changes: object) -> TrainingModule:
    backbone = Backbone(tiny_model("monet", dtype=torch.float64, **changes), "sdpa")
    readout = SpreadReadout(["generation"], product_key_routers(backbone))
    tokens = {"generation": build_objective(NEXT_TOKEN)}
    return TrainingModule(backbone, "mean", tokens, readouts=[readout]).train()


def one_step(trainable: TrainingModule, batch: Batch, num_retained: int = 1) -> tuple[StepLosses, dict[str, torch.Tensor]]:
    trainable.zero_grad()
    spread = RoutingSpread({"generation": (EVEN, CLEAR)}, product_key_routers(trainable.backbone))
    step = GradCacheStep(trainable, lambda loss: loss.backward(), WEIGHTS, [*embedding_terms(), spread], num_retained)
    losses = step(batch)
    return losses, {name: p.grad.clone() for name, p in trainable.named_parameters() if p.grad is not None}


def test_it_is_the_formula_over_the_streams_tokens() -> None:
    samples, counts = make_samples()
    trainable = make_trainable()
    (pack,) = make_batch(samples, ONE_PACK, counts).packs
    routers = product_key_routers(trainable.backbone)
    assert len(routers) == 1, "two layers share it"
    _, scores = trainable.backbone.router_logits(pack)
    positions = pack.positions_of("generation")
    assert 0 < len(positions) < len(pack)
    gates = routers[0].gates(scores[0][positions])
    expected = uniformity(gates.mean(0)), ambiguity(gates).mean()
    weight = routers[0].w1.weight
    (expected_gradient,) = torch.autograd.grad(EVEN * expected[0] + CLEAR * expected[1], weight)
    losses, gradients = one_step(trainable, make_batch(samples, ONE_PACK, counts))
    assert losses.metrics["generation/router_uniformity"] == pytest.approx(float(expected[0].detach()), rel=1e-6)
    assert losses.metrics["generation/router_ambiguity"] == pytest.approx(float(expected[1].detach()), rel=1e-6)
    assert losses.metrics["generation/router_active_keys"] == pytest.approx(float((gates > 0).sum(-1).double().mean()))
    without = make_trainable()
    step = GradCacheStep(without, lambda loss: loss.backward(), WEIGHTS, embedding_terms(), 1)
    plain = step(make_batch(samples, ONE_PACK, counts))
    assert losses.total == pytest.approx(plain.total + EVEN * float(expected[0].detach()) + CLEAR * float(expected[1].detach()))
    added = (
        gradients["backbone.causal_lm.model.layers.0.router.w1.weight"]
        - without.get_parameter("backbone.causal_lm.model.layers.0.router.w1.weight").grad
    )
    torch.testing.assert_close(added, expected_gradient, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("changes", [{}, {"moe_decompose": "horizontal"}, {"moe_groups": 1}], ids=str)
def test_the_split_into_packs_changes_nothing(changes: dict) -> None:
    samples, counts = make_samples()
    whole = one_step(make_trainable(**changes), make_batch(samples, ONE_PACK, counts))
    for budget in (30, 60, 120):
        for retained in (0, 3):
            trainable = make_trainable(**changes)
            losses, gradients = one_step(trainable, make_batch(samples, budget, counts), retained)
            assert losses.total == pytest.approx(whole[0].total, rel=1e-9)
            assert distance(gradients, whole[1]) < 1e-6


def test_statistics_move_once_a_step_and_are_those_of_all_tokens() -> None:
    samples, counts = make_samples()
    found = []
    for budget in (ONE_PACK, 40):
        trainable = make_trainable()
        router = product_key_routers(trainable.backbone)[0]
        batch = make_batch(samples, budget, counts)
        assert not router.is_observed
        one_step(trainable, batch)
        first = [statistic.clone() for statistic in router.statistics]
        assert int(router.norm1.num_batches_tracked) == 1
        one_step(trainable, batch)
        found.append((first, [statistic.clone() for statistic in router.statistics]))
    for one, other in zip(*found, strict=True):
        for statistic, again in zip(one, other, strict=True):
            torch.testing.assert_close(statistic, again, rtol=1e-6, atol=1e-8)
    assert float(found[0][0][1].mean()) != pytest.approx(1.0, abs=1e-2), "the first step takes its own"


def test_statistics_of_frozen_routers_stay() -> None:
    samples, counts = make_samples()
    trainable = make_trainable()
    router = product_key_routers(trainable.backbone)[0].requires_grad_(False)
    one_step(trainable, make_batch(samples, 60, counts))
    assert not router.is_observed


BACKENDS = ("ddp", "zero2", "zero3")
CASES = [Case(backend, "grit", MANY_PACKS, "monet", steps=3, spread=20.0) for backend in BACKENDS]
CASES += [Case("zero3", "grit", MANY_PACKS, "monet", steps=3, spread=20.0, checkpointing=True)]
CASES += [Case("zero3", kind, MANY_PACKS, "monet", steps=2) for kind in ("mntp", "simcse")]
CASES += [Case("zero3", "grit", MANY_PACKS, "monet", steps=2, vectors="moee_sum")]
SLOW = [case for case in CASES if case.kind != "grit" or case.checkpointing]


def two_processes(all_cases: bool) -> Results:
    return {case: run(case) for case in CASES if all_cases or case not in SLOW}


@pytest.fixture(scope="module")
def together(request, tmp_path_factory) -> Results:
    pytest.importorskip("deepspeed")
    return run_on_ranks(partial(two_processes, any_slow(request)), 2, tmp_path_factory.mktemp("two"))[0]


@NEEDS_DEEPSPEED
@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[pytest.mark.slow] if case in SLOW else []) for case in CASES],
    ids=lambda case: f"{case.backend}-{case.kind}-{case.vectors}-{case.checkpointing}",
)
def test_two_processes_take_the_steps_of_one(together: Results, case: Case) -> None:
    alone: State = run(Case("single", case.kind, ONE_PACK, "monet", steps=case.steps, spread=case.spread, vectors=case.vectors))
    assert_same_steps(together[case], alone)
    for name in (name for name in alone if name.startswith("buffer/")):
        torch.testing.assert_close(together[case][name], alone[name], rtol=1e-4, atol=1e-5)


def test_a_stopped_run_goes_on_with_its_statistics(tmp_path: Path) -> None:
    more = ["model.family=monet", "streams.generation.objective.router_uniformity_coef=0.1", "checkpoint.every=2"]
    whole = train(small_run(tmp_path, tmp_path / "whole", "max_steps=4", *more))
    train(small_run(tmp_path, tmp_path / "stopped", "max_steps=2", *more))
    stopped = train(small_run(tmp_path, tmp_path / "stopped", "max_steps=4", "resume=auto", *more))
    one, other = (tensors(run_dir / "checkpoints" / "step-00000004") for run_dir in (whole, stopped))
    names = [name for name in one if name.startswith("buffer/")]
    assert len(names) == 6
    assert one["buffer/backbone.causal_lm.model.layers.0.router.norm1.num_batches_tracked"] == 4
    assert equal(one, other)
    assert metrics(whole) == metrics(stopped)


def test_models_and_settings_that_it_is_not_for_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"family 'mixtral' has no routers of product keys.*router_aux_loss_coef"):
        product_key_routers(Backbone(tiny_model("mixtral"), "sdpa"))
    with pytest.raises(ConfigError, match=r"router_ambiguity_coef: got -1\.0, expected a number of at least 0"):
        train(small_run(tmp_path, tmp_path / "run", "streams.generation.objective.router_ambiguity_coef=-1"))
    spread = "streams.generation.objective.router_uniformity_coef=0"
    with pytest.raises(ConfigError, match=r"optim\.frozen names one side of MONET's routers"):
        train(small_run(tmp_path, tmp_path / "run", "model.family=monet", "optim.frozen=[w1]", spread))
    with pytest.raises(ConfigError, match=r"lora adapts MONET's routers"):
        train(small_run(tmp_path, tmp_path / "run", "model.family=monet", "lora=all_linear", spread))
    with pytest.raises(ConfigError, match=r"MONET's routers learn the statistics"):
        compose(
            ["recipe=monet_tiny", *(f"streams.text.objective.router_{name}_coef=null" for name in ("uniformity", "ambiguity"))]
        )
    padded = small_run(tmp_path, tmp_path / "run", "model.attention_kernel=padded")
    with pytest.raises(ConfigError, match=r"router_uniformity_coef: the attention kernel mixes padding tokens.*or null"):
        train([*padded, "streams.generation.objective.router_uniformity_coef=0"])
