"""Pooling of packed spans, the projection head, and embedding many samples."""

import numpy as np
import pytest
import torch
from torch import nn

from unified_lm.batch import Sample, make_pack
from unified_lm.core.errors import ConfigError
from unified_lm.models.embedding import embed_samples
from unified_lm.models.pooling import Pooling, Projection, pool

T, D = 20, 6
SPANS = [(0, 4), (5, 6), (6, 13), (15, 20)]


@pytest.fixture
def hidden():
    return torch.randn(T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()


def by_hand(states, method):
    size = len(states)
    if method == "mean":
        return states.mean(0)
    if method == "weighted_mean":
        weight = torch.arange(1, size + 1, dtype=states.dtype)
        return (states * weight[:, None]).sum(0) / weight.sum()
    return states[-1] if method == "last_token" else states[0]


@pytest.mark.parametrize("method", [p.value for p in Pooling])
def test_equals_each_span_alone(hidden, method):
    found = pool(hidden, torch.tensor(SPANS), method)
    expected = torch.stack([by_hand(hidden[a:b], method) for a, b in SPANS])
    torch.testing.assert_close(found, expected)
    upstream = torch.randn(len(SPANS), D, dtype=torch.float64)
    torch.testing.assert_close(
        torch.autograd.grad((found * upstream).sum(), hidden), torch.autograd.grad((expected * upstream).sum(), hidden)
    )


@pytest.mark.parametrize("method", [p.value for p in Pooling])
def test_neighbors_do_not_matter(hidden, method):
    spans = torch.tensor(SPANS)
    before = pool(hidden, spans, method)
    poisoned = hidden.detach().clone()
    poisoned[4], poisoned[13:15] = torch.inf, torch.nan
    assert torch.equal(pool(poisoned, spans, method), before)
    moved = hidden.detach().clone()
    moved[[0, 3]] += 1.0
    assert not torch.equal(pool(moved, spans, method)[0], before[0])


@pytest.mark.parametrize("method", [p.value for p in Pooling])
def test_overlapping_none_and_unordered_spans(hidden, method):
    found = pool(hidden, torch.tensor([(3, 9), (0, 5)]), method)
    torch.testing.assert_close(found, torch.stack([by_hand(hidden[3:9], method), by_hand(hidden[0:5], method)]))
    assert pool(hidden, torch.zeros(0, 2, dtype=torch.int64), method).shape == (0, D)


def test_sums_in_float32_whatever_the_states():
    states = torch.full((4096, 1), 1.0, dtype=torch.bfloat16)
    states[0] = 3.0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = pool(states, torch.tensor([[0, 4096]]), "mean")
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(4098 / 4096, rel=1e-6)
    assert states.mean().item() != found.item(), "bfloat16 would have lost it"


def test_unknown_method(hidden):
    with pytest.raises(ConfigError, match=r"unknown pooling 'last'\. "):
        pool(hidden, torch.tensor(SPANS), "last")
    with pytest.raises(ConfigError, match="Did you mean 'weighted_mean'"):
        Pooling.parse("weightedmean")


def test_projection_computes_in_float32():
    head = Projection(D, 3).to(torch.bfloat16)
    pooled = torch.randn(5, D)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = head(pooled)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, pooled @ head.linear.weight.float().T + head.linear.bias.float())


class Backbone(nn.Module):
    """A state per token that depends on the token, its place and its sample's last token; with dropout."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(100, D)
        self.dropout = nn.Dropout(0.5)
        self.frozen_mode = nn.Dropout(0.5).eval()
        self.packs = []

    def forward(self, pack):
        self.packs.append(pack)
        plan = pack.plan
        last = torch.cat([pack.input_ids[end - 1].repeat(n) for end, n in zip(plan.offsets[1:], plan.lengths, strict=True)])
        mixed = self.table(pack.input_ids) + 0.5 * self.table(last) + 0.01 * pack.position_ids[:, None]
        return self.frozen_mode(self.dropout(mixed))


def make_samples(lengths):
    generator = np.random.default_rng(0)
    samples = []
    for index, length in enumerate(lengths):
        ids = generator.integers(100, size=length)
        mask = (0, length) if index % 2 else (0, 0)
        samples.append(Sample(input_ids=ids, stream="s", pool=(length // 3, length), bidirectional=mask))
    return samples


def test_embedding_keeps_the_order_and_each_sample_is_as_alone():
    backbone, samples = Backbone(), make_samples([3, 9, 4, 20, 1, 7, 7, 5])
    samples.append(samples[2])
    done = []
    together = embed_samples(backbone, samples, "mean", token_budget=16, device="cpu", progress=done.append)
    assert all(len(pack) <= 16 or len(pack.samples) == 1 for pack in backbone.packs)
    assert 1 < len(backbone.packs) < len(samples)
    assert sum(done) == len(samples)
    alone = torch.cat([embed_samples(backbone, [s], "mean", token_budget=16, device="cpu") for s in samples])
    torch.testing.assert_close(together, alone)
    assert not together.requires_grad
    assert (together.dtype, together.device.type) == (torch.float32, "cpu")


def test_embedding_restores_the_mode_of_every_module():
    backbone, samples = Backbone(), make_samples([3, 9])
    first = embed_samples(backbone, samples, "mean", token_budget=16, device="cpu")
    assert torch.equal(embed_samples(backbone.forward, samples, "mean", token_budget=16, device="cpu"), first), "no dropout"
    assert (backbone.training, backbone.dropout.training, backbone.frozen_mode.training) == (True, True, False)

    def broken(pack):
        raise RuntimeError("out of memory")

    backbone.forward = broken
    with pytest.raises(RuntimeError):
        embed_samples(backbone, samples, "mean", token_budget=16, device="cpu")
    assert backbone.training


def test_embedding_projects_normalizes_and_takes_nothing():
    backbone, samples = Backbone(), make_samples([3, 9])
    head = Projection(D, 4)
    found = embed_samples(backbone, samples, "cls", token_budget=16, device="cpu", projection=head, normalize=True)
    assert found.shape == (2, 4)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(2))
    assert embed_samples(backbone, [], "mean", token_budget=16, device="cpu").shape == (0, 0)


def test_pack_order_may_differ_from_sample_order():
    """Modes are grouped inside a pack: pool rows must follow."""
    samples = make_samples([4, 4, 4, 4])
    pack = make_pack(samples)
    assert pack.pool_rows != (0, 1, 2, 3)
