import math

import pytest
import torch
from torch import nn

from tests.engine.exactness import SavedState
from tests.engine.tiny import make_trainable
from unified_lm.config.schema import OptimConfig
from unified_lm.core.errors import CheckpointError
from unified_lm.engine.backends.backend import TorchBackend
from unified_lm.engine.backends.optimizer import MasterAdamW


def linear(dtype: torch.dtype) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(6, 4).to(dtype)


def train(module: nn.Module, optimizer: MasterAdamW, steps: int, scale: float = 1.0) -> None:
    for step in range(steps):
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(step)).to(next(module.parameters()).dtype)
        (module(x).square().mean() * scale).backward()
        optimizer.step(1e-5)
        optimizer.zero_grad()


def test_master_weights_keep_updates_that_bfloat16_loses():
    module = linear(torch.bfloat16)
    before = module.weight.detach().clone()
    optimizer = MasterAdamW(module.named_parameters(), OptimConfig())
    train(module, optimizer, 1)
    assert (module.weight == before).float().mean() > 0.5, "one step of 1e-5 is below what most bfloat16 weights can show"
    assert (optimizer.masters["weight"] != before.float()).all()
    train(module, optimizer, 400)
    assert (module.weight != before).float().mean() > 0.9, "but the steps add up in the master weights"


def test_gradients_of_several_backwards_add_up_in_float32():
    module = linear(torch.bfloat16)
    optimizer = MasterAdamW(module.named_parameters(), OptimConfig())
    x = torch.ones(1, 6, dtype=torch.bfloat16)
    for _ in range(300):
        module(x).sum().backward()
    gradient = optimizer.masters["bias"].grad
    assert gradient is not None
    assert gradient.dtype == torch.float32
    assert torch.equal(gradient, torch.full((4,), 300.0)), "in bfloat16 a sum of ones stops at 256"
    assert module.bias.grad is None


def test_clip_returns_the_norm_before_and_bounds_it_after():
    module = linear(torch.float32)
    optimizer = MasterAdamW(module.named_parameters(), OptimConfig())
    (module(torch.ones(1, 6)).sum() * 100).backward()
    norm = optimizer.norm()
    optimizer.clip(1.0, norm)
    assert norm > 100
    assert torch.nn.utils.get_total_norm(list(optimizer.gradients())).item() <= 1.0 + 1e-5
    optimizer.clip(0.0, optimizer.norm())
    assert optimizer.norm() <= 1.0 + 1e-5, "0 leaves gradients alone"


def test_state_restores_bit_for_bit():
    first = linear(torch.bfloat16)
    optimizer = MasterAdamW(first.named_parameters(), OptimConfig())
    train(first, optimizer, 3)
    saved = {name: t.clone() for name, t in optimizer.state_dict().items()}
    train(first, optimizer, 3)

    second = linear(torch.bfloat16)
    resumed = MasterAdamW(second.named_parameters(), OptimConfig())
    resumed.load_state(SavedState(saved))
    train(second, resumed, 3)
    assert torch.equal(resumed.masters["weight"], optimizer.masters["weight"])
    assert torch.equal(first.weight, second.weight)


def test_decay_spares_vectors():
    module = linear(torch.float32)
    optimizer = MasterAdamW(module.named_parameters(), OptimConfig(weight_decay=0.5))
    bias, weight = module.bias.detach().clone(), module.weight.detach().clone()
    optimizer.step(0.1)
    assert torch.equal(module.bias, bias)
    assert torch.allclose(module.weight, weight * 0.95)


def test_a_state_of_other_parameters_is_refused():
    optimizer = MasterAdamW(linear(torch.float32).named_parameters(), OptimConfig())
    saved = optimizer.state_dict()
    without = {name: value for name, value in saved.items() if name != "weight/bias"}
    with pytest.raises(CheckpointError, match="1 tensors are missing"):
        optimizer.load_state(SavedState(without))
    with pytest.raises(CheckpointError, match="1 belong to no trained parameter"):
        optimizer.load_state(SavedState(saved | {"weight/other": torch.zeros(1)}))
    with pytest.raises(CheckpointError, match=r"weight/weight has shape \[2, 3\], expected \[4, 6\]"):
        optimizer.load_state(SavedState(saved | {"weight/weight": torch.zeros(2, 3)}))


def test_a_gradient_that_is_not_finite_leaves_weights_and_moments():
    trainable = make_trainable()
    backend = TorchBackend(trainable, OptimConfig())
    for gradient in backend.optimizer.gradients():
        gradient.fill_(0.1)
    assert 0 < backend.update(1e-3, 1.0) < math.inf
    before = {name: t.clone() for name, t in backend.optimizer_state()}
    for poison in (math.nan, math.inf):
        next(backend.optimizer.gradients()).view(-1)[0] = poison
        assert not math.isfinite(backend.update(1e-3, 1.0))
        assert all(torch.equal(before[name], t) for name, t in backend.optimizer_state())
        assert all((gradient == 0).all() for gradient in backend.optimizer.gradients())
