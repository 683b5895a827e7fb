"""What a step says about speed, waste, memory and balance."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.engine.tiny import WEIGHTS, embedding_terms, make_samples, make_trainable
from tests.processes import run_on_ranks
from unified_lm.batch import Sample, make_batch
from unified_lm.batch.pack import padded_tokens
from unified_lm.core import distributed
from unified_lm.engine.accounting.peaks import Peak
from unified_lm.engine.accounting.throughput import ComputeClock, StepMeter
from unified_lm.engine.coupled import CoupledTerm
from unified_lm.engine.router_balance import RouterBalance
from unified_lm.engine.step import GradCacheStep


def make_meter(
    num_retained: int = 1, terms: Sequence[CoupledTerm] = (), clock: ComputeClock | None = None, **options: bool
) -> StepMeter:
    trainable = make_trainable()
    step = GradCacheStep(trainable, torch.Tensor.backward, WEIGHTS, [*embedding_terms(), *terms], num_retained)
    meter = StepMeter(trainable, step, clock or ComputeClock(), **options)
    meter._peak = Peak(1e12, "measured")
    return meter


def test_rates_and_shares() -> None:
    batch = make_batch(make_samples()[0], 64, {"generation": 10.0})
    meter = make_meter()
    values = meter(batch, seconds=2.0, data_seconds=0.5)
    assert values["tokens"] == batch.num_tokens
    assert values["tokens_per_second"] == batch.num_tokens / 2
    assert values["samples_per_second"] == batch.num_samples / 2
    assert values["data_share"] == 0.25
    assert values["padding_free_share"] == 1.0
    assert 0 < values["padding_share_if_padded"] < 1
    assert values["imbalance_tokens"] == values["imbalance_compute"] == 1.0
    model = sum(meter.flops.training(pack) for pack in batch.packs)
    assert values["mfu"] == pytest.approx(model / 2 / 1e12)
    assert values["model_teraflops_per_second"] == pytest.approx(model / 2 / 1e12)


def test_work_that_is_done_twice_counts_for_the_hardware_only() -> None:
    batch = make_batch(make_samples()[0], 40, {"generation": 10.0})
    pooled = [pack for pack in batch.packs if len(pack.pool_rows)]
    assert len(pooled) > 2
    direct = make_meter(num_retained=len(pooled))(batch, 1.0, 0.0)
    cached = make_meter(num_retained=1)(batch, 1.0, 0.0)
    recomputed = make_meter(num_retained=len(pooled), recomputes=True)(batch, 1.0, 0.0)
    assert direct["hfu"] == direct["mfu"] == cached["mfu"] == recomputed["mfu"]
    assert direct["hfu"] < cached["hfu"] < direct["hfu"] * 4 / 3
    assert direct["hfu"] < recomputed["hfu"] < direct["hfu"] * 4 / 3


def test_balanced_routers_forward_every_pack_twice_but_one() -> None:
    batch = make_batch(make_samples(num_chats=8)[0], 40, {"generation": 10.0})
    assert any(not len(pack.pool_rows) for pack in batch.packs)
    balanced = make_meter(terms=[RouterBalance({"generation": 1.0}, num_experts=4, top_k=2)])
    again = sum(balanced.flops.forward(pack, tokens=False) for pack in batch.packs[:-1])
    values = balanced(batch, 1.0, 0.0)
    assert values["hfu"] - values["mfu"] == pytest.approx(again / 1e12)
    assert values["hfu"] > make_meter()(batch, 1.0, 0.0)["hfu"]


def test_padding_is_by_kind() -> None:
    def sample(length: int, stream: str, slot: int = 0) -> Sample:
        return Sample(input_ids=np.arange(length), stream=stream, slot=slot)

    samples = [sample(3, "a"), sample(5, "a"), sample(10, "a", 1), sample(8, "a", 1), sample(7, "b")]
    assert padded_tokens(samples) == 2 * 5 + 2 * 10 + 7


def test_the_clock_counts_what_is_inside_and_starts_anew() -> None:
    clock = ComputeClock()
    assert clock.timed(lambda seconds, value: (time.sleep(seconds), value)[1])(0.05, value=3) == 3
    time.sleep(0.05)
    assert 0.05 <= clock.read() < 0.09
    assert clock.read() == 0.0


def _memory_of_what_is_held() -> tuple[float, dict[str, float]]:
    batch = make_batch(make_samples()[0], 1000, {"generation": 10.0})
    meter = make_meter()
    before = meter(batch, 1.0, 0.0)["memory_gib"]
    held = torch.ones(64 * 2**20 // 4)
    after = meter(batch, 1.0, 0.0)
    assert held.numel()
    return before, after


def test_memory_grows_with_what_is_held(tmp_path: Path) -> None:
    """In a process of its own: one that has trained keeps what it frees, and takes new tensors from that."""
    ((before, after),) = run_on_ranks(_memory_of_what_is_held, 1, tmp_path)
    assert after["memory_gib"] - before == pytest.approx(64 / 1024, rel=0.2)
    assert after["memory_peak_gib"] >= after["memory_gib"]


def _of_a_rank() -> tuple[int, dict[str, float]]:
    rank = distributed.rank()
    clock = ComputeClock()
    meter = make_meter(clock=clock)
    batch = make_batch(make_samples(num_groups=2 + 2 * rank, num_chats=2)[0], 64, {"generation": 10.0})
    slow = clock.timed(lambda: time.sleep(0.1 + 0.2 * rank))
    slow()
    return batch.num_tokens, meter(batch, seconds=1.0 + rank, data_seconds=0.1)


def test_two_ranks_report_the_same_and_name_the_imbalance(tmp_path: Path) -> None:
    (first, values), (second, other) = run_on_ranks(_of_a_rank, 2, tmp_path)
    assert values == other
    assert values["tokens"] == first + second
    assert values["tokens_per_second"] == pytest.approx((first + second) / 2.0)  # the slower rank's time counts
    assert values["imbalance_tokens"] == pytest.approx(second / ((first + second) / 2))
    assert values["imbalance_compute"] == pytest.approx(0.3 / 0.2, rel=0.1)


def test_a_real_step_runs_on_the_clock() -> None:
    clock = ComputeClock()
    trainable = make_trainable()
    samples, counts = make_samples()
    step = GradCacheStep(clock.timed(trainable), clock.timed(torch.Tensor.backward), WEIGHTS, embedding_terms())
    started = time.perf_counter()
    step(make_batch(samples, 64, counts))
    assert 0.3 * (time.perf_counter() - started) < clock.read() <= time.perf_counter() - started
