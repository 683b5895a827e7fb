"""Two processes against one on the same global batch, and what GradCache's packs cost.

A llama of 29 M parameters with random weights in float32, on the CPU with gloo, one thread a process; GRIT-like batches of
random tokens with log-normal lengths. Every configuration runs in fresh processes, so that its peak memory is its own.

    python benchmarks/distributed.py [backends] [packs] [pairs] [balance] [--repetitions 3]

- backends: single against ddp and ZeRO 0 to 3 on two processes: step time, share of it in collectives (waiting for the other
  process included), peak memory per process. Losses and gradient norms must agree.
- packs: one process, token budgets from about one group to everything in one pack.
- pairs: one process, a fixed token budget, 32 to 1,024 pairs: memory must stay flat (within 5 %).
- balance: no training: how evenly GRIT's published batch sizes are dealt to 8 to 64 ranks.

Times are those of the fastest step: the machine is shared. Memory is the most resident memory while training, above that of the
process with every module imported and before the model exists; what starting takes for a moment does not count. The section
pairs also prints the most that tensors made by the step held at once ("tensors"): it does not depend on where the allocator
puts them, and repeats exactly.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import socket
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.multiprocessing as mp
from transformers import AutoConfig, AutoModelForCausalLM

from unified_lm.batch import IGNORE, Batch, Sample, make_batch
from unified_lm.config.schema import OptimConfig, ParallelConfig
from unified_lm.core import distributed
from unified_lm.core.allocator import keep_freed_memory
from unified_lm.core.random import seed_everything
from unified_lm.data.loader import SampleCost, imbalance, partition_samples
from unified_lm.engine.accounting.live_tensors import LiveTensors
from unified_lm.engine.backends.backend import make_backend
from unified_lm.engine.embedding_term import EmbeddingTerm
from unified_lm.engine.step import GradCacheStep
from unified_lm.engine.training_module import TrainingModule
from unified_lm.models.backbone import Backbone
from unified_lm.objectives import ContrastiveConfig, NextTokenConfig, build_objective

ARCHITECTURE = {
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
COST = SampleCost(2 * 25e6, 4 * 8 * 512)
DEEP = {**ARCHITECTURE, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 32}
"""Narrower and deeper: activations outweigh weights, as they do with the packs of a real run."""
WEIGHTS = {"embedding": 1.0, "generation": 1.0}
SECTIONS = ("backends", "packs", "pairs", "balance")
COLLECTIVES = (
    "all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_single",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "reduce_scatter_single",
    "broadcast",
    "barrier",
)
BUCKET = 2_000_000
"""Elements that ZeRO exchanges at a time: the default is larger than this model."""
MIB = 2**20


@dataclass(frozen=True)
class Case:
    """One configuration.

    Attributes:
        backend: name of the parallel backend.
        processes: of the group.
        pairs: groups of two in the global batch.
        chats: samples with labels in it.
        tokens: length of every sample; None draws log-normal lengths.
        budget: tokens of a pack.
        repetitions: measured steps, after one of at most 32 pairs that warms up.
        architecture: sizes of the model.
        count_tensors: whether to count live tensors in the measured steps, which slows them a little.
    """

    backend: str = "single"
    processes: int = 1
    pairs: int = 16
    chats: int = 8
    tokens: int | None = None
    budget: int = 512
    repetitions: int = 3
    architecture: dict[str, int] = field(default_factory=lambda: ARCHITECTURE)
    count_tensors: bool = False


# --- what is run -------------------------------------------------------------------------------------------------------


def make_step(case: Case) -> dict[str, list[Sample]]:
    """The global batch of a case; the same in every process."""
    random = np.random.default_rng(0)

    def ids(median: float) -> np.ndarray:
        length = case.tokens or int(np.clip(random.lognormal(np.log(median), 0.6), 8, 128))
        return random.integers(3, ARCHITECTURE["vocab_size"], size=length)

    pairs, chats = [], []
    for group in range(case.pairs):
        for slot, median in enumerate((16, 32)):
            tokens = ids(median)
            span = (0, len(tokens))
            pairs.append(Sample(input_ids=tokens, stream="embedding", bidirectional=span, pool=span, group=group, slot=slot))
    for group in range(case.chats):
        tokens = ids(40)
        labels = np.where(np.arange(len(tokens)) >= len(tokens) // 2, tokens, IGNORE)
        chats.append(Sample(input_ids=tokens, stream="generation", labels=labels, group=group))
    return {"embedding": pairs, "generation": chats} if chats else {"embedding": pairs}


def num_tokens(step: dict[str, list[Sample]]) -> int:
    """Tokens of a global batch."""
    return sum(len(sample) for samples in step.values() for sample in samples)


def share_of(case: Case, rank: int) -> Batch:
    """A rank's packs of the global batch."""
    samples = make_step(case)
    counts = {"generation": float(sum(s.num_supervised for s in samples.get("generation", ())))} if case.chats else {}
    return make_batch(partition_samples(samples, case.processes, COST)[rank], case.budget, counts)


def run_case(case: Case) -> list[dict[str, Any]]:
    """Run a case in fresh processes; returns what every rank measured."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, args=(case, port, folder), nprocs=case.processes)
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(case.processes)]


def work(rank: int, case: Case, port: int, folder: str) -> None:
    """One process of a case."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(case.processes))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    keep_freed_memory()
    warnings.filterwarnings("ignore", category=FutureWarning)  # DeepSpeed calls collectives by their old names
    clock = CollectiveClock()
    if case.backend.startswith("zero"):
        import deepspeed  # noqa: F401 - its import is not the stage's memory
    distributed.initialize(timeout_minutes=5)
    batch = share_of(case, rank)
    before = start_of_peak()
    seed_everything(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **case.architecture))
    backbone = Backbone(model, "sdpa")
    tokens = {"generation": build_objective(NextTokenConfig())} if case.chats else {}
    trainable = TrainingModule(backbone, "mean", tokens).train()
    backend = make_backend(trainable, OptimConfig(), ParallelConfig(backend=case.backend, bucket_elements=BUCKET))
    embeddings = {"embedding": build_objective(ContrastiveConfig(temperature=0.05))}
    weights = {name: WEIGHTS[name] for name in (*tokens, *embeddings)}
    terms = [EmbeddingTerm(embeddings, weights)]
    step = GradCacheStep(backend.forward, backend.backward, weights, terms, equal_forwards=backend.equal_forwards)
    losses = step(share_of(replace(case, pairs=min(case.pairs, 32)), rank))
    first = {"loss": losses.total, "norm": backend.update(1e-4, 1.0)}  # makes the optimizer's state too
    start_of_peak()
    seconds, waits = [], []
    live = LiveTensors()
    for _ in range(case.repetitions):
        distributed.barrier()
        started, waited = time.perf_counter(), clock.seconds
        with live if case.count_tensors else nullcontext():
            step(batch)
        backend.update(1e-4, 1.0)
        seconds.append(time.perf_counter() - started)
        waits.append(clock.seconds - waited)
    result = {
        "seconds": seconds,
        "waits": waits,
        "memory": peak() - before,
        "tensors": live.peak,
        **first,
        "tokens": batch.num_tokens,
        "packs": len(batch.packs),
    }
    (Path(folder) / f"{rank}.json").write_text(json.dumps(result))
    distributed.shutdown()


class CollectiveClock:
    """Adds up the seconds that this process spends inside torch's collectives, or waiting for those it started.

    To be made before anything that keeps references to them (DeepSpeed does).
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._running = False
        for module in (torch.distributed, torch.distributed.distributed_c10d):
            for name in COLLECTIVES:
                if hasattr(module, name):
                    setattr(module, name, self.timed(getattr(module, name)))

    def timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same call on the clock; one collective that calls another counts once."""

        def measured(*args: Any, **kwargs: Any) -> Any:
            if self._running:
                return call(*args, **kwargs)
            self._running = True
            started = time.perf_counter()
            try:
                result = call(*args, **kwargs)
            finally:
                self._running = False
                self.seconds += time.perf_counter() - started
            return _Handle(result, self) if hasattr(result, "wait") else result

        return measured


class _Handle:
    """A collective under way, whose `wait` is on the clock."""

    def __init__(self, handle: Any, clock: CollectiveClock) -> None:
        self._handle = handle
        self.wait = clock.timed(handle.wait)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)


def start_of_peak() -> int:
    """Give freed memory back and forget the process's peak so far; returns its resident memory, in bytes (Linux, glibc)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak() -> int:
    """The most resident memory since `start_of_peak`, in bytes."""
    return _status("VmHWM")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


# --- what is printed ---------------------------------------------------------------------------------------------------


def backends(repetitions: int) -> None:
    """Single against two processes under every backend."""
    names = ["ddp", "zero0", "zero1", "zero2", "zero3"]
    cases = [Case(repetitions=repetitions), *(Case(backend=name, processes=2, repetitions=repetitions) for name in names)]
    print(f"\nbackends: {num_tokens(make_step(cases[0]))} tokens a step, budget {cases[0].budget}")
    print("backend  processes  step (s)  against single  in collectives  peak MiB/process  tokens/rank  packs  loss, norm")
    reference: float | None = None
    for case in cases:
        ranks = run_case(case)
        fastest = min(max(times) for times in zip(*(r["seconds"] for r in ranks), strict=True))
        reference = reference or fastest
        share = statistics.median(w / s for r in ranks for w, s in zip(r["waits"], r["seconds"], strict=True))
        memory = max(r["memory"] for r in ranks) / MIB
        print(
            f"{case.backend:8} {case.processes:9} {fastest:9.2f} {reference / fastest:14.2f}x {share:15.1%} {memory:17.0f}  "
            f"{'+'.join(str(r['tokens']) for r in ranks):>11}  {'+'.join(str(r['packs']) for r in ranks):>5}  "
            f"{ranks[0]['loss']:.6f}, {ranks[0]['norm']:.6f}",
            flush=True,
        )


def packs(repetitions: int) -> None:
    """One process, from about one group a pack to everything in one."""
    samples = make_step(Case())
    total = num_tokens(samples)
    longest = max(sum(len(s) for s in samples["embedding"] if s.group == group) for group in range(Case().pairs))
    budgets = [longest]
    while budgets[-1] * 2 < total:
        budgets.append(budgets[-1] * 2)
    print(f"\npacks: one process, {total} tokens a step")
    print("budget  packs  step (s)  against one pack  peak MiB")
    results = {budget: run_case(Case(budget=budget, repetitions=repetitions))[0] for budget in [total, *reversed(budgets)]}
    whole = min(results[total]["seconds"])
    for budget, result in results.items():
        fastest = min(result["seconds"])
        print(f"{budget:6} {result['packs']:6} {fastest:9.2f} {fastest / whole:16.2f}x {result['memory'] / MIB:9.0f}")


def pairs(repetitions: int) -> None:
    """One process, one budget, more and more pairs."""
    print("\npairs: one process, 32 layers of width 128, samples of 64 tokens, packs of 2,048 tokens, one step")
    print("pairs  packs  step (s)  resident MiB  against 32 pairs  tensors MiB  against 32 pairs")
    first: dict[str, Any] = {}
    for count in (32, 256, 1024):
        case = Case(pairs=count, chats=0, tokens=64, budget=2048, repetitions=1, architecture=DEEP, count_tensors=True)
        (result,) = run_case(case)
        first = first or result
        print(
            f"{count:5} {result['packs']:6} {sum(result['seconds']):9.1f} {result['memory'] / MIB:13.0f} "
            f"{result['memory'] / first['memory'] - 1:+17.1%} {result['tensors'] / MIB:12.1f} "
            f"{result['tensors'] / first['tensors'] - 1:+17.2%}",
            flush=True,
        )


def balance(repetitions: int) -> None:
    """Deal GRIT's batches (Mistral-7B: 2,048 pairs and 256 chats; Mixtral: 256 and 256) and compare with dealing in turn."""
    cost = SampleCost(2 * 6.98e9, 4 * 32 * 4096)
    random = np.random.default_rng(0)

    def length(median: float, most: int) -> int:
        return int(np.clip(random.lognormal(np.log(median), 0.9), 8, most))

    print("\nbalance: the costliest rank over the mean, log-normal lengths, one hard negative, 5 steps")
    print("pairs  chats  ranks  in turn  by tokens  by cost")
    for num_pairs, num_chats in ((2048, 256), (256, 256)):
        for ranks in (8, 16, 32, 64):
            found: dict[str, list[float]] = {"turn": [], "tokens": [], "cost": []}
            for _ in range(5):
                step: dict[str, list[Sample]] = {"embedding": [], "generation": []}
                for group in range(num_pairs):
                    for slot, (median, most) in enumerate(((40, 256), (180, 2048), (180, 2048))):
                        ids = np.ones(length(median, most), int)
                        sample = Sample(input_ids=ids, stream="e", bidirectional=(0, len(ids)), group=group, slot=slot)
                        step["embedding"].append(sample)
                for group in range(num_chats):
                    step["generation"].append(Sample(input_ids=np.ones(length(500, 2048), int), stream="g", group=group))
                turn = [[s for stream in step.values() for s in stream if s.group % ranks == rank] for rank in range(ranks)]
                for name, shares in (
                    ("turn", turn),
                    ("tokens", partition_samples(step, ranks)),
                    ("cost", partition_samples(step, ranks, cost)),
                ):
                    found[name].append(imbalance([sum(map(cost, share)) for share in shares]))
            turn_, tokens, costs = (statistics.mean(values) for values in found.values())
            print(f"{num_pairs:5} {num_chats:6} {ranks:6} {turn_:8.3f} {tokens:10.4f} {costs:8.4f}", flush=True)


def main() -> None:
    """Run the sections asked for, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="section", help=f"of {', '.join(SECTIONS)}; default: all")
    parser.add_argument("--repetitions", type=int, default=3)
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.sections if name not in SECTIONS]:
        sys.exit(f"unknown sections {unknown}, expected some of {', '.join(SECTIONS)}")
    for name in arguments.sections or SECTIONS:
        {"backends": backends, "packs": packs, "pairs": pairs, "balance": balance}[name](arguments.repetitions)


if __name__ == "__main__":
    main()
