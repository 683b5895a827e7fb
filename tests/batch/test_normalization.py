"""Weights and counts of every scheme, against the losses they stand for."""

import numpy as np
import pytest

from unified_lm.batch import IGNORE, Sample
from unified_lm.batch.normalization import Normalization, divide, normalize
from unified_lm.core.errors import ConfigError

SUPERVISED = (3, 0, 1, 4, 2)


@pytest.fixture
def samples() -> list[Sample]:
    made = []
    for number in SUPERVISED:
        labels = np.full(6, IGNORE)
        labels[1 : 1 + number] = 7
        made.append(Sample(input_ids=np.arange(6), stream="chat", labels=labels if number else None))
    return made


@pytest.fixture
def losses() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.random(6) for _ in SUPERVISED]


def reduce(samples: list[Sample], losses: list[np.ndarray], scheme: str, size: int | None = None) -> float:
    weighted, count = normalize(samples, scheme, size)
    total = 0.0
    for sample, loss in zip(weighted, losses, strict=True):
        if sample.num_supervised:
            assert sample.token_weights is not None
            assert sample.token_weights.dtype == np.float32
            chosen = sample.labels != IGNORE
            total += float((sample.token_weights[chosen] * loss[chosen]).sum())
    return divide(total, count)


def chosen(losses: list[np.ndarray]) -> list[np.ndarray]:
    return [loss[1 : 1 + number] for loss, number in zip(losses, SUPERVISED, strict=True)]


def test_token_is_the_mean_over_tokens(samples, losses):
    assert reduce(samples, losses, "token") == pytest.approx(np.concatenate(chosen(losses)).mean(), rel=1e-6)


def test_sample_is_the_mean_of_sample_means(samples, losses):
    expected = np.mean([part.mean() for part in chosen(losses) if len(part)])
    assert reduce(samples, losses, "sample") == pytest.approx(expected, rel=1e-6)


def test_sum_per_sample_counts_unsupervised_samples(samples, losses):
    expected = np.concatenate(chosen(losses)).sum() / len(samples)
    assert reduce(samples, losses, "sum_per_sample") == pytest.approx(expected, rel=1e-6)


def test_mixed_is_the_mean_of_micro_batch_means(samples, losses):
    parts = chosen(losses)
    expected = np.mean([np.concatenate(parts[at : at + 2]).mean() for at in (0, 2, 4)])
    assert reduce(samples, losses, "mixed", 2) == pytest.approx(expected, rel=1e-6)
    assert expected != pytest.approx(reduce(samples, losses, "token"), rel=1e-3)


def test_mixed_spans_token_and_sample(samples, losses):
    assert reduce(samples, losses, "mixed", len(samples)) == pytest.approx(reduce(samples, losses, "token"), rel=1e-6)
    assert reduce(samples, losses, "mixed", 1) == pytest.approx(reduce(samples, losses, "sample"), rel=1e-6)


def test_counts(samples):
    assert normalize(samples, "token")[1] == 10
    assert normalize(samples, "sample")[1] == 4
    assert normalize(samples, "sum_per_sample")[1] == 5
    assert normalize(samples, "mixed", 1)[1] == 4


@pytest.mark.parametrize(("scheme", "size"), [("token", None), ("sample", None), ("mixed", 2), ("sum_per_sample", None)])
def test_a_step_without_supervision_has_loss_zero(samples, losses, scheme, size):
    assert reduce([samples[1]], [losses[1]], scheme, size) == 0.0
    assert normalize([], scheme, size) == ([], 0.0)


def test_samples_are_not_changed_in_place(samples):
    normalize(samples, "token")
    assert samples[0].token_weights is None


def test_bad_names_and_sizes(samples):
    with pytest.raises(ConfigError, match=r"unknown normalization 'tokens'\. Did you mean 'token'"):
        normalize(samples, "tokens")
    with pytest.raises(ConfigError, match="needs micro_batch_size"):
        normalize(samples, "mixed")
    with pytest.raises(ConfigError, match="at least 1; got 0"):
        normalize(samples, "mixed", 0)
    with pytest.raises(ConfigError, match="has no effect"):
        normalize(samples, "token", 4)
    assert Normalization.parse("mixed") is Normalization.MIXED
