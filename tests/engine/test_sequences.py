"""Objectives over whole samples in a step: what is compared with what, and laws 3 and 4 for KTO beside contrastive pairs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch

from tests.engine.exactness import (
    MANY_PACKS,
    ONE_PACK,
    Case,
    State,
    distance,
    draw,
    make_step,
    make_trainable,
    run,
    start,
)
from tests.processes import NEEDS_DEEPSPEED, run_on_ranks
from unified_lm.batch import Pack, Sample, make_batch, make_pack
from unified_lm.engine.sequences import SequenceReadout
from unified_lm.engine.training_module import TrainingModule
from unified_lm.models.backbone import Backbone
from unified_lm.models.tiny import tiny_model

STEPS = 3
ALONE = Case("single", "kto", ONE_PACK, steps=STEPS)
DDP = [Case("ddp", "kto", budget, steps=STEPS) for budget in (ONE_PACK, MANY_PACKS)]
ZERO = [Case(backend, "kto", MANY_PACKS, steps=STEPS) for backend in ("zero1", "zero2", "zero3")]
OWN_BASELINE = Case("ddp", "kto", own_baseline=True, steps=1)

Results = dict[Case, State]


def ddp_cases() -> Results:
    return {case: run(case) for case in (*DDP, OWN_BASELINE)}


@pytest.fixture(scope="module")
def alone() -> State:
    return run(ALONE)


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> Results:
    return run_on_ranks(ddp_cases, 2, tmp_path_factory.mktemp("ddp"))[0]


def assert_same_steps(result: State, expected: State) -> None:
    assert distance(result, expected, "gradient/") < 1e-6
    assert distance(result, expected, "weight/") < 1e-5
    assert result["loss"].tolist() == pytest.approx(expected["loss"].tolist(), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("case", DDP, ids=lambda c: str(c.budget))
def test_two_processes_take_the_steps_of_one(alone, together, case):
    """Law 3: z0 is that of the whole step, whatever the ranks and the packs."""
    assert_same_steps(together[case], alone)


def test_a_baseline_per_rank_would_be_wrong(alone, together):
    """The test above can fail: the contrastive half of the gradient is the same, KTO's is not."""
    assert distance(together[OWN_BASELINE], alone, "gradient/") > 1e-5


@NEEDS_DEEPSPEED
@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[] if case.backend == "zero2" else pytest.mark.slow) for case in ZERO],
    ids=lambda c: c.backend,
)
def test_zero_takes_the_steps_of_one_process(case, alone, tmp_path):
    assert_same_steps(run_on_ranks(partial(run, case), 2, tmp_path)[0], alone)


def test_packs_do_not_matter_and_dropout_is_replayed(alone):
    """Law 4: with dropout, GradCache's gradients are the direct ones, preferences in the same packs."""
    assert_same_steps(run(replace(ALONE, budget=MANY_PACKS)), alone)
    cached = Case("single", "kto", MANY_PACKS, dropout=0.2, steps=1)
    with_dropout, direct = run(cached), run(replace(cached, retain_all=True))
    assert distance(with_dropout, direct, "gradient/") < 1e-6
    assert distance(with_dropout, alone, "gradient/") > 1e-2


def kto_step(case: Case, change: Callable[[list[Sample]], list[Sample]] = list) -> tuple[float, dict[str, torch.Tensor], dict]:
    """Loss, gradients and metrics of one step of preferences alone."""
    backend = start(case)
    backend.trainable.train()  # type: ignore[attr-defined]
    torch.manual_seed(5)
    samples, counts = draw("kto", 3)
    batch = make_batch(change([s for s in samples if s.stream == "preference"]), case.budget, counts)
    step = make_step(case, backend)
    losses = step(batch)
    gradients = {name: master.grad.clone() for name, master in backend.optimizer.masters.items()}  # type: ignore[attr-defined]
    assert any(gradient.any() for gradient in gradients.values())
    return losses.total, gradients, losses.metrics


def preference_scores(trainable: TrainingModule, pack: Pack) -> torch.Tensor:
    return trainable(pack).readouts[SequenceReadout.name]["preference"]


def log_probabilities(trainable: TrainingModule, samples: list[Sample]) -> list[float]:
    with trainable.scoring():
        return [float(preference_scores(trainable, make_pack([sample]))) for sample in samples]


def test_the_reference_is_the_model_without_adapters():
    """A copy of the model that never had adapters scores every sample the same."""
    trainable = make_trainable(replace(ALONE, dropout=0.3)).train()
    plain = TrainingModule(Backbone(tiny_model("llama"), "sdpa"), "mean", {}, readouts=[SequenceReadout({"preference"})])
    samples = [s for s in draw("kto", 0)[0] if s.stream == "preference"]
    expected = torch.tensor(log_probabilities(plain, samples))
    pack = make_pack(samples)
    with trainable.scoring(reference=True):
        found = preference_scores(trainable, pack)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    with trainable.scoring():
        adapted = preference_scores(trainable, pack)
    assert (adapted - expected).abs().max() > 0.05, "the adapters do something"
    assert trainable.training
    trained = {name: "lora_" in name or name.endswith(".rows") for name, _ in trainable.named_parameters()}
    assert all(parameter.requires_grad == trained[name] for name, parameter in trainable.named_parameters())


def test_scores_are_sums_of_log_probabilities():
    trainable = make_trainable(ALONE).eval()
    (sample, *_) = [s for s in draw("kto", 0)[0] if s.stream == "preference"]
    pack = make_pack([sample])
    head = trainable.backbone.output_head().weight
    with torch.no_grad():
        table = (trainable.hidden_states(pack) @ head.T).log_softmax(-1)
    at = [i for i in range(len(sample)) if sample.labels[i] >= 0]
    expected = sum(float(table[i - 1, sample.labels[i]]) for i in at)
    assert log_probabilities(trainable, [sample]) == pytest.approx([expected], rel=1e-5)


def test_known_references_give_the_same_step():
    """Cached log-probabilities and switched-off adapters are one reference, and the former need no reference forward."""
    plain = TrainingModule(Backbone(tiny_model("llama"), "sdpa"), "mean", {}, readouts=[SequenceReadout({"preference"})])

    def known(samples: list[Sample]) -> list[Sample]:
        values = log_probabilities(plain, samples)
        return [
            replace(sample, sequence=replace(sample.sequence, reference=value))
            for sample, value in zip(samples, values, strict=True)
        ]

    case = replace(ALONE, dropout=0.2, budget=MANY_PACKS)
    loss, gradients, metrics = kto_step(case)
    cached_loss, cached_gradients, cached_metrics = kto_step(case, known)
    assert cached_loss == pytest.approx(loss, rel=1e-5)
    assert cached_metrics == pytest.approx(metrics, rel=1e-4, abs=1e-4)
    for name, gradient in gradients.items():
        torch.testing.assert_close(cached_gradients[name], gradient, rtol=1e-3, atol=1e-6)
    assert make_batch(known(list(draw("kto", 3)[0][-4:])), 100).sequences.unknown == ()


def test_scoring_draws_no_random_numbers_and_leaves_no_gradient():
    backend = start(replace(ALONE, dropout=0.3))
    trainable = backend.trainable.train()  # type: ignore[attr-defined]
    step = make_step(ALONE, backend)
    batch = make_batch([s for s in draw("kto", 1)[0] if s.stream == "preference"], 100, {"preference": 9.0})
    assert batch.num_samples == 9
    assert sum(len(pack.samples) for pack in batch.sequences.controls) == 9
    state = torch.get_rng_state()
    for term in step.terms:
        term.begin(batch)
    assert torch.equal(torch.get_rng_state(), state)
    assert trainable.training
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in trainable.parameters())


def test_the_step_is_the_formula():
    """Loss and metrics from log-probabilities that are computed sample by sample, outside of the engine."""
    trainable = make_trainable(ALONE)
    plain = TrainingModule(Backbone(tiny_model("llama"), "sdpa"), "mean", {}, readouts=[SequenceReadout({"preference"})])
    samples = [s for s in draw("kto", 3)[0] if s.stream == "preference"]
    ratios = torch.tensor(log_probabilities(trainable, samples)) - torch.tensor(log_probabilities(plain, samples))
    z0 = max(0.0, float(ratios[1::2].mean()))
    total, scores = 0.0, {True: [], False: []}
    for sample, ratio in zip(samples[::2], ratios[::2].tolist(), strict=True):
        sign, weight = (1, 1.25) if sample.sequence.desirable else (-1, 1.0)
        total += weight * (1 - float(torch.sigmoid(torch.tensor(0.3 * sign * (ratio - z0)))))
        scores[sample.sequence.desirable].append(ratio)
    loss, _, metrics = kto_step(ALONE)
    assert loss / 20.0 == pytest.approx(total / 9, rel=1e-5)
    assert metrics["preference/kl"] == pytest.approx(z0, abs=1e-5)
    means = {kind: sum(values) / len(values) for kind, values in scores.items()}
    assert metrics["preference/log_ratio_desirable"] == pytest.approx(means[True], abs=1e-4)
    assert metrics["preference/margin"] == pytest.approx(means[True] - means[False], abs=1e-4)
