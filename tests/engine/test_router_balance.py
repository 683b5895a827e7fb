"""Router balance over a step: neither packs nor GradCache change loss or gradients, and training with it balances."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from tests.engine.test_step import distance
from tests.engine.tiny import NEXT_TOKEN, WEIGHTS, embedding_terms, make_samples
from unified_lm.batch import Batch, make_batch
from unified_lm.config.schema import OptimConfig
from unified_lm.core.errors import ModelError
from unified_lm.engine.backends.backend import TorchBackend
from unified_lm.engine.router_balance import RouterBalance, RoutingReadout
from unified_lm.engine.step import GradCacheStep, StepLosses
from unified_lm.engine.training_module import TrainingModule
from unified_lm.models.backbone import Backbone
from unified_lm.models.tiny import tiny_model
from unified_lm.objectives import build_objective

BALANCE = {"generation": 0.5}
ONE_PACK = 10_000


def make_trainable(
    family: str = "mixtral", balanced: Any = BALANCE, dropout: float = 0.0, dtype: torch.dtype = torch.float64
) -> TrainingModule:
    model = tiny_model(family, dtype=dtype, attention_dropout=dropout)
    model.set_experts_implementation("eager")  # torch's grouped matrix product has no float64
    backbone = Backbone(model, "sdpa")
    tokens = {"generation": build_objective(NEXT_TOKEN)}
    readouts = [RoutingReadout(balanced, backbone.experts()[1])] if balanced else []
    return TrainingModule(backbone, "mean", tokens, readouts=readouts).train()


def make_step(trainable: TrainingModule, num_retained: int = 1, weights: Any = BALANCE, forward: Any = None) -> GradCacheStep:
    terms = embedding_terms()
    if weights:
        terms.append(RouterBalance(weights, *trainable.backbone.experts()))
    return GradCacheStep(forward or trainable, lambda loss: loss.backward(), WEIGHTS, terms, num_retained)


Result = tuple[StepLosses, dict[str, torch.Tensor]]


def run(trainable: TrainingModule, batch: Batch, num_retained: int = 1, **options: Any) -> Result:
    """One step's losses and gradients, from the same random state every time."""
    trainable.zero_grad()
    torch.manual_seed(1234)
    losses = make_step(trainable, num_retained, **options)(batch)
    return losses, {name: p.grad.clone() for name, p in trainable.named_parameters() if p.grad is not None}


class Counting:
    """A forward that counts its calls."""

    def __init__(self, trainable: TrainingModule) -> None:
        self.trainable = trainable
        self.calls = 0

    def __call__(self, pack: Any, *, tokens: bool = True) -> Any:
        self.calls += 1
        return self.trainable(pack, tokens=tokens)


def test_one_batch_has_transformers_loss_of_the_streams_tokens():
    trainable = make_trainable()
    samples, counts = make_samples()
    batch = make_batch(samples, ONE_PACK, counts)
    losses, _ = run(trainable, batch)
    (pack,) = batch.packs
    _, logits = trainable.backbone.router_logits(pack)
    mask = torch.zeros(len(pack))
    mask[pack.positions_of("generation")] = 1
    assert 0 < mask.sum() < len(pack)
    num_experts, top_k = trainable.backbone.experts()
    expected = float(load_balancing_loss_func(logits, num_experts, top_k, mask[None]).detach())
    assert losses.metrics["generation/router_balance"] == pytest.approx(expected, rel=1e-6)
    plain, _ = run(trainable, batch, weights=None)
    assert losses.total == pytest.approx(plain.total + BALANCE["generation"] * expected, rel=1e-6)
    assert losses.by_stream == plain.by_stream


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "granitemoe"])
def test_the_split_into_packs_changes_nothing(family):
    trainable = make_trainable(family)
    samples, counts = make_samples()
    whole = run(trainable, make_batch(samples, ONE_PACK, counts))
    _, without = run(trainable, make_batch(samples, ONE_PACK, counts), weights=None)
    assert distance(without, whole[1]) > 1e-4, "the term has a gradient"
    for budget in (30, 60, 120):
        losses, gradients = run(trainable, make_batch(samples, budget, counts))
        rel = 1e-6 if family == "granitemoe" else 1e-9  # its router gives float32 logits whatever the weights are
        assert losses.metrics["generation/router_balance"] == pytest.approx(
            whole[0].metrics["generation/router_balance"], rel=rel
        )
        assert losses.total == pytest.approx(whole[0].total, rel=1e-6)
        assert distance(gradients, whole[1]) < 1e-6


def test_the_choices_of_a_pack_alone_would_be_wrong(monkeypatch):
    """The test above can fail: with each pack's own f the split changes the gradient."""
    trainable = make_trainable()
    samples, counts = make_samples(num_groups=0, num_chats=9)
    batch = make_batch(samples, 30, counts)
    _, whole = run(trainable, make_batch(samples, ONE_PACK, counts), weights={"generation": 50.0})
    _, split = run(trainable, batch, weights={"generation": 50.0})
    assert distance(split, whole) < 1e-6

    def own(self: RouterBalance, pack: Any, output: Any) -> torch.Tensor:
        """f of the pack, and the step's count."""
        (stream,) = self.weights
        load, probability = output.readouts[RoutingReadout.name][stream]
        fraction, rows = load / (load.sum() / self.top_k), self._fractions[stream][1]
        return self.weights[stream] * self.num_experts * (fraction * probability).sum() / rows

    monkeypatch.setattr(RouterBalance, "share", own)
    _, wrong = run(trainable, batch, weights={"generation": 50.0})
    assert distance(wrong, whole) > 1e-3


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("num_groups", [0, 6])
@pytest.mark.parametrize("num_retained", [0, 1, 3])
def test_dropout_is_replayed(checkpointing, num_groups, num_retained):
    """The same packs forwarded twice, or once with every graph kept; afterwards the random state is the same too."""
    trainable = make_trainable(dropout=0.3)
    if checkpointing:
        trainable.backbone.enable_gradient_checkpointing()
    samples, counts = make_samples(num_groups=num_groups, num_chats=8)
    batch = make_batch(samples, 60, counts)
    assert len([pack for pack in batch.packs if "generation" in pack.supervised]) > 1
    losses, direct = run(trainable, batch, num_retained=len(batch.packs))
    drawn = torch.rand(())
    cached_losses, cached = run(trainable, batch, num_retained=num_retained)
    assert torch.equal(torch.rand(()), drawn)
    assert cached_losses.total == pytest.approx(losses.total, rel=1e-9)
    assert distance(cached, direct) < 1e-9
    run(trainable, batch, weights=None)
    assert torch.equal(torch.rand(()), drawn), "a step draws the same numbers with and without balance"


def test_recomputed_layers_have_the_same_gradient():
    trainable = make_trainable()
    samples, counts = make_samples()
    batch = make_batch(samples, 60, counts)
    _, kept = run(trainable, batch)
    trainable.backbone.enable_gradient_checkpointing()
    _, recomputed = run(trainable, batch)
    assert distance(recomputed, kept) < 1e-9


def test_no_pack_is_forwarded_more_often_than_needed():
    trainable = make_trainable()
    for budget in (ONE_PACK, 60):
        samples, counts = make_samples()
        batch = make_batch(samples, budget, counts)
        forward = Counting(trainable)
        run(trainable, batch, forward=forward)
        assert forward.calls == 2 * len(batch.packs) - 1


def test_without_balanced_streams_nothing_changes(monkeypatch):
    """Weight 0: no router logits, and bit for bit the step of a model that knows no balance."""
    samples, counts = make_samples()
    batch = make_batch(samples, 60, counts)
    expected = run(make_trainable(), batch, weights=None)
    monkeypatch.setattr(Backbone, "router_logits", None)
    losses, gradients = run(make_trainable(balanced=()), batch, weights=None)
    assert (losses.total, losses.by_stream) == (expected[0].total, expected[0].by_stream)
    assert not any("router" in name for name in losses.metrics)
    assert all(torch.equal(gradients[name], expected[1][name]) for name in expected[1])


def test_a_step_without_tokens_of_the_stream_has_no_balance_loss():
    trainable = make_trainable()
    samples, _ = make_samples(num_chats=0)
    batch = make_batch(samples, 60)
    _, plain = run(trainable, batch, weights=None)
    losses, gradients = run(trainable, batch)
    assert losses.metrics["generation/router_balance"] == 0.0
    assert distance(gradients, plain) < 1e-12


def test_a_rank_without_packs_has_its_part_in_the_sum():
    losses, gradients = run(make_trainable(), make_batch([], ONE_PACK, {"generation": 17.0}))
    assert (losses.total, gradients) == (0.0, {})


def test_only_tokens_of_the_stream_count():
    """Contrastive texts move neither the loss nor the routers where they are not trained on."""
    trainable = make_trainable()
    samples, counts = make_samples()
    chats = [sample for sample in samples if sample.stream == "generation"]
    alone, _ = run(trainable, make_batch(chats, ONE_PACK, counts))
    together, _ = run(trainable, make_batch(samples, 60, counts))
    name = "generation/router_balance"
    assert together.metrics[name] == pytest.approx(alone.metrics[name], rel=1e-9)
    unpooled = [replace(sample, stream="generation", pool=None) for sample in samples]
    counted, _ = run(trainable, make_batch(unpooled, ONE_PACK, counts))
    assert counted.metrics[name] != pytest.approx(alone.metrics[name], rel=1e-4)


def test_losses_only_leaves_it_out():
    trainable = make_trainable()
    samples, counts = make_samples()
    batch = make_batch(samples, 60, counts)
    plain, _ = run(trainable, batch, weights=None)
    measured = make_step(trainable).losses_only(batch)
    assert measured.total == pytest.approx(plain.total, rel=1e-9)


def test_a_loss_that_is_not_finite_spoils_the_gradient():
    trainable = make_trainable()
    with torch.no_grad():
        trainable.backbone.causal_lm.model.layers[0].mlp.gate.weight[0, 0] = torch.nan
    samples, counts = make_samples()
    losses, gradients = run(trainable, make_batch(samples, ONE_PACK, counts))
    assert losses.total != losses.total
    assert all(gradient.isnan().any() for name, gradient in gradients.items() if "gate.weight" in name)


@pytest.mark.parametrize(
    ("family", "kernel", "text"),
    [
        ("llama", "sdpa", "'llama' (has no router balance loss|returns no router logits)"),
        ("deepseek_v3", "sdpa", "'deepseek_v3' has no router balance loss"),
        ("mixtral", "padded", "need packed attention"),
    ],
)
def test_models_whose_routers_cannot_be_balanced_are_refused(family, kernel, text):
    with pytest.raises(ModelError, match=text):
        RouterBalance.readout({"generation": NEXT_TOKEN}, Backbone(tiny_model(family), kernel))
    if family != "deepseek_v3":  # whose routing may be read, and trained as a vector
        with pytest.raises(ModelError, match=text):
            TrainingModule(Backbone(tiny_model(family), kernel), "mean", {}, readouts=[RoutingReadout(["generation"], 2)])


def test_training_with_it_balances_the_experts():
    """A negative weight makes the routers lopsided; from there a positive one balances them, and a tiny one does not."""
    trainable = make_trainable(dtype=torch.float32)
    samples, counts = make_samples(num_groups=4, num_chats=6)
    batch = make_batch(samples, 120, counts)

    def train(trainable: TrainingModule, weight: float) -> float:
        backend = TorchBackend(trainable, OptimConfig())
        step = make_step(trainable, weights={"generation": weight})
        for _ in range(12):
            losses = step(batch)
            backend.update(1e-2, 1.0)
        return losses.metrics["generation/router_balance"]

    lopsided = train(trainable, -50.0)
    left, balanced = train(copy.deepcopy(trainable), 1e-6), train(trainable, 10.0)
    assert lopsided > 3, "of 4 experts 2 are chosen: 2 is perfect, 4 the worst"
    assert left > 2.5
    assert balanced < 2.2
