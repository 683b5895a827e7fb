"""Load balancing against transformers, and over packs."""

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from unified_lm.objectives.balance import expert_load, load_balancing

LAYERS, T, E, TOP_K = 3, 24, 8, 2


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    return tuple((3 * torch.randn(T, E, generator=generator)).requires_grad_() for _ in range(LAYERS))


@pytest.mark.parametrize("masked", [False, True])
def test_equals_transformers(logits, masked):
    mask = torch.arange(T) % 3 != 0 if masked else None
    term = load_balancing(logits, TOP_K, mask)
    expected = load_balancing_loss_func(logits, E, TOP_K, None if mask is None else mask[None].long())
    assert term.count == (T if mask is None else int(mask.sum()))
    torch.testing.assert_close(term.sum / term.count, expected)
    ours = torch.autograd.grad(term.sum / term.count, logits)
    torch.testing.assert_close(ours, torch.autograd.grad(expected, logits))


def test_perfect_balance_gives_the_number_of_chosen_experts():
    eye = 20.0 * (torch.eye(E) + torch.eye(E).roll(1, 1))
    term = load_balancing([eye], TOP_K)
    assert (term.sum / term.count).item() == pytest.approx(TOP_K, rel=1e-4)
    collapsed = load_balancing([eye[:1].expand(E, E)], TOP_K)
    assert (collapsed.sum / collapsed.count).item() == pytest.approx(E, rel=1e-4)


def test_known_share_makes_packs_additive(logits):
    share = expert_load(logits, TOP_K) / (T * LAYERS)
    whole = load_balancing(logits, TOP_K, share=share)
    parts = [[layer[at] for layer in logits] for at in (slice(0, 5), slice(5, T))]
    split = sum(load_balancing(part, TOP_K, share=share).sum for part in parts)
    torch.testing.assert_close(split, whole.sum)
    own = sum(load_balancing(part, TOP_K).sum for part in parts)
    assert abs(own - whole.sum) > 1e-3


def test_nothing_counts(logits):
    term = load_balancing(logits, TOP_K, torch.zeros(T, dtype=torch.bool))
    assert (term.sum.item(), term.count) == (0.0, 0.0)
