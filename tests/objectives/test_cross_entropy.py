"""Chunked linear cross-entropy against PyTorch's on full logits."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from unified_lm.batch import OutputHead
from unified_lm.objectives import cross_entropy
from unified_lm.objectives.cross_entropy import linear_cross_entropy, token_losses

N, D, V = 37, 16, 1000
SMALL = 4 * N * 300
"""Tile bytes that make four tiles of columns, or eleven rows a tile."""


def problem(dtype=torch.float32, bias=False, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator) * scale).to(dtype).requires_grad_()

    targets = torch.randint(V, (N,), generator=generator)
    targets[:4] = torch.tensor([0, V - 1, 299, 300])  # tile edges
    weights = torch.rand(N, generator=generator)
    return draw(N, D), draw(V, D, scale=0.5), draw(V) if bias else None, targets, weights


def reference(hidden, weight, bias, targets, weights, scale=1.0, softcap=None):
    logits = hidden @ weight.t()
    logits = (logits if bias is None else logits + bias).to(torch.promote_types(hidden.dtype, torch.float32)) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return (F.cross_entropy(logits, targets, reduction="none") * weights).sum()


def gradients(function, tensors):
    loss = function()
    (loss * 0.37).backward()  # an upstream factor, as the engine's weight / count
    found = [tensor.grad for tensor in tensors]
    for tensor in tensors:
        tensor.grad = None
    return loss.detach(), found


@pytest.mark.parametrize("tile_bytes", [SMALL, 4 * V, 2**30])
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize(
    ("bias", "scale", "softcap"), [(False, 1.0, None), (True, 1.0, None), (True, 0.25, None), (False, 2.0, 5.0)]
)
def test_equals_full_logits(tile_bytes, trained, bias, scale, softcap):
    hidden, weight, offset, targets, weights = problem(bias=bias)
    learned = [t for t in (weight, offset) if t is not None]
    for tensor in learned:
        tensor.requires_grad_(trained)
    tensors = [hidden, *(learned if trained else [])]
    head = OutputHead(weight, offset, scale, softcap)
    expected, expected_gradients = gradients(
        lambda: reference(hidden, weight, offset, targets, weights, scale, softcap), tensors
    )
    loss, found = gradients(lambda: linear_cross_entropy(hidden, head, targets, weights, tile_bytes=tile_bytes), tensors)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for ours, theirs in zip(found, expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_float64_is_exact():
    hidden, weight, _, targets, weights = problem(torch.float64)
    expected, theirs = gradients(lambda: reference(hidden, weight, None, targets, weights), [hidden, weight])
    head = OutputHead(weight)
    loss, ours = gradients(lambda: linear_cross_entropy(hidden, head, targets, weights, tile_bytes=SMALL), [hidden, weight])
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("trained", [True, False])
def test_bfloat16_has_the_error_of_its_matrix_products_only(trained):
    hidden, weight, _, targets, weights = problem(torch.bfloat16)
    weight.requires_grad_(trained)
    tensors = [hidden, weight] if trained else [hidden]
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    expected, theirs = gradients(lambda: reference(*exact, None, targets, weights), exact)
    loss, ours = gradients(
        lambda: linear_cross_entropy(hidden, OutputHead(weight), targets, weights, tile_bytes=SMALL), tensors
    )
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=2e-3)
    for a, b in zip(ours, theirs, strict=False):
        assert a.dtype == torch.bfloat16
        assert (a.double() - b).norm() / b.norm() < 6e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 5, 11])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_slices_of_a_tile_change_nothing(monkeypatch, dtype, rows, softcap):
    hidden, weight, bias, targets, weights = problem(dtype, bias=True)
    head = OutputHead(weight.requires_grad_(False), bias.requires_grad_(False), 1.0, softcap)

    def loss_and_gradient():
        losses, correct = token_losses(hidden, head, targets, tile_bytes=dtype.itemsize * V * 11)  # eleven rows a tile
        return losses, correct, torch.autograd.grad((losses * weights).sum(), hidden)[0]

    whole = loss_and_gradient()
    monkeypatch.setattr(cross_entropy, "_CACHED_BYTES", 4 * V * rows)
    sliced = loss_and_gradient()
    assert all(torch.equal(a, b) for a, b in zip(whole, sliced, strict=True))


def test_streams_that_share_a_head_add_their_gradients():
    hidden, weight, _, targets, weights = problem()
    head = OutputHead(weight)

    def halves():
        first = linear_cross_entropy(hidden[:20], head, targets[:20], weights[:20], tile_bytes=SMALL)
        return first + linear_cross_entropy(hidden[20:], head, targets[20:], weights[20:], tile_bytes=SMALL)

    whole = gradients(lambda: linear_cross_entropy(hidden, head, targets, weights), [hidden, weight])
    split = gradients(halves, [hidden, weight])
    torch.testing.assert_close(split, whole, rtol=1e-5, atol=1e-6)


def test_backward_twice_gives_the_same():
    hidden, weight, _, targets, weights = problem()
    for tile_bytes in (SMALL, 2**30):
        loss = linear_cross_entropy(hidden, OutputHead(weight), targets, weights, tile_bytes=tile_bytes)
        first = torch.autograd.grad(loss, [hidden, weight], retain_graph=True)
        torch.testing.assert_close(torch.autograd.grad(loss, [hidden, weight]), first, rtol=0, atol=0)


def test_losses_of_positions_may_be_used_nonlinearly():
    hidden, weight, _, targets, _ = problem(torch.float64)
    logits = hidden @ weight.t()
    expected = torch.autograd.grad(F.cross_entropy(logits, targets, reduction="none").sigmoid().sum(), [hidden, weight])
    found = token_losses(hidden, OutputHead(weight), targets, tile_bytes=SMALL).losses.sigmoid().sum()
    torch.testing.assert_close(torch.autograd.grad(found, [hidden, weight]), expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("trained", [True, False])
def test_correct_counts_the_most_likely_tokens(trained):
    hidden, weight, _, targets, _ = problem()
    best = (hidden @ weight.t()).argmax(1)
    targets[:10] = best[:10]
    weight.requires_grad_(trained)
    correct = token_losses(hidden, OutputHead(weight), targets, tile_bytes=SMALL).correct
    assert not correct.requires_grad
    torch.testing.assert_close(correct, best == targets)
    assert correct[:10].all()
    assert not correct.all()


@pytest.mark.parametrize("trained", [True, False])
def test_softmax_stays_in_float32_under_autocast(trained):
    hidden, weight, _, targets, weights = problem()
    weight.requires_grad_(trained)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(hidden, OutputHead(weight), targets, weights, tile_bytes=SMALL)
        loss.backward()
    assert loss.dtype == torch.float32
    assert hidden.grad.dtype == torch.float32
    expected = reference(hidden.bfloat16(), weight.bfloat16(), None, targets, weights)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


def test_no_positions_and_no_gradients():
    hidden, weight, _, targets, weights = problem()
    empty = linear_cross_entropy(hidden[:0], OutputHead(weight), targets[:0], weights[:0])
    assert empty.item() == 0.0
    empty.backward()
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, OutputHead(weight), targets, weights)
    assert not loss.requires_grad


def test_frozen_head_gets_no_gradient_and_none_is_computed():
    hidden, weight, _, targets, weights = problem()
    weight.requires_grad_(False)
    linear_cross_entropy(hidden, OutputHead(weight), targets, weights).backward()
    assert weight.grad is None
    assert hidden.grad is not None


class LargestTensor(TorchDispatchMode):
    """Remembers the elements of the largest tensor that any operation made."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return result


@pytest.mark.parametrize("trained", [True, False])
def test_full_logits_never_exist(trained):
    hidden, weight, _, targets, weights = problem()
    weight.requires_grad_(trained)
    with LargestTensor() as ours:
        linear_cross_entropy(hidden, OutputHead(weight), targets, weights, tile_bytes=SMALL).backward()
    with LargestTensor() as full:
        reference(hidden, weight, None, targets, weights).backward()
    assert ours.elements <= max(V * D, N * 300)
    assert full.elements == N * V
