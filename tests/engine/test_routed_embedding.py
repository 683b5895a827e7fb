"""Vectors made with routing in training: exact whatever the packs, on two ranks, and as inference makes them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.engine.backends.test_zero import Results, assert_same_steps
from tests.engine.exactness import MANY_PACKS, ONE_PACK, Case, distance, run
from tests.engine.tiny import CONTRASTIVE, NEXT_TOKEN, WEIGHTS, make_samples
from tests.models.test_families import MIXTURES
from tests.processes import any_slow, run_on_ranks
from unified_lm.batch import make_batch
from unified_lm.core.errors import ModelError
from unified_lm.engine.coupled import CoupledTerm
from unified_lm.engine.routed_embedding import RoutedEmbeddingTerm, RoutingVectors, vectors_of
from unified_lm.engine.step import GradCacheStep
from unified_lm.engine.training_module import TrainingModule
from unified_lm.models.backbone import Backbone
from unified_lm.models.embedding import embed_samples
from unified_lm.models.moee import METHODS
from unified_lm.models.routing import Routers, router_parameters, router_sizes
from unified_lm.models.tiny import tiny_model
from unified_lm.objectives import ContrastiveConfig, build_objective

ROUTED = [method for method in METHODS if method != "hs"]
ALPHA = 0.5
BALANCED = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "gpt_oss")


def make_trainable(family: str = "mixtral") -> TrainingModule:
    model = tiny_model(family, dtype=torch.float64)
    model.set_experts_implementation("eager")  # torch's grouped matrix product has no float64
    backbone = Backbone(model, "sdpa")
    tokens = {"generation": build_objective(NEXT_TOKEN)}
    return TrainingModule(backbone, "mean", tokens, readouts=[RoutingVectors(Routers(backbone))]).train()


def gradients(trainable: TrainingModule, method: str, budget: int) -> tuple[float, dict[str, torch.Tensor]]:
    samples, counts = make_samples()
    objectives = {"embedding": build_objective(CONTRASTIVE)}
    terms: list[CoupledTerm] = [RoutedEmbeddingTerm(objectives, WEIGHTS, method=method, alpha=ALPHA)]
    trainable.zero_grad()
    step = GradCacheStep(trainable, lambda loss: loss.backward(), WEIGHTS, terms)
    total = step(make_batch(samples, budget, counts)).total
    return total, {name: p.grad.clone() for name, p in trainable.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("method", ROUTED)
def test_the_split_into_packs_changes_nothing(method: str) -> None:
    trainable = make_trainable()
    one, whole = gradients(trainable, method, ONE_PACK)
    many, split = gradients(trainable, method, MANY_PACKS)
    assert many == pytest.approx(one, rel=1e-10)
    for name, expected in whole.items():
        torch.testing.assert_close(split[name], expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("method", ROUTED)
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_the_loss_is_that_of_the_vectors_of_inference(family: str, method: str) -> None:
    """What `embed_samples` makes of the same texts, through the objective: the loss of the step."""
    trainable = make_trainable(family)
    samples, counts = make_samples(num_chats=0)
    objective = build_objective(CONTRASTIVE)
    term = RoutedEmbeddingTerm({"embedding": objective}, WEIGHTS, method=method, alpha=ALPHA)
    step = GradCacheStep(trainable, lambda loss: loss.backward(), WEIGHTS, [term])
    measured = step.losses_only(make_batch(samples, MANY_PACKS, counts)).by_stream["embedding"]
    pooling, head = vectors_of(trainable, method, ALPHA)
    vectors = embed_samples(trainable.hidden_states, samples, pooling, token_budget=MANY_PACKS, device="cpu", projection=head)
    groups = vectors.reshape(-1, 3, vectors.shape[-1])
    expected = objective(groups, torch.zeros(groups.shape[:2], dtype=torch.int64))
    assert measured == pytest.approx(float(expected.sum) / expected.count, rel=1e-5)


def test_routing_trains_routers_and_not_the_last_experts() -> None:
    """RW alone depends on no expert behind the last router, and on every router."""
    trainable = make_trainable()
    samples, counts = make_samples(num_chats=0)
    term = RoutedEmbeddingTerm({"embedding": build_objective(CONTRASTIVE)}, WEIGHTS, method="rw", alpha=1.0)
    GradCacheStep(trainable, lambda loss: loss.backward(), WEIGHTS, [term])(make_batch(samples, MANY_PACKS, counts))
    found = {name: p.grad for name, p in trainable.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert sum("mlp.gate" in name for name in found) == 2
    assert any("layers.0.mlp.experts" in name for name in found)
    assert not any("layers.1.mlp.experts" in name for name in found)


FAMILIES = [
    Case("zero3", "grit", MANY_PACKS, family, steps=2, balance=20.0 if family in BALANCED else 0.0, vectors="moee_sum")
    for family in MIXTURES
]
OTHERS = [replace(FAMILIES[MIXTURES.index("mixtral")], backend=backend) for backend in ("ddp", "zero2")]
FAST = (*OTHERS[:1], *(case for case in FAMILIES if case.family in ("mixtral", "deepseek_v3")))


def two_processes(all_cases: bool) -> Results:
    return {case: run(case) for case in (*FAMILIES, *OTHERS) if all_cases or case in FAST}


@pytest.fixture(scope="module")
def together(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    pytest.importorskip("deepspeed")
    return run_on_ranks(partial(two_processes, any_slow(request)), 2, tmp_path_factory.mktemp("two"))[0]


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[] if case in FAST else pytest.mark.slow) for case in (*FAMILIES, *OTHERS)],
    ids=lambda case: f"{case.backend}-{case.family}",
)
def test_grit_on_two_processes_takes_the_steps_of_one(together: Results, case: Case) -> None:
    """Packed, with balance where the family has it, and with routing in the vectors: every listed family under ZeRO-3."""
    alone = run(replace(case, backend="single", budget=ONE_PACK))
    assert_same_steps(together[case], alone)


def test_routing_is_in_the_gradient() -> None:
    case = Case("single", "grit", ONE_PACK, "mixtral", steps=1)
    assert distance(run(case), run(replace(case, vectors="rw")), "gradient/") > 1e-2


@pytest.mark.parametrize("family", ["gemma4_text", "granitemoehybrid"])
def test_a_dense_member_of_a_family_with_mixtures_trains_as_any_dense_model(family: str) -> None:
    """transformers names a router for the family, and this model has none."""
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 300}
    own = {"num_local_experts": 0, "layer_types": ["attention"] * 2} if family == "granitemoehybrid" else {}
    config = AutoConfig.for_model(family, hidden_size=64, intermediate_size=96, **sizes, **own)
    model = AutoModelForCausalLM.from_config(config)
    assert router_parameters(model) == router_sizes(model) == []
    backbone = Backbone(model, "sdpa")
    with pytest.raises(ModelError, match="has no router: it is dense"):
        Routers(backbone)
    with pytest.raises(ModelError, match="no router logits"):
        backbone.require_routers()


def test_dense_models_are_refused() -> None:
    with pytest.raises(ModelError, match="'llama' has no router"):
        RoutedEmbeddingTerm.readout({}, Backbone(tiny_model("llama"), "sdpa"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"vectors": "routing"}, "vectors: unknown value 'routing'"),
        ({"vectors": "moee_sum", "alpha": -1.0}, "alpha: got -1"),
        ({"alpha": 0.5}, "alpha: only applies to vectors=moee_sum, got hs"),
        ({"vectors": "rw", "matryoshka_dims": (4,)}, "matryoshka_dims: leading dimensions are those of hidden states"),
    ],
)
def test_settings(given: dict[str, Any], message: str) -> None:
    class Facts:
        format, batch_size, group_size, hides_tokens = "pairs", 4, 2, False
        objective_kind = ContrastiveConfig.kind

    (problem,) = ContrastiveConfig(**given).problems("objective", Facts())  # type: ignore[arg-type]
    assert message in problem
