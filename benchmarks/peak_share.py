"""What share of this machine's peak a forward and a training step reach, and where the rest of their time goes.

SmolLM2-135M, the samples of `packed_vs_padded.py` (32 pairs, 8 chats, log-normal lengths) in packs of 2,048 tokens. The
forward is that of encoding, without a graph; the step is GRIT's with all graphs kept, so nothing is computed twice. Operations
are those that the samples need (`engine.accounting.flops`); the peak is the fastest square matrix product of the same threads
and dtype, measured anew before each repetition. Then one more of each in the profiler: shares of operators' own time.

Usage: python benchmarks/peak_share.py [--dtype bfloat16] [--repetitions 5] [--operators 10]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from packed_vs_padded import TEMPERATURE, WEIGHTS, make_samples, now

from unified_lm.batch import Batch, make_batch
from unified_lm.config.schema import ModelConfig
from unified_lm.core.allocator import keep_freed_memory
from unified_lm.core.distributed import local_device
from unified_lm.engine.accounting.flops import ModelFlops
from unified_lm.engine.accounting.peaks import measured_gemm
from unified_lm.engine.accounting.throughput import describe_device
from unified_lm.engine.embedding_term import EmbeddingTerm
from unified_lm.engine.step import GradCacheStep
from unified_lm.engine.training_module import TrainingModule
from unified_lm.models.backbone import Backbone
from unified_lm.models.loading import load_model
from unified_lm.objectives import ContrastiveConfig, NextTokenConfig, build_objective

BUDGET = 2048


def make_work(dtype: str) -> tuple[dict[str, Callable[[], object]], dict[str, float], Batch]:
    """The forward and the step, the operations that each needs, and what they work on."""
    loaded = load_model(ModelConfig(source="embedded", name="smollm2-135m", family="llama", dtype=dtype))
    samples = make_samples(loaded.tokenizer)
    counts = {"generation": float(sum(sample.num_supervised for sample in samples))}
    batch = make_batch(samples, BUDGET, counts).to(local_device())
    backbone = Backbone(loaded.causal_lm, "auto").to(local_device())
    trainable = TrainingModule(backbone, "mean", {"generation": build_objective(NextTokenConfig())}).train()
    terms = [EmbeddingTerm({"embedding": build_objective(ContrastiveConfig(temperature=TEMPERATURE))}, WEIGHTS)]
    step = GradCacheStep(trainable, torch.Tensor.backward, WEIGHTS, terms, len(batch.packs))

    def forward() -> None:
        """States of every pack."""
        with torch.no_grad():
            for pack in batch.packs:
                backbone(pack)

    def train() -> None:
        """Losses and gradients, which are thrown away."""
        trainable.zero_grad(set_to_none=False)
        step(batch)

    flops = ModelFlops.of(trainable)
    needed = {
        "forward": sum(flops.forward(pack, tokens=False) for pack in batch.packs),
        "step": sum(flops.training(pack) for pack in batch.packs),
    }
    return {"forward": forward, "step": train}, needed, batch


def print_operators(run: Callable[[], object], rows: int) -> None:
    """The operators that take most of the time."""
    with torch.profiler.profile() as profiler:
        run()
    on_device = torch.cuda.is_available()

    def own(event: torch.autograd.profiler_util.FunctionEventAvg) -> float:
        """Microseconds of an operator without those that it calls."""
        return event.self_device_time_total if on_device else event.self_cpu_time_total

    events = sorted(profiler.key_averages(), key=own, reverse=True)
    total = sum(map(own, events))
    for event in events[:rows]:
        print(f"  {100 * own(event) / total:5.1f} %  {event.key}  ({event.count} calls)")


def main() -> None:
    """Print shares of the peak, and the operators."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--operators", type=int, default=10)
    options = parser.parse_args()
    keep_freed_memory()
    work, needed, batch = make_work(options.dtype)
    tokens = sum(map(len, batch.packs))
    print(f"{describe_device()}, {options.dtype}; {tokens} tokens in {len(batch.packs)} packs")
    shares: dict[str, list[float]] = {name: [] for name in work}
    peaks = []
    for repetition in range(options.repetitions + 1):
        measured_gemm.cache_clear()
        peak = measured_gemm(local_device(), getattr(torch, options.dtype))
        for name, run in work.items():
            started = now()
            run()
            if repetition:
                shares[name].append(needed[name] / (now() - started) / peak)
        peaks.append(peak)
    print(f"peak: {statistics.median(peaks) / 1e9:.0f} GFLOP/s [{min(peaks) / 1e9:.0f}, {max(peaks) / 1e9:.0f}]")
    for name, run in work.items():
        least, most = min(shares[name]), max(shares[name])
        print(f"{name}: {100 * statistics.median(shares[name]):.0f} % of the peak [{100 * least:.0f}, {100 * most:.0f}]")
        print_operators(run, options.operators)


if __name__ == "__main__":
    main()
