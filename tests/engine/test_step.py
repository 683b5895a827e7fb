"""Laws 3 and 4 on one process: neither packs nor GradCache change losses or gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.engine.tiny import CONTRASTIVE, WEIGHTS, embedding_terms, make_samples, make_trainable
from unified_lm.batch import MISSING, Batch, make_batch
from unified_lm.engine.step import GradCacheStep, StepLosses
from unified_lm.engine.training_module import TrainingModule


def backward(loss: torch.Tensor) -> None:
    loss.backward()


def run(trainable: TrainingModule, batch: Batch, num_retained: int = 1) -> tuple[StepLosses, dict[str, torch.Tensor]]:
    """One step's losses and gradients, from the same random state every time."""
    trainable.train()
    trainable.zero_grad()
    torch.manual_seed(1234)
    losses = GradCacheStep(trainable, backward, WEIGHTS, embedding_terms(), num_retained)(batch)
    return losses, {name: p.grad.clone() for name, p in trainable.named_parameters() if p.grad is not None}


def distance(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """Relative distance of two sets of gradients, by their norms."""
    assert first.keys() == second.keys()
    difference = sum((first[name] - second[name]).double().square().sum() for name in first)
    norm = sum(g.double().square().sum() for g in second.values())
    return float((difference / norm).sqrt())


@pytest.mark.parametrize("normalization", ["token", "sample", "mixed"])
def test_the_split_into_packs_changes_nothing(normalization):
    """Law 3: one pack, many packs."""
    trainable = make_trainable(dtype=torch.float64)
    samples, counts = make_samples(normalization=normalization)
    whole = run(trainable, make_batch(samples, 10_000, counts))
    assert len(make_batch(samples, 40, counts).packs) > 5
    for budget in (40, 100, 200):
        losses, gradients = run(trainable, make_batch(samples, budget, counts))
        assert losses.total == pytest.approx(whole[0].total, rel=1e-6)
        assert distance(gradients, whole[1]) < 1e-6


def test_a_mean_per_pack_would_be_wrong():
    """The test above can fail: averaging packs instead of summing over the step gives another gradient."""
    trainable = make_trainable(dtype=torch.float64)
    samples, counts = make_samples(num_groups=0, num_chats=9)
    _, whole = run(trainable, make_batch(samples, 10_000, counts))
    packs = make_batch(samples, 25, counts).packs
    assert len(packs) > 2
    trainable.zero_grad()
    for pack in packs:
        term = trainable(pack).terms["generation"]
        (WEIGHTS["generation"] * term.sum / pack.supervised["generation"].weights.sum() / len(packs)).backward()
    averaged = {name: p.grad for name, p in trainable.named_parameters() if p.grad is not None}
    assert distance(averaged, whole) > 1e-2


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("num_retained", [0, 1, 2])
def test_gradcache_equals_direct(dropout, num_retained):
    """Law 4: the same packs forwarded twice, or once with every graph kept."""
    trainable = make_trainable(dropout=dropout)
    samples, counts = make_samples()
    batch = make_batch(samples, 60, counts)
    assert len([pack for pack in batch.packs if pack.pool_rows]) > 3
    losses, direct = run(trainable, batch, num_retained=len(batch.packs))
    cached_losses, cached = run(trainable, batch, num_retained=num_retained)
    assert cached_losses.by_stream["embedding"] == pytest.approx(losses.by_stream["embedding"], rel=1e-6)
    assert distance(cached, direct) < 1e-5


def test_missing_negatives_count_in_no_pack():
    """Rows with their own numbers of negatives: the loss by hand, GradCache = direct, and an empty place changes nothing."""
    trainable = make_trainable(dtype=torch.float64)
    samples, counts = make_samples(num_chats=0)
    lacking = [replace(s, text_id=MISSING) if s.slot == 2 and s.group % 2 else s for s in samples]
    batch = make_batch(lacking, 60, counts)
    assert len(batch.packs) > 3
    losses, direct = run(trainable, batch, num_retained=len(batch.packs))
    _, cached = run(trainable, batch, num_retained=1)
    assert distance(cached, direct) < 1e-6
    with torch.no_grad():
        whole = make_batch([replace(s, text_id=0) for s in samples], 10_000, counts)
        vectors = torch.nn.functional.normalize(trainable(whole.packs[0]).embeddings, dim=-1)
    at = {row: index for index, row in enumerate(whole.packs[0].pool_rows)}
    kept = [at[3 * group + slot] for group in range(6) for slot in (1, 2) if slot == 1 or group % 2 == 0]
    expected = 0.0
    for group in range(6):
        scores = vectors[at[3 * group]] @ vectors[kept].T / CONTRASTIVE.temperature
        expected += float(scores.logsumexp(0) - scores[kept.index(at[3 * group + 1])]) / 6
    assert losses.by_stream["embedding"] == pytest.approx(expected, rel=1e-9)
    shorter = [
        replace(s, input_ids=s.input_ids[:1], pool=(0, 1), bidirectional=(0, 1)) if s.text_id < 0 else s for s in lacking
    ]
    other_losses, other = run(trainable, make_batch(shorter, 60, counts))
    assert other_losses.total == pytest.approx(losses.total, rel=1e-12)
    assert distance(other, direct) < 1e-9


def test_gradcache_without_replaying_the_random_state_would_be_wrong(monkeypatch):
    """The test above can fail: fresh dropout in the second forward gives another gradient."""
    trainable = make_trainable(dropout=0.3)
    samples, counts = make_samples()
    batch = make_batch(samples, 60, counts)
    _, direct = run(trainable, batch, num_retained=len(batch.packs))
    monkeypatch.setattr("unified_lm.core.random.RngState.restore", lambda self: None)
    _, unreplayed = run(trainable, batch, num_retained=1)
    assert distance(unreplayed, direct) > 1e-2


def test_dropout_is_on():
    trainable = make_trainable(dropout=0.3)
    samples, counts = make_samples()
    batch = make_batch(samples, 60, counts)
    first, _ = run(trainable, batch)
    trainable.zero_grad()
    torch.manual_seed(99)
    other = GradCacheStep(trainable, backward, WEIGHTS, embedding_terms())(batch)
    assert first.by_stream["embedding"] != other.by_stream["embedding"]


def test_weights_scale_terms():
    trainable = make_trainable()
    samples, counts = make_samples()
    batch = make_batch(samples, 100, counts)
    losses, _ = run(trainable, batch)
    expected = losses.by_stream["embedding"] + 0.7 * losses.by_stream["generation"]
    assert losses.total == pytest.approx(expected)


def test_losses_only_agrees_and_leaves_no_gradient():
    trainable = make_trainable()
    samples, counts = make_samples()
    batch = make_batch(samples, 60, counts)
    losses, _ = run(trainable, batch)
    trainable.zero_grad()
    measured = GradCacheStep(trainable, backward, WEIGHTS, embedding_terms()).losses_only(batch)
    assert measured.by_stream == pytest.approx(losses.by_stream, rel=1e-5)
    assert all(p.grad is None for p in trainable.parameters())


def test_a_batch_of_chats_alone_needs_no_contrastive_stream():
    trainable = make_trainable()
    samples, counts = make_samples(num_groups=0)
    batch = make_batch(samples, 60, counts)
    losses = GradCacheStep(trainable, backward, WEIGHTS)(batch)
    assert set(losses.by_stream) == {"generation"}
    assert losses.total > 0
