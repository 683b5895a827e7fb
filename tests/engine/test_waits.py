"""A step waits for the device where it must, never once a pack: a queue that runs dry is time in which a GPU does nothing.

What would wait on a GPU is found on the CPU by its operators: those whose result the host needs before it can go on. Copies
to the device are not seen here (a CPU has none); tables that are built on the host are excepted, since they wait for nothing.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.engine.tiny import CONTRASTIVE, WEIGHTS, make_samples, make_trainable
from unified_lm.batch import make_batch
from unified_lm.config.schema import OptimConfig
from unified_lm.engine.backends.backend import TorchBackend
from unified_lm.engine.embedding_term import EmbeddingTerm
from unified_lm.engine.step import GradCacheStep
from unified_lm.models.attention import sdpa
from unified_lm.models.pooling import Pooling
from unified_lm.objectives import build_objective

WAITING = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::equal",
    "aten::_unique2",
    "aten::unique_dim",
}
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}


class Waits(TorchDispatchMode):
    """Collects the places of this project that wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []
        self.paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func._schema.name, kwargs or {}
        waits = name in WAITING
        if name in INDEXING:
            waits = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        if name == "aten::repeat_interleave":
            waits = kwargs.get("output_size") is None
        if waits and not self.paused:
            stack = [frame for frame in traceback.extract_stack() if "/unified_lm/" in frame.filename]
            self.places.append(f"{name} at {stack[-1].name if stack else '?'}")
        return func(*args, **kwargs)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Waits:
    found, build = Waits(), sdpa.build_layout

    def on_the_host(*args: Any) -> Any:
        found.paused = True
        try:
            return build(*args)
        finally:
            found.paused = False

    monkeypatch.setattr(sdpa, "build_layout", on_the_host)
    return found


def make_step(pooling: str) -> tuple[TorchBackend, GradCacheStep]:
    trainable = make_trainable().train()
    trainable.pooling = Pooling.parse(pooling)
    backend = TorchBackend(trainable, OptimConfig())
    terms = [EmbeddingTerm({"embedding": build_objective(CONTRASTIVE)}, WEIGHTS)]
    return backend, GradCacheStep(backend.forward, backend.backward, WEIGHTS, terms)


def waits_of(waits: Waits, backend: TorchBackend, step: GradCacheStep, budget: int) -> tuple[int, list[str]]:
    samples, counts = make_samples(num_groups=12, num_chats=12)
    batch = make_batch(samples, budget, counts)
    waits.places = []
    with waits:
        step(batch)
        backend.update(1e-3, 1.0)
    return len(batch.packs), list(waits.places)


@pytest.mark.parametrize("pooling", [kind.value for kind in Pooling])
def test_the_number_of_waits_does_not_grow_with_the_packs(pooling: str, waits: Waits) -> None:
    backend, step = make_step(pooling)
    waits_of(waits, backend, step, 200)  # whatever is made once
    few, expected = waits_of(waits, backend, step, 200)
    many, found = waits_of(waits, backend, step, 30)
    assert many > 3 * few > 0
    assert found == expected, "a place waits once a pack"
    # Coupling (loss, three numbers, texts, missing negatives), the token loss, and the gradient's norm.
    assert len(found) <= 7, found


def test_no_forward_or_backward_waits(waits: Waits) -> None:
    backend, step = make_step("mean")
    inside: list[str] = []

    def watched(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            before = len(waits.places)
            result = call(*args, **kwargs)
            inside.extend(waits.places[before:])
            return result

        return run

    step.forward, step.backward = watched(step.forward), watched(step.backward)
    _, everywhere = waits_of(waits, backend, step, 40)
    assert everywhere, "nothing is counted"
    assert inside == []


def test_a_wait_is_seen(waits: Waits) -> None:
    """Each of these is one on a GPU."""
    value = torch.arange(6)
    with waits:
        float(value[0])
        value[value > 2]
        torch.repeat_interleave(value, value)
        torch.repeat_interleave(value, value, output_size=15)
        value.unique()
    assert len(waits.places) == 4


def test_the_objective_reads_its_numbers_at_once(waits: Waits) -> None:
    objective = build_objective(CONTRASTIVE)
    objective(torch.randn(4, 2, 8), torch.arange(1, 9).reshape(4, 2))
    with waits:
        numbers = objective.metrics
    assert set(numbers) == {"accuracy", "positive_similarity", "negative_similarity"}
    assert waits.places == []  # one copy of all, not one of each
