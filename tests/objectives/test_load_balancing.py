"""Load balancing against transformers, and over packs."""

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from unified_lm.objectives.load_balancing import expert_fraction, load_balancing, route

LAYERS, T, E, TOP_K = 3, 24, 8, 2


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    return tuple((3 * torch.randn(T, E, generator=generator)).requires_grad_() for _ in range(LAYERS))


def loss(logits, positions) -> tuple[torch.Tensor, float]:
    """Over some tokens alone: the loss, and what its sum was divided by."""
    routing = route(logits, TOP_K, positions)
    fraction, rows = expert_fraction(routing.load, TOP_K)
    return load_balancing(routing.probability, fraction) / max(rows, 1.0), rows


@pytest.mark.parametrize("masked", [False, True])
def test_equals_transformers(logits, masked):
    mask = torch.arange(T) % 3 != 0 if masked else torch.ones(T, dtype=torch.bool)
    value, rows = loss(logits, mask.nonzero().flatten())
    expected = load_balancing_loss_func(logits, E, TOP_K, mask[None].long() if masked else None)
    assert rows == LAYERS * int(mask.sum())
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(value, logits), torch.autograd.grad(expected, logits))


def test_perfect_balance_gives_the_number_of_chosen_experts():
    eye = 20.0 * (torch.eye(E) + torch.eye(E).roll(1, 1))
    assert loss([eye], torch.arange(E))[0].item() == pytest.approx(TOP_K, rel=1e-4)
    assert loss([eye[:1].expand(E, E)], torch.arange(E))[0].item() == pytest.approx(E, rel=1e-4)


def test_a_known_fraction_makes_packs_additive(logits):
    whole = route(logits, TOP_K, torch.arange(T))
    fraction, _ = expert_fraction(whole.load, TOP_K)
    parts = [route(logits, TOP_K, torch.arange(start, stop)) for start, stop in ((0, 5), (5, T))]
    torch.testing.assert_close(sum(part.load for part in parts), whole.load)
    split = sum(load_balancing(part.probability, fraction) for part in parts)
    torch.testing.assert_close(split, load_balancing(whole.probability, fraction))
    own = sum(load_balancing(part.probability, expert_fraction(part.load, TOP_K)[0]) for part in parts)
    assert abs(own - split) > 1e-3


def test_halves_are_computed_in_float32(logits):
    half = route([layer.bfloat16() for layer in logits], TOP_K, torch.arange(T))
    assert half.load.dtype == half.probability.dtype == torch.float32
    assert route([layer.double() for layer in logits], TOP_K, torch.arange(T)).probability.dtype == torch.float64


def test_nothing_counts(logits):
    value, rows = loss(logits, torch.zeros(0, dtype=torch.int64))
    assert (value.item(), rows) == (0.0, 0.0)
    assert all(not gradient.any() for gradient in torch.autograd.grad(value, logits))
