"""Coupled terms from outside the package, one class each: their gradients are those of one pack on one process."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from tests.engine.exactness import OPTIM, RATE, State, copy_state
from tests.engine.test_step import distance
from tests.engine.tiny import WEIGHTS, embedding_terms, make_samples, make_trainable
from tests.processes import NEEDS_DEEPSPEED, run_on_ranks
from unified_lm.batch import Batch, Pack, Sample, make_batch
from unified_lm.config.schema import ParallelConfig
from unified_lm.core import distributed
from unified_lm.core.errors import ConfigError
from unified_lm.engine.backends.backend import make_backend
from unified_lm.engine.coupled import CoupledTerm, Recompute, TermParts, TermReport, forwarded_twice, term_classes
from unified_lm.engine.readout import PackStates, Readout
from unified_lm.engine.step import GradCacheStep, StepLosses
from unified_lm.engine.training_module import PackOutput, TrainingModule
from unified_lm.models.backbone import Backbone
from unified_lm.models.tiny import tiny_model
from unified_lm.objectives import OBJECTIVES

ONE_PACK, MANY_PACKS = 10_000, 60
DOCS = Path(__file__).resolve().parents[2] / "docs"


class Decorrelation(CoupledTerm):
    """Squared covariances between different dimensions of all embeddings of a step (VICReg, arXiv:2105.04906, eq. 3 and 4)."""

    regularizer: ClassVar[bool] = True
    recompute: ClassVar[Recompute] = Recompute.OWN  # `couple` sees the packs with samples of `streams`

    def __init__(self, weight: float, size: int, streams: Collection[str]) -> None:
        self.weight = weight
        self.size = size  # D: a rank without embeddings must know it too
        self.streams = frozenset(streams)

    @classmethod
    def make(cls, parts: TermParts) -> CoupledTerm:
        return cls(weight=3.0, size=parts.trainable.backbone.hidden_size, streams=parts.streams)

    def moments(self, embeddings_ED: torch.Tensor) -> torch.Tensor:
        """`[1 + D, 1 + D]`: number, sum and sum of outer products, which add up over packs and ranks."""
        rows = torch.cat([torch.ones_like(embeddings_ED[:, :1]), embeddings_ED], dim=1)
        return rows.T @ rows

    def loss(self, moments: torch.Tensor) -> torch.Tensor:
        """The loss of everything that is in `moments`."""
        means = moments / moments[0, 0].clamp(min=1)
        covariance_DD = means[1:, 1:] - torch.outer(means[0, 1:], means[0, 1:])
        return (covariance_DD - covariance_DD.diag().diag()).square().sum() / self.size

    def couple(self, batch: Batch, seen: Sequence[tuple[Pack, PackOutput]]) -> None:
        total = torch.zeros(1 + self.size, 1 + self.size, dtype=torch.float64, device=distributed.local_device())
        for _, output in seen:
            total += self.moments(output.embeddings)
        total = distributed.all_reduce_sum(total).requires_grad_()
        with torch.enable_grad():
            loss = self.loss(total)
        (self.gradient,) = torch.autograd.grad(loss, total)  # constant from here on
        self.value = float(loss.detach())

    def share(self, pack: Pack, output: PackOutput) -> torch.Tensor | None:
        if not self.sees(pack):
            return None
        return self.weight * (self.moments(output.embeddings) * self.gradient).sum()

    def finish(self) -> TermReport:
        return TermReport(extra=self.weight * self.value, metrics={"decorrelation": self.value})


class RouterUniformity(Readout, CoupledTerm):
    """Negative entropy of the mean routing probabilities of all tokens and layers of a step: term and readout in one class."""

    name = "router_uniformity"
    reads_routers = True
    regularizer: ClassVar[bool] = True
    recompute: ClassVar[Recompute] = Recompute.ALL

    def __init__(self, weight: float, num_experts: int) -> None:
        self.weight = weight
        self.num_experts = num_experts

    def __call__(self, states: PackStates, pack: Pack) -> dict[str, torch.Tensor]:
        return {"probability": torch.stack(states.router_logits).softmax(-1).flatten(0, 1).sum(0)}

    def couple(self, batch: Batch, seen: Sequence[tuple[Pack, PackOutput]]) -> None:
        total = torch.zeros(self.num_experts, dtype=torch.float64)
        for _, output in seen:
            total += output.readouts[self.name]["probability"]
        total = distributed.all_reduce_sum(total).requires_grad_()
        with torch.enable_grad():
            mean_E = total / total.sum()
            loss = (mean_E * mean_E.log()).sum()
        (self.gradient,) = torch.autograd.grad(loss, total)
        self.value = float(loss.detach())

    def share(self, pack: Pack, output: PackOutput) -> torch.Tensor:
        return self.weight * (output.readouts[self.name]["probability"] * self.gradient).sum()

    def finish(self) -> TermReport:
        return TermReport(extra=self.weight * self.value, metrics={"router_uniformity": self.value})


def decorrelation() -> Decorrelation:
    return Decorrelation(weight=3.0, size=64, streams={"embedding"})


def gradients(trainable: TrainingModule) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in trainable.named_parameters() if p.grad is not None}


def run(
    trainable: TrainingModule, batch: Batch, terms: Sequence[CoupledTerm], num_retained: int = 1
) -> tuple[StepLosses, dict[str, torch.Tensor]]:
    trainable.train()
    trainable.zero_grad()
    torch.manual_seed(7)
    losses = GradCacheStep(trainable, torch.Tensor.backward, WEIGHTS, terms, num_retained)(batch)
    return losses, gradients(trainable)


@pytest.mark.parametrize("budget", [ONE_PACK, 120, MANY_PACKS, 25])
@pytest.mark.parametrize("num_retained", [0, 1, 100])
def test_gradients_of_many_packs_are_those_of_the_formula_on_one(budget, num_retained):
    trainable = make_trainable(dtype=torch.float64)
    samples, _ = make_samples(num_chats=0)
    losses, found = run(trainable, make_batch(samples, budget), [decorrelation()], num_retained)
    trainable.zero_grad()
    (pack,) = make_batch(samples, ONE_PACK).packs
    covariance = torch.cov(trainable(pack).embeddings.T, correction=0)
    off_diagonal = covariance.square().sum() - covariance.diag().square().sum()
    (3.0 * off_diagonal / 64).backward()
    value = float(off_diagonal.detach()) / 64
    assert distance(found, gradients(trainable)) < 1e-6
    assert losses.metrics["decorrelation"] == pytest.approx(value, rel=1e-6)
    assert losses.total == pytest.approx(3.0 * value, rel=1e-6)


def test_terms_add_up():
    trainable = make_trainable(dtype=torch.float64)
    samples, counts = make_samples()
    batch = make_batch(samples, MANY_PACKS, counts)
    (others, first), (alone, second) = run(trainable, batch, embedding_terms()), run(trainable, batch, [decorrelation()])
    _, tokens = run(trainable, batch, [])
    both, found = run(trainable, batch, [*embedding_terms(), decorrelation()])
    expected = {name: first[name] + second[name] - tokens.get(name, 0.0) for name in first}
    assert distance(found, expected) < 1e-6
    assert both.total == pytest.approx(others.total + 3.0 * alone.metrics["decorrelation"])
    assert both.by_stream == others.by_stream


def test_dropout_is_replayed():
    trainable = make_trainable(dropout=0.3, dtype=torch.float64)
    batch = make_batch(make_samples(num_chats=0)[0], MANY_PACKS)
    assert distance(run(trainable, batch, [decorrelation()])[1], run(trainable, batch, [decorrelation()], 100)[1]) < 1e-6


class Local(Decorrelation):
    """Every pack on its own: wrong."""

    def share(self, pack: Pack, output: PackOutput) -> torch.Tensor | None:
        part = len(output.embeddings) / 18  # of the step's embeddings
        return self.weight * self.loss(self.moments(output.embeddings)) * part


def test_a_loss_of_each_pack_alone_would_be_wrong():
    trainable = make_trainable(dtype=torch.float64)
    batch = make_batch(make_samples(num_chats=0)[0], MANY_PACKS)
    assert len(batch.packs) >= 4
    assert (
        distance(run(trainable, batch, [Local(3.0, 64, {"embedding"})])[1], run(trainable, batch, [decorrelation()])[1]) > 1e-2
    )


class Broken(Decorrelation):
    def share(self, pack: Pack, output: PackOutput) -> torch.Tensor | None:
        share = super().share(pack, output)
        return None if share is None else share + torch.inf


def test_a_share_that_is_not_finite_shows_in_the_gradient():
    _, found = run(
        make_trainable(), make_batch(make_samples()[0], ONE_PACK, {"generation": 9.0}), [Broken(3.0, 64, {"embedding"})]
    )
    assert any(gradient.isnan().any() for gradient in found.values())


def test_held_out_losses_leave_regularizers_out():
    trainable = make_trainable()
    samples, counts = make_samples()
    batch = make_batch(samples, MANY_PACKS, counts)
    with_term, without = (
        GradCacheStep(trainable, torch.Tensor.backward, WEIGHTS, terms).losses_only(batch)
        for terms in ([*embedding_terms(), decorrelation()], embedding_terms())
    )
    assert (with_term.total, with_term.metrics) == (without.total, without.metrics)


# --- a readout, and ranks ------------------------------------------------------------------------------------------------


def make_routed(dtype: torch.dtype, term: RouterUniformity) -> TrainingModule:
    model = tiny_model("mixtral", dtype=dtype)
    model.set_experts_implementation("eager")
    return TrainingModule(Backbone(model, "sdpa"), "mean", {}, readouts=[term])


def test_a_term_may_bring_its_own_readout():
    term = RouterUniformity(weight=5.0, num_experts=4)
    trainable = make_routed(torch.float64, term)
    samples, _ = make_samples(num_chats=0)
    batch = make_batch([*samples, *(Sample(input_ids=s.input_ids, stream="plain") for s in samples[:6])], 40)
    assert any(not pack.pool_rows for pack in batch.packs), "packs without embeddings count too"
    losses, found = run(trainable, batch, [term])
    trainable.zero_grad()
    expected = torch.zeros(4, dtype=torch.float64)
    for pack in batch.packs:
        _, logits = trainable.backbone.router_logits(pack)
        expected = expected + sum(layer.softmax(-1).sum(0) for layer in logits)
    mean = expected / expected.sum()
    loss = 5.0 * (mean * mean.log()).sum()
    loss.backward()
    assert losses.total == pytest.approx(float(loss.detach()), rel=1e-9)
    assert distance(found, gradients(trainable)) < 1e-9


def test_two_readouts_of_one_name_are_refused():
    term = RouterUniformity(1.0, 4)
    with pytest.raises(AssertionError, match="two readouts of one name"):
        TrainingModule(Backbone(tiny_model("mixtral"), "sdpa"), "mean", {}, readouts=[term, term])


def first_gradient(backend_name: str, budget: int) -> State:
    """The gradient of one step with both terms, by AdamW's first moment; ranks get uneven parts."""
    terms = [RouterUniformity(weight=50.0, num_experts=4), decorrelation()]
    parallel = ParallelConfig(backend=backend_name, persistence_threshold=0, bucket_elements=20_000)
    backend: Any = make_backend(make_routed(torch.float32, terms[0]), OPTIM, parallel)
    samples, _ = make_samples(num_chats=0)
    first = 6 if distributed.world_size() == 1 else 2
    mine = [s for s in samples if (s.group < first) == (distributed.rank() == 0)]
    step = GradCacheStep(backend.forward, backend.backward, WEIGHTS, terms, equal_forwards=backend.equal_forwards)
    total = step(make_batch(mine, budget)).total
    backend.update(RATE, 0.0)
    state = {name: value for name, value in copy_state(backend).items() if name.startswith("exp_avg/")}
    backend.close()
    return state | {"total": torch.tensor(total)}


def ddp() -> dict[str, State]:
    return {"ddp": first_gradient("ddp", MANY_PACKS)}


def zero() -> dict[str, State]:
    return {name: first_gradient(name, MANY_PACKS) for name in ("zero2", "zero3")}


@pytest.mark.parametrize("job", [ddp, pytest.param(zero, marks=NEEDS_DEEPSPEED)], ids=lambda job: job.__name__)
def test_two_ranks_take_the_gradient_of_one(job, tmp_path):
    expected = first_gradient("single", ONE_PACK)
    for state in run_on_ranks(job, 2, tmp_path)[0].values():
        assert float(state.pop("total")) == pytest.approx(float(expected["total"]), rel=1e-5)
        assert distance(state, {name: value for name, value in expected.items() if name != "total"}) < 1e-5


def test_the_page_shows_this_term():
    assert inspect.getsource(Decorrelation) in (DOCS / "coupled-terms.md").read_text()


class Vain(CoupledTerm):
    """Does not say how a run makes it."""

    def share(self, pack: Pack, output: PackOutput) -> torch.Tensor | None:
        return None

    def finish(self) -> TermReport:
        return TermReport()


@pytest.mark.parametrize("balanced", [False, True], ids=["plain", "balanced"])
def test_what_a_run_counts_as_forwarded_twice_is_what_its_terms_see(balanced):
    streams = {name: description() for name, description in OBJECTIVES.items()}
    if balanced:
        streams["next_token"] = replace(streams["next_token"], router_aux_loss_coef=0.1)
    module = SimpleNamespace(backbone=SimpleNamespace(experts=lambda: (4, 2)))
    made = [
        term.make(
            TermParts({n: streams[n] for n in names}, dict.fromkeys(names), dict.fromkeys(streams, 1.0), print, module, False)
        )
        for term, names in term_classes(streams).items()
    ]
    assert len(made) == 2 + balanced
    seen = []
    for name in streams:
        (pack,) = make_batch([Sample(input_ids=np.arange(3), stream=name)], ONE_PACK, {}).packs
        seen += [name] if any(term.sees(pack) for term in made) else []
    assert seen == forwarded_twice(streams) == (list(streams) if balanced else ["contrastive"])


def test_a_term_that_no_run_can_make_is_named():
    with pytest.raises(ConfigError, match=r"test_coupled\.Vain cannot be made for a run: it needs a class method `make`"):
        Vain.make(TermParts({}, {}, {}, print, None, False))


def test_a_name_that_is_no_term_is_refused():
    class Config(type(OBJECTIVES["contrastive"]())):
        coupled = ("pathlib.Path",)

    with pytest.raises(ConfigError, match=r"'pathlib\.Path', named by objective contrastive, is no subclass of .*CoupledTerm"):
        term_classes({"embedding": Config()})
