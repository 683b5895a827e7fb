"""Laws 3 and 4 across processes and backends: DDP and ZeRO take the steps that one process takes.

Each group of processes is started once and runs all its cases; importing torch and DeepSpeed takes longer than the cases.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from tests.engine.exactness import (
    KINDS,
    MANY_PACKS,
    ONE_PACK,
    RATE,
    Case,
    SavedState,
    State,
    copy_state,
    distance,
    held_bytes,
    make_step,
    run,
    share,
    start,
)
from tests.processes import any_slow, run_on_ranks
from unified_lm.composition.compose import compose_run
from unified_lm.config.schema import ModelConfig, ParallelConfig
from unified_lm.core import distributed
from unified_lm.core.errors import ConfigError
from unified_lm.engine.accounting.estimate import estimate
from unified_lm.engine.backends.deepspeed import ZeroSharding
from unified_lm.models import sharded as models_sharded
from unified_lm.models.loading import load_model
from unified_lm.models.sharded import load_sharded
from unified_lm.models.tiny import tiny_tokenizer

ZERO = ("zero1", "zero2", "zero3")
STEPS = {"grit": 5}
"""Of a kind's cases; two of the others, since the first step's update shows in the second one's gradient."""

EXACT = [
    Case(backend, kind, budget, steps=STEPS.get(kind, 2))
    for kind in KINDS
    for backend in ("ddp", *ZERO)
    for budget in (ONE_PACK, MANY_PACKS)
] + [Case("zero0", "grit", MANY_PACKS)]
PARTS = [
    Case(backend, "grit", MANY_PACKS, family, projection=projection, steps=2)
    for backend in ("zero2", "zero3")
    for family, projection in (("llama", 8), ("mixtral", None))
]
DIRECT = Case("ddp", "grit", MANY_PACKS, dropout=0.3, retain_all=True, steps=2)
CACHED = [Case(backend, "grit", MANY_PACKS, dropout=0.3, steps=2) for backend in ZERO]
WIDE = [  # float32 parameters beside bfloat16 ones: a projection, and routers
    Case(backend, "grit", MANY_PACKS, "mixtral", dtype="bfloat16", projection=8, float32_routers=True)
    for backend in ("ddp", *ZERO)
]
HELD = [Case(backend, "grit", MANY_PACKS, dtype=dtype) for backend in ZERO for dtype in ("float32", "bfloat16")] + [
    Case("zero0", "grit", MANY_PACKS)
]
AVERAGED = Case("ddp", "mntp", averaged=True, steps=2)
MOVES = (("zero2", "zero3"), ("zero3", "zero1"), ("ddp", "zero2"))

Results = dict[Any, Any]


def is_fast(case: Any) -> bool:
    """Whether a case is among the fast tests: each kind across ranks, and each backend with each thing that may go wrong there.

    All combinations take three minutes of two cores; they are among the slow tests.
    """
    if case in EXACT:
        at_its_own = {"ddp": KINDS, "zero0": ("grit",), "zero2": ("grit",), "zero3": ("simcse",)}
        return case.budget == MANY_PACKS and case.kind in at_its_own.get(case.backend, ())
    if case in PARTS:
        return (case.backend, case.family) in (("zero3", "llama"), ("zero2", "mixtral"))
    if case in HELD:
        return (case.backend, case.dtype) in (("zero1", "bfloat16"), ("zero3", "float32"))
    if case in CACHED:
        return case.backend == "zero3"
    if case in WIDE:
        return case.backend in ("ddp", "zero1")  # under ZeRO-3 in "resumed wide", from ZeRO-1, where a state moves, too
    return case in ("ddp", "zero3")


def marked(cases: Iterable[Any]) -> list[Any]:
    return [pytest.param(case, marks=[] if is_fast(case) else pytest.mark.slow) for case in cases]


def two_processes(all_cases: bool) -> Results:
    def some(cases: Iterable[Any]) -> list[Any]:
        return [case for case in cases if all_cases or is_fast(case)]

    results: Results = {case: run(case) for case in (*some((*EXACT, *PARTS, *CACHED, *WIDE)), DIRECT, AVERAGED)}
    backends = ("ddp", "zero0", *ZERO)
    results |= {("poisoned", backend): poisoned(Case(backend, "grit", MANY_PACKS)) for backend in some(backends)}
    results |= {("poisoned", case): poisoned(case, "projection.linear.weight") for case in some(WIDE[1:])}
    results |= {("resumed", *names): resumed(Case("single", "grit", MANY_PACKS), *names) for names in some(MOVES)}
    results |= {("resumed wide", *names): resumed(WIDE[0], *names) for names in [("zero1", "zero3")]}
    results |= {("held", case): held_bytes(case) for case in some(HELD)}
    return results


def poisoned(case: Case, parameter: str | None = None) -> tuple[float, float, float]:
    """A step, one with a NaN on the last rank only, another good one: the norm, the change of the state, and the norm after.

    The NaN is in the loss, or in the gradient of a named parameter.
    """
    backend = start(case)
    step = make_step(case, backend)
    step(share(case, 0))
    backend.update(RATE, 1.0)
    before = copy_state(backend)
    good = backend.backward
    factor = math.nan if distributed.rank() == distributed.world_size() - 1 else 1.0
    if parameter is None:
        step.backward = lambda loss: good(loss * factor)
    step(share(case, 1))
    if parameter is not None:
        backend.trainable.get_parameter(parameter).grad.mul_(factor)  # type: ignore[attr-defined]
    norm = backend.update(RATE, 1.0)
    after = copy_state(backend)
    change = max(float((after[name] - before[name]).abs().max()) for name in before)
    step.backward = good
    step(share(case, 1))
    recovered = backend.update(RATE, 1.0)
    backend.close()
    return norm, change, recovered


def resumed(case: Case, first: str, second: str) -> State:
    """Three steps under one backend, then two under another that starts from the first one's state."""
    case = replace(case, backend=first)
    backend = start(case)
    step = make_step(case, backend)
    for index in range(3):
        step(share(case, index))
        backend.update(RATE, 0.0 if index == 0 else 1.0)
    saved = copy_state(backend)
    backend.close()
    case = replace(case, backend=second)
    backend = start(case)
    source = SavedState(saved)
    backend.load_optimizer_state(source)
    if second.startswith("zero"):
        share_read = source.num_read / sum(value.numel() for value in saved.values())
        assert share_read < 0.6, f"one of two ranks read {share_read:.0%} of a state of which it keeps half"
    reread = copy_state(backend)
    assert reread.keys() == saved.keys()
    assert all(torch.equal(reread[name], saved[name]) for name in saved), "the state changed on its way"
    step = make_step(case, backend)
    for index in range(3, 5):
        step(share(case, index))
        backend.update(RATE, 1.0)
    result = copy_state(backend)
    backend.close()
    return result


def four_processes() -> Results:
    return {case: run(case) for case in EXACT if case.backend == "ddp" and case.budget == MANY_PACKS}


@pytest.fixture(scope="module")
def alone() -> dict[tuple[str, str, int | None], State]:
    """One process, one pack, by kind, family and projection."""
    cases = [Case("single", kind, steps=STEPS.get(kind, 2)) for kind in KINDS] + [
        Case("single", "grit", family=case.family, projection=case.projection, steps=2) for case in PARTS
    ]
    return {(case.kind, case.family, case.projection): run(case) for case in cases}


@pytest.fixture(scope="module")
def together(request, tmp_path_factory) -> Results:
    pytest.importorskip("deepspeed")
    return run_on_ranks(partial(two_processes, any_slow(request)), 2, tmp_path_factory.mktemp("two"))[0]


def assert_same_steps(result: State, expected: State) -> None:
    assert distance(result, expected, "gradient/") < 1e-6
    assert distance(result, expected, "weight/") < 1e-5
    assert distance(result, expected, "exp_avg") < 1e-5
    assert result["loss"].tolist() == pytest.approx(expected["loss"].tolist(), rel=1e-6, abs=1e-6)
    assert result["norm"].tolist() == pytest.approx(expected["norm"].tolist(), rel=1e-5)


@pytest.mark.parametrize(
    "case", marked([*EXACT, *PARTS]), ids=lambda c: f"{c.kind}-{c.backend}-{c.budget}-{c.family}-{c.projection}"
)
def test_two_processes_take_the_steps_of_one(alone, together, case):
    """Law 3."""
    assert_same_steps(together[case], alone[case.kind, case.family, case.projection])


def test_four_processes_take_the_steps_of_one(alone, tmp_path):
    """Law 3."""
    for case, result in run_on_ranks(four_processes, 4, tmp_path)[0].items():
        assert_same_steps(result, alone[case.kind, case.family, case.projection])


def test_a_mean_per_rank_would_be_wrong(alone, together):
    """The tests above can fail: every rank divides by its own tokens, and gradients are averaged."""
    assert distance(together[AVERAGED], alone["mntp", "llama", None], "gradient/") > 1e-3


@pytest.mark.parametrize("case", marked(CACHED), ids=lambda c: c.backend)
def test_gradcache_under_zero_equals_direct_gradients(together, case):
    """Law 4, with dropout."""
    assert distance(together[case], together[DIRECT], "gradient/") < 1e-6
    assert distance(together[case], together[DIRECT], "weight/") < 1e-5


def test_dropout_was_on(together, alone):
    assert distance(together[DIRECT], alone["grit", "llama", None], "gradient/") > 1e-2


@pytest.mark.parametrize("case", marked(WIDE[1:]), ids=lambda c: c.backend)
def test_bfloat16_weights_have_float32_masters_and_float32_parameters_stay_so(together, case):
    """All backends round at the same places: weights after every update, each pack's gradients, and no float32 parameter."""
    result, expected = together[case], together[replace(case, backend="ddp")]
    assert distance(result, expected, "gradient/") < 1e-6
    assert distance(result, expected, "weight/") < 1e-5
    assert result["loss"].tolist() == pytest.approx(expected["loss"].tolist(), rel=1e-6)
    assert result["norm"].tolist() == pytest.approx(expected["norm"].tolist(), rel=1e-5)
    change = {name: t - expected[name].bfloat16().float() for name, t in result.items() if "weight/" in name}
    assert all(value.any() for name, value in change.items() if name.endswith("proj.weight")), (
        "masters carry more than bfloat16"
    )
    own = [name for name in expected if name.startswith("weight/") and ("projection" in name or "mlp.gate" in name)]
    assert len(own) == 4
    for name in own:
        assert not torch.equal(expected[name], expected[name].bfloat16().float())
        torch.testing.assert_close(result[name], expected[name], rtol=1e-5, atol=1e-7)


def test_float32_parameters_move_between_backends(together):
    assert distance(together["resumed wide", "zero1", "zero3"], together[WIDE[0]], "weight/") < 1e-5
    assert distance(together["resumed wide", "zero1", "zero3"], together[WIDE[0]], "exp_avg_sq/") < 1e-4


@pytest.mark.parametrize("case", marked(WIDE[1:]), ids=lambda c: c.backend)
def test_a_float32_gradient_that_is_not_finite_changes_nothing(together, case):
    norm, change, recovered = together["poisoned", case]
    assert not math.isfinite(norm)
    assert change == 0
    assert math.isfinite(recovered)


@pytest.mark.parametrize("backend", marked(["ddp", "zero0", *ZERO]))
def test_a_gradient_that_is_not_finite_on_one_rank_changes_nothing_on_any(together, backend):
    norm, change, recovered = together["poisoned", backend]
    assert not math.isfinite(norm)
    assert change == 0
    assert math.isfinite(recovered)


@pytest.mark.parametrize("names", marked(MOVES), ids="->".join)
def test_state_moves_between_backends(together, alone, names):
    assert distance(together[("resumed", *names)], alone["grit", "llama", None], "weight/") < 1e-5
    assert distance(together[("resumed", *names)], alone["grit", "llama", None], "exp_avg_sq/") < 1e-5


@pytest.mark.parametrize("case", marked(HELD), ids=lambda c: f"{c.backend}-{c.dtype}")
def test_the_estimator_knows_what_deepspeed_holds(together, case):
    config = compose_run(
        [
            "recipe=grit_mistral7b",
            "model=tiny_random",
            "model.family=llama",
            f"model.dtype={case.dtype}",
            f"parallel={case.backend}",
            "parallel.persistence_threshold=0",
        ]
    )
    estimated = estimate(config, world_size=2).bytes_by_part
    held = together[("held", case)]
    for part, size in held.items():
        transient = 2 * 64 * len(tiny_tokenizer()) if part == "gradients" and case.dtype == "bfloat16" else 0
        assert estimated[part] - transient == pytest.approx(size, rel=0.05), part
    assert sum(estimated[part] for part in held) == pytest.approx(sum(held.values()), rel=0.05)


def load_with_wide_norm(config, **options):
    """A model that keeps a norm in float32, as some families keep their norms or routers."""
    loaded = load_model(config, **options)
    loaded.causal_lm.get_decoder().final_layer_norm.float()
    return loaded


def build_sharded() -> tuple[torch.dtype, bool, bool]:
    """The dtype of a float32 norm; whether torch's linear function is left alone; whether sharding computes the same."""
    linear = torch.nn.functional.linear
    config = ModelConfig(tiny_random=True, family="gpt_neox", dtype="bfloat16")  # its layers have biases
    tokens = torch.arange(3, 40)[None]
    sharding = ZeroSharding(ParallelConfig(backend="zero3", persistence_threshold=0))
    models_sharded.load_model = load_with_wide_norm
    sharded, whole = load_sharded(config, sharding).causal_lm, load_with_wide_norm(config).causal_lm
    kept = sharded.get_decoder().final_layer_norm.weight.dtype
    with torch.no_grad(), sharding.filling(list(sharded.parameters())):
        same = torch.equal(sharded(tokens).logits, whole(tokens).logits)
    return kept, torch.nn.functional.linear is linear, same


def test_stage_3_leaves_torchs_linear_function_and_float32_parameters_alone(tmp_path):
    pytest.importorskip("deepspeed")
    assert run_on_ranks(build_sharded, 1, tmp_path) == [(torch.float32, True, True)]


def test_stage_0_refuses_bfloat16():
    pytest.importorskip("deepspeed")
    with pytest.raises(ConfigError, match="accumulates bfloat16 gradients in bfloat16"):
        start(Case("zero0", dtype="bfloat16"))
