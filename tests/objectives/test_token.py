"""Next-token objectives: gathering, normalization over packs, and the optional kernel."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from unified_lm.batch import IGNORE, OutputHead, Sample, make_pack
from unified_lm.batch.normalization import normalize
from unified_lm.config.parts import find_description
from unified_lm.core.errors import ConfigError, ModelError
from unified_lm.objectives import (
    OBJECTIVES,
    ContrastiveConfig,
    MaskedNextTokenConfig,
    NextTokenConfig,
    ObjectiveConfig,
    ObjectiveKind,
    build_objective,
)
from unified_lm.objectives.contrastive import Contrastive
from unified_lm.objectives.cross_entropy import linear_cross_entropy
from unified_lm.objectives.liger import liger_cross_entropy
from unified_lm.objectives.protocol import TokenObjective
from unified_lm.objectives.token import MaskedNextToken, NextToken

V, D = 50, 8


def config(**options):
    return NextTokenConfig(**options)


@pytest.fixture
def samples():
    generator = np.random.default_rng(1)
    made = []
    for length, prompt in ((9, 3), (5, 1), (12, 10), (4, 2)):
        ids = generator.integers(V, size=length)
        labels = ids.copy()
        labels[:prompt] = IGNORE
        made.append(Sample(input_ids=ids, labels=labels, stream="chat"))
    return made


@pytest.fixture
def head():
    return OutputHead(torch.randn(V, D, generator=torch.Generator().manual_seed(0)).requires_grad_())


def states(pack):
    """A stand-in for a backbone: the same state for the same token and place."""
    table = torch.randn(V, D, generator=torch.Generator().manual_seed(2))
    return table[pack.input_ids] + 0.1 * pack.position_ids[:, None]


def total(packs, head, objective):
    return sum(objective(states(pack), head, pack.supervised["chat"]).sum for pack in packs)


def test_predicts_each_label_from_the_state_before_it(samples, head):
    pack = make_pack(samples)
    term = NextToken(config())(states(pack), head, pack.supervised["chat"])
    expected = 0.0
    for sample in samples:
        logits = states(make_pack([sample])) @ head.weight.t()
        expected += F.cross_entropy(logits[:-1], torch.from_numpy(sample.labels)[1:], ignore_index=IGNORE, reduction="sum")
    assert term.sum.item() == pytest.approx(expected.item(), rel=1e-6)
    assert term.count == sum(s.num_supervised for s in samples)


@pytest.mark.parametrize(("scheme", "size"), [("token", None), ("sample", None), ("mixed", 2), ("sum_per_sample", None)])
def test_split_into_packs_changes_neither_loss_nor_gradient(samples, head, scheme, size):
    weighted, count = normalize(samples, scheme, size)
    objective = NextToken(config())
    results = []
    for split in ([weighted], [weighted[:1], weighted[1:]], [[s] for s in reversed(weighted)]):
        loss = total([make_pack(part) for part in split], head, objective) / count
        (gradient,) = torch.autograd.grad(loss, head.weight)
        results.append((loss.detach(), gradient))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-5, atol=1e-6)


def test_mean_of_pack_means_would_differ(samples, head):
    objective = NextToken(config())
    terms = [objective(states(p), head, p.supervised["chat"]) for p in map(make_pack, ([s] for s in samples))]
    naive = sum(t.sum.item() / t.count for t in terms) / len(terms)
    exact = sum(t.sum.item() for t in terms) / sum(t.count for t in terms)
    assert abs(naive - exact) > 1e-3


def test_masked_next_token_reads_the_mask_and_predicts_the_original(samples, head):
    original = samples[0].input_ids
    masked, labels = original.copy(), np.full(len(original), IGNORE)
    masked[4], labels[4] = 7, original[4]
    pack = make_pack([replace(samples[0], input_ids=masked, labels=labels, bidirectional=(0, len(masked)))])
    hidden = states(pack)
    term = MaskedNextToken(config())(hidden, head, pack.supervised["chat"])
    expected = F.cross_entropy(hidden[3:4] @ head.weight.t(), torch.tensor([original[4]]))
    assert term.sum.item() == pytest.approx(expected.item(), rel=1e-6)


def test_names_build_objectives():
    objective = build_objective(config())
    assert isinstance(objective, TokenObjective)
    assert config().kind is ObjectiveKind.TOKEN
    assert type(build_objective(MaskedNextTokenConfig())) is MaskedNextToken
    dotted = replace(config(), name="unified_lm.objectives.token.NextToken")
    assert type(build_objective(dotted)) is NextToken
    assert ContrastiveConfig.kind is ObjectiveKind.EMBEDDING
    assert type(build_objective(ContrastiveConfig())) is Contrastive


def test_bad_names():
    with pytest.raises(ConfigError, match=r"unknown objective 'next_tokens'\. Did you mean 'next_token'"):
        build_objective(replace(config(), name="next_tokens"))
    with pytest.raises(ConfigError, match=r"'collections\.OrderedDict' is no objective that can be used: its class attribute"):
        find_description("collections.OrderedDict", OBJECTIVES, ObjectiveConfig)
    with pytest.raises(ConfigError, match=r"unknown cross_entropy 'chunk'\. Did you mean 'chunked'"):
        NextToken(config(cross_entropy="chunk"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for what is not there")
def test_liger_without_cuda_is_refused():
    with pytest.raises(ModelError, match="needs a CUDA device"):
        NextToken(config(cross_entropy="liger"))


def fake_liger(hidden, weight, target, bias=None, reduction="mean", softcap=None):
    """The documented meaning of Liger's arguments, on full logits."""
    logits = F.linear(hidden, weight, bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, target, reduction=reduction)


def test_liger_gets_scale_cap_and_weights_right(samples):
    weight = torch.randn(V, D, requires_grad=True)
    head = OutputHead(weight, torch.randn(V), scale=0.5, softcap=3.0)
    pack = make_pack(normalize(samples, "sample")[0])
    part = pack.supervised["chat"]
    hidden = states(pack)[part.positions]
    expected = linear_cross_entropy(hidden, head, part.targets, part.weights)
    found = liger_cross_entropy(fake_liger, hidden, head, part.targets, part.weights)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(found, weight), torch.autograd.grad(expected, weight), rtol=1e-4, atol=1e-5)
