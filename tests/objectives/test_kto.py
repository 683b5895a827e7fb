"""KTO's formula: parity with trl, and what the metrics mean."""

from __future__ import annotations

import math

import pytest
import torch

from unified_lm.batch import SequenceScores
from unified_lm.core.errors import ConfigError
from unified_lm.objectives import KTOConfig, ObjectiveKind, build_objective
from unified_lm.objectives.kto import KTO

POLICY = [-3.25, -8.5, -4.75, -12.0, -6.5]
REFERENCE = [-4.0, -7.25, -6.0, -11.0, -6.5]
DESIRABLE = [True, False, True, False, False]
CONTROLS_POLICY = [-9.0, -10.5, -8.0, -7.0, -6.0]
CONTROLS_REFERENCE = [-10.0, -11.0, -10.0, -6.5, -7.5]

# Loss, z0 and the loss's gradient by the policy's log-probabilities, from trl 1.16.0's own KTOTrainer._compute_loss on the
# numbers above (loss_type "kto", precomputed references), float32: settings, (controls' policy, controls' reference), results.
TRL = [
    (
        {},
        (CONTROLS_POLICY, CONTROLS_REFERENCE),
        0.4743228852748871,
        0.9,
        [-0.0049997190944850445, 0.004942660685628653, -0.0049984692595899105, 0.00495514553040266, 0.004989888519048691],
    ),
    (
        {"beta": 0.5, "desirable_weight": 1.5, "undesirable_weight": 0.75},
        (CONTROLS_POLICY, CONTROLS_REFERENCE),
        0.4309356212615967,
        0.9,
        [-0.03744731843471527, 0.014228014275431633, -0.03721435368061066, 0.01508310716599226, 0.017831921577453613],
    ),
    (  # the mean of the controls is below 0
        {},
        ([-11.0, -12.5, -8.0, -7.0, -6.0], [-10.0, -11.0, -10.0, -6.5, -3.5]),
        0.4787721633911133,
        0.0,
        [-0.004992975387722254, 0.004980519879609346, -0.004980519879609346, 0.004987520631402731, 0.005000000353902578],
    ),
]


def scores(policy: torch.Tensor, baseline: float = 0.0, desirable: list[bool] | None = None) -> SequenceScores:
    wanted = torch.tensor(DESIRABLE if desirable is None else desirable)
    return SequenceScores(policy, torch.tensor(REFERENCE), wanted, torch.full((5,), baseline))


@pytest.mark.parametrize(("settings", "controls", "loss", "z0", "gradient"), TRL)
def test_parity_with_trl(settings, controls, loss, z0, gradient):
    kto = build_objective(KTOConfig(**settings))
    assert KTOConfig.kind is ObjectiveKind.SEQUENCE
    baseline = kto.baseline(torch.tensor(controls[0]) - torch.tensor(controls[1]))
    assert float(baseline) == pytest.approx(z0, abs=1e-6)
    policy = torch.tensor(POLICY, requires_grad=True)
    term = kto(scores(policy, float(baseline)))
    assert term.count == 5
    (term.sum / term.count).backward()
    assert float(term.sum.detach()) / 5 == pytest.approx(loss, abs=1e-6)
    assert policy.grad.tolist() == pytest.approx(gradient, abs=1e-8)


def test_labels_and_baseline_matter():
    """The parity test can fail."""
    kto, policy = KTO(KTOConfig()), torch.tensor(POLICY)
    right = float(kto(scores(policy, 0.9)).sum)
    assert abs(float(kto(scores(policy, 0.0)).sum) - right) > 1e-3
    assert abs(float(kto(scores(policy, 0.9, [not label for label in DESIRABLE])).sum) - right) > 1e-3


def test_far_from_the_reference_the_loss_stays_finite_and_saturates():
    kto = KTO(KTOConfig())
    policy = torch.tensor([-1e4, -1e4, 1e4, 1e4, 0.0], requires_grad=True)
    term = kto(scores(policy))
    term.sum.backward()
    assert float(term.sum.detach()) == pytest.approx(1 + 0 + 0 + 1 + float(torch.sigmoid(torch.tensor(0.65))), abs=1e-5)
    assert policy.grad[:4].abs().max() < 1e-6


def test_the_baseline_without_controls_is_zero():
    assert float(KTO(KTOConfig()).baseline(torch.zeros(0))) == 0.0


def test_metrics_are_means():
    measured = KTO(KTOConfig()).measure(scores(torch.tensor(POLICY), 0.9))
    means = {name: float(values.mean()) for name, values in measured.items()}
    good, bad = (0.75 + 1.25) / 2, (-1.25 - 1.0 + 0.0) / 3
    assert means == pytest.approx(
        {
            "kl": 0.9,
            "accuracy": 4 / 5,  # 0.75 is below z0
            "log_probability_desirable": -4.0,
            "log_probability_undesirable": -9.0,
            "log_ratio_desirable": good,
            "log_ratio_undesirable": bad,
            "margin": good - bad,
        }
    )


def test_one_kind_alone_has_no_margin():
    measured = KTO(KTOConfig()).measure(scores(torch.tensor(POLICY), 0.0, [True] * 5))
    assert "margin" not in measured
    assert len(measured["log_ratio_undesirable"]) == 0
    assert math.isfinite(float(measured["log_ratio_desirable"].mean()))


def test_scores_join():
    part = scores(torch.tensor(POLICY))
    both = SequenceScores.cat([part, part])
    assert both.policy.tolist() == POLICY * 2
    assert both.desirable.tolist() == DESIRABLE * 2


def test_a_wrong_name_is_near_kto():
    with pytest.raises(ConfigError, match="kto"):
        build_objective(KTOConfig(name="ktoo"))
