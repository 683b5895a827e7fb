"""Law 3 across processes: two ranks under gloo take the gradient that one process takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.engine.tiny import WEIGHTS, embedding_terms, make_samples, make_trainable
from tests.processes import run_on_ranks
from unified_lm.batch import make_batch
from unified_lm.config.schema import OptimConfig
from unified_lm.core import distributed
from unified_lm.engine.backends.backend import TorchBackend
from unified_lm.engine.step import GradCacheStep


def step(rank: int, ranks: int, budget: int) -> tuple[float, dict[str, torch.Tensor]]:
    """One rank's part of a step; an uneven deal on purpose. Returns the loss and the gradients after the reduction."""
    trainable = make_trainable()
    backend = TorchBackend(trainable, OptimConfig())
    samples, counts = make_samples()
    shares = {1: [lambda s: True], 2: [lambda s: s.group < 2, lambda s: s.group >= 2]}
    batch = make_batch([s for s in samples if shares[ranks][rank](s)], budget, counts)
    losses = GradCacheStep(backend.forward, backend.backward, WEIGHTS, embedding_terms())(batch)
    if ranks > 1:
        backend.optimizer.sum_gradients()
    return losses.total, {name: master.grad for name, master in backend.optimizer.masters.items()}


def work() -> dict[str, Any]:
    loss, gradients = step(distributed.rank(), 2, 60)
    return {"loss": loss, "gradients": gradients}


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_two_ranks_equal_one_process(tmp_path):
    loss, expected = step(0, 1, 10_000)
    for result in run_on_ranks(work, 2, tmp_path):
        assert result["loss"] == pytest.approx(loss, rel=1e-6)
        difference = sum((result["gradients"][n] - expected[n]).double().square().sum() for n in expected)
        norm = sum(g.double().square().sum() for g in expected.values())
        assert float((difference / norm).sqrt()) < 1e-6
