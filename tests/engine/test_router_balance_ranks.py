"""Router balance across processes and backends: two ranks under DDP and ZeRO take the steps that one process takes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from tests.engine.backends.test_zero import Results, assert_same_steps
from tests.engine.exactness import MANY_PACKS, ONE_PACK, Case, State, distance, run
from tests.processes import any_slow, run_on_ranks

WEIGHT = 20.0
"""Large: the term has to show in the gradient next to the others."""

BACKENDS = ("ddp", "zero2", "zero3")
EXACT = [Case(backend, "grit", MANY_PACKS, "mixtral", steps=2, balance=WEIGHT) for backend in BACKENDS] + [
    Case("ddp", "grit", ONE_PACK, "mixtral", steps=2, balance=WEIGHT)
]
RECOMPUTED = [
    Case(backend, "grit", MANY_PACKS, "mixtral", steps=2, balance=WEIGHT, checkpointing=True) for backend in BACKENDS[1:]
]
ADAPTED = [Case(backend, "grit", MANY_PACKS, "mixtral", steps=2, balance=WEIGHT, adapted=True) for backend in BACKENDS[1:]]
OWN = Case("ddp", "grit", MANY_PACKS, "mixtral", steps=2, balance=WEIGHT, own_choices=True)
CACHED = [Case(backend, "grit", MANY_PACKS, "mixtral", dropout=0.3, steps=2, balance=WEIGHT) for backend in BACKENDS]
DIRECT = Case("ddp", "grit", MANY_PACKS, "mixtral", dropout=0.3, retain_all=True, steps=2, balance=WEIGHT)


def is_fast(case: Case) -> bool:
    """Whether a case is among the fast tests: each part under one of DDP, ZeRO-2 and ZeRO-3. The others are slow."""
    backends = {**dict.fromkeys(EXACT, ("ddp", "zero3")), **dict.fromkeys((*RECOMPUTED, *ADAPTED, *CACHED), ("zero2",))}
    return case.backend in backends.get(case, (case.backend,)) and case.budget == MANY_PACKS


def marked(cases: Iterable[Case]) -> list[Any]:
    return [pytest.param(case, marks=[] if is_fast(case) else pytest.mark.slow) for case in cases]


def two_processes(all_cases: bool) -> Results:
    cases = (*EXACT, *RECOMPUTED, *ADAPTED, OWN, *CACHED, DIRECT)
    return {case: run(case) for case in cases if all_cases or is_fast(case)}


@pytest.fixture(scope="module")
def alone() -> State:
    return run(Case("single", "grit", ONE_PACK, "mixtral", steps=2, balance=WEIGHT))


@pytest.fixture(scope="module")
def together(request, tmp_path_factory) -> Results:
    pytest.importorskip("deepspeed")
    return run_on_ranks(partial(two_processes, any_slow(request)), 2, tmp_path_factory.mktemp("two"))[0]


@pytest.mark.parametrize("case", marked([*EXACT, *RECOMPUTED]), ids=lambda c: f"{c.backend}-{c.budget}-{c.checkpointing}")
def test_two_processes_take_the_steps_of_one(alone, together, case):
    assert_same_steps(together[case], alone)


@pytest.mark.parametrize("case", marked(ADAPTED), ids=lambda case: case.backend)
def test_adapters_learn_it_through_frozen_routers(together, case):
    expected = run(replace(case, backend="single", budget=ONE_PACK))
    assert_same_steps(together[case], expected)
    without = run(replace(case, backend="single", budget=ONE_PACK, balance=0.0))
    assert distance(without, expected, "gradient/") > 1e-2


def test_the_term_is_in_the_gradient(alone):
    without = run(Case("single", "grit", ONE_PACK, "mixtral", steps=2))
    assert distance(without, alone, "gradient/") > 1e-2


def test_the_choices_of_a_rank_alone_would_be_wrong(alone, together):
    """The first test can fail: f of the rank instead of the step's gives another gradient."""
    assert distance(together[OWN], alone, "gradient/") > 1e-3


@pytest.mark.parametrize("case", marked(CACHED), ids=lambda case: case.backend)
def test_dropout_is_replayed_on_every_rank(together, case):
    assert_same_steps(together[case], together[DIRECT])
