"""One contrastive step with each option that trades memory, recomputation and compilation, side by side on the same samples.

SmolLM2-135M, 32 pairs of running text with log-normal lengths in packs of 512 tokens, forward and backward. Each repetition
runs all sides one after another, and a ratio is that of one repetition. With `--peaks` the most bytes of live tensors beyond
weights and gradients are counted too (`LiveTensors`; compiled blocks hide theirs), in a step of its own that takes minutes.

Usage: python benchmarks/step_options.py [--dtype float32] [--repetitions 3] [--peaks]
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass

import torch
from packed_vs_padded import TEMPERATURE, WEIGHTS, make_samples, now

from unified_lm.batch import Batch, make_batch
from unified_lm.config.schema import ModelConfig
from unified_lm.core.allocator import keep_freed_memory
from unified_lm.core.distributed import local_device
from unified_lm.engine.accounting.live_tensors import LiveTensors
from unified_lm.engine.accounting.throughput import describe_device
from unified_lm.engine.embedding_term import EmbeddingTerm
from unified_lm.engine.step import GradCacheStep
from unified_lm.engine.training_module import TrainingModule
from unified_lm.models.backbone import Backbone
from unified_lm.models.compiled import compile_blocks
from unified_lm.models.loading import load_model
from unified_lm.objectives import ContrastiveConfig, build_objective

BUDGET = 512
EVERY_GRAPH = 1_000_000


@dataclass(frozen=True)
class Side:
    """One way to compute the step."""

    retained: int = 1
    checkpointing: str = ""
    compiled: bool = False


SIDES = {
    "one graph kept": Side(),
    "all graphs kept": Side(retained=EVERY_GRAPH),
    "checkpointed": Side(checkpointing="inputs"),
    "checkpointed, all kept": Side(retained=EVERY_GRAPH, checkpointing="inputs"),
    "products kept": Side(checkpointing="products"),
    "products kept, all kept": Side(retained=EVERY_GRAPH, checkpointing="products"),
    "compiled": Side(compiled=True),
    "compiled, all graphs kept": Side(retained=EVERY_GRAPH, compiled=True),
}


def make_side(side: Side, dtype: str) -> tuple[TrainingModule, GradCacheStep]:
    """A model of its own, since blocks are changed in place."""
    loaded = load_model(ModelConfig(source="embedded", name="smollm2-135m", family="llama", dtype=dtype))
    backbone = Backbone(loaded.causal_lm, "auto").to(local_device())
    if side.checkpointing:
        backbone.enable_gradient_checkpointing(side.checkpointing == "products")
    if side.compiled:
        compile_blocks(loaded.causal_lm)
    trainable = TrainingModule(backbone, "mean", {}).train()
    terms = [EmbeddingTerm({"embedding": build_objective(ContrastiveConfig(temperature=TEMPERATURE))}, WEIGHTS)]
    return trainable, GradCacheStep(trainable, torch.Tensor.backward, WEIGHTS, terms, side.retained)


def peak_bytes(trainable: TrainingModule, step: GradCacheStep, batch: Batch) -> int:
    """The most bytes of live tensors in one step that finds its gradients allocated."""
    with LiveTensors() as live:
        step(batch)
    return live.peak


def main() -> None:
    """Print seconds, ratios, losses and peaks of all sides."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--peaks", action="store_true", help="count live tensors")
    options = parser.parse_args()
    dtype, repetitions = options.dtype, options.repetitions
    keep_freed_memory()
    tokenizer = load_model(ModelConfig(source="embedded", name="smollm2-135m", family="llama")).tokenizer
    samples = make_samples(tokenizer, num_chats=0)
    batch = make_batch(samples, BUDGET).to(local_device())
    print(f"{describe_device()}, {dtype}; {sum(map(len, samples))} tokens in {len(batch.packs)} packs", flush=True)
    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    losses, peaks = {}, {}
    made = {name: make_side(side, dtype) for name, side in SIDES.items()}
    for repetition in range(repetitions + 1):
        for name, (trainable, step) in made.items():
            started = now()
            losses[name] = step(batch).total
            seconds[name].append(now() - started)
            if options.peaks and repetition == 0 and not SIDES[name].compiled:
                peaks[name] = peak_bytes(trainable, step, batch)
            trainable.zero_grad(set_to_none=False)
    first = next(iter(SIDES))
    for name, values in seconds.items():
        ratios = [a / b for a, b in zip(seconds[first][1:], values[1:], strict=True)]
        peak = f"  peak {peaks[name] / 2**20:8,.0f} MiB" if name in peaks else ""
        difference = abs(losses[name] - losses[first]) / abs(losses[first])
        print(
            f"{name:26} {statistics.median(values[1:]):7.2f} s  {statistics.median(ratios):5.2f} times as fast "
            f"[{min(ratios):.2f}, {max(ratios):.2f}]{peak}  loss differs by {difference:.1e}",
            flush=True,
        )
    pairs = zip(seconds["checkpointed"][1:], seconds["products kept"][1:], strict=True)
    ratios = [a / b for a, b in pairs]
    spread = f"[{min(ratios):.2f}, {max(ratios):.2f}]"
    print(f"products kept against checkpointed: {statistics.median(ratios):.2f} times as fast {spread}")


if __name__ == "__main__":
    main()
