"""A published recipe at its real size on one GPU: tokens/s, MFU, and measured memory against the estimate of `dry_run`.

The model has the recipe's architecture and random weights (the cost of a step does not depend on their values). Samples are
random tokens with log-normal lengths up to the recipe's limits, with medians of 40 tokens for queries, 180 for documents and
450 for chats. The step is the engine's own: packs, GradCache, checkpointing, objectives, clipping, AdamW. Only batch sizes
differ.

`--padded` also runs the same samples in padded batches through stock transformers: queries, documents and chats separately,
each batch with at most as many positions as a pack has tokens; same objectives, same GradCache.

    python benchmarks/full_size.py recipe=grit_mistral7b lora=gritlm [KEY=VALUE...] [--pairs 64] [--chats 8] [--padded]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from packed_vs_padded import now, padded_forward
from transformers import AutoModelForCausalLM

from unified_lm.batch import IGNORE, Batch, Sample, make_batch, make_pack
from unified_lm.composition.compose import compose_run
from unified_lm.config.schema import RunConfig
from unified_lm.core.random import seed_everything
from unified_lm.engine.accounting.estimate import estimate, model_configuration
from unified_lm.engine.accounting.throughput import ComputeClock, StepMeter, describe_device
from unified_lm.engine.backends.backend import TorchBackend
from unified_lm.engine.embedding_term import EmbeddingTerm
from unified_lm.engine.step import GradCacheStep
from unified_lm.engine.training_module import PackOutput, TrainingModule
from unified_lm.models.backbone import Backbone
from unified_lm.models.lora import apply_lora
from unified_lm.objectives import build_objective

GIB = 2**30
INSTRUCTION = 12
"""Tokens before a pool span begins."""
MEDIANS = {"query": 40, "document": 180, "chat": 450}
"""Median lengths in tokens."""
SHOWN = ("step_seconds", "tokens_per_second", "mfu", "hfu", "memory_peak_gib")


def make_samples(config: RunConfig, vocabulary: int, num_pairs: int, num_chats: int) -> list[Sample]:
    """Pairs and chats of random tokens, log-normal in length."""
    random = np.random.default_rng(0)

    def ids(kind: str, longest: int) -> np.ndarray:
        """Random tokens of a random length."""
        length = int(np.clip(random.lognormal(np.log(MEDIANS[kind]), 0.7), INSTRUCTION + 4, longest))
        return random.integers(10, vocabulary, size=length)

    pairs, chats = config.streams["embedding"], config.streams["generation"]
    samples = []
    for group in range(num_pairs):
        kinds = ["query", *["document"] * (1 + pairs.num_hard_negatives)]
        for slot, kind in enumerate(kinds):
            tokens = ids(kind, pairs.max_query_tokens if kind == "query" else pairs.max_document_tokens)
            span, pool = (0, len(tokens)), (INSTRUCTION, len(tokens))
            samples.append(Sample(input_ids=tokens, stream="embedding", bidirectional=span, pool=pool, group=group, slot=slot))
    for group in range(num_chats):
        tokens = ids("chat", chats.max_tokens)
        labels = np.where(np.arange(len(tokens)) >= len(tokens) // 3, tokens, IGNORE)
        samples.append(Sample(input_ids=tokens, stream="generation", labels=labels, group=group))
    return samples


def build(config: RunConfig) -> TrainingModule:
    """The recipe's model with random weights on the GPU."""
    # Created on the GPU in bfloat16: in float32 on the CPU a large model would not fit, and would take minutes to draw.
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(model_configuration(config.model), dtype=torch.bfloat16)
    torch.set_default_dtype(torch.float32)
    if config.lora is not None:
        apply_lora(model, config.lora, config.seed)
    backbone = Backbone(model, config.model.attention_kernel).cuda()
    if config.model.gradient_checkpointing:
        backbone.enable_gradient_checkpointing()
    return TrainingModule(backbone, config.model.pooling, {"generation": objective(config, "generation")}).cuda().train()


def objective(config: RunConfig, stream: str):
    """The recipe's objective of a stream."""
    return build_objective(config.streams[stream].objective)


def padded_batch(samples: Sequence[Sample], budget: int, counts: dict[str, float]) -> Batch:
    """A batch whose packs have one kind of sample each, in the order of the data, with padded positions within the budget."""
    kinds: dict[tuple[str, int], list[Sample]] = {}
    for sample in samples:
        kinds.setdefault((sample.stream, min(sample.slot, 1)), []).append(sample)
    batches = []
    for members in kinds.values():
        rows: list[Sample] = []
        for sample in members:
            if rows and (len(rows) + 1) * max(map(len, [*rows, sample])) > budget:
                batches.append(rows)
                rows = []
            rows.append(sample)
        batches.append(rows)
    whole = make_batch(samples, 10**9, counts)
    size = whole.group_sizes["embedding"]
    row_of = {id(sample): sample.group * size + sample.slot for sample in samples if sample.pool is not None}
    return replace(whole, packs=tuple(make_pack(rows, row_of) for rows in batches))


@dataclass
class Bench:
    """Everything that the packed and the padded side share.

    Attributes:
        config: the recipe.
        trainable: the model with its objectives.
        backend: takes the updates.
        samples: one step's samples.
        counts: supervised tokens per stream, over which losses are normalized.
        step: the engine's step over packs.
        meter: measures it.
    """

    config: RunConfig
    trainable: TrainingModule
    backend: TorchBackend
    samples: list[Sample]
    counts: dict[str, float]
    step: GradCacheStep
    meter: StepMeter

    @classmethod
    def create(cls, config: RunConfig, num_pairs: int, num_chats: int) -> Bench:
        """Build the model, the samples and the step of a recipe."""
        trainable = build(config)
        samples = make_samples(config, trainable.backbone.vocab_size, num_pairs, num_chats)
        counts = {"generation": float(sum(sample.num_supervised for sample in samples))}
        backend = TorchBackend(trainable, config.optim)
        clock = ComputeClock()
        step = make_step(config, clock.timed(backend.forward), clock.timed(backend.backward))
        meter = StepMeter(trainable, step, clock, recomputes=config.model.gradient_checkpointing)
        return cls(config, trainable, backend, samples, counts, step, meter)

    def update(self) -> None:
        """Clip and take one optimizer step."""
        self.backend.update(1e-6, 1.0)

    def describe(self, batch: Batch) -> str:
        """Sizes of the model and of the step."""
        total = sum(p.numel() for p in self.trainable.parameters())
        trained = sum(p.numel() for p in self.trainable.parameters() if p.requires_grad)
        num_pairs = len({sample.group for sample in self.samples if sample.stream == "embedding"})
        num_chats = sum(sample.stream == "generation" for sample in self.samples)
        return (
            f"{total / 1e9:.2f} G parameters, {trained / 1e6:.1f} M trained; {num_pairs} pairs, {num_chats} chats, "
            f"{sum(map(len, self.samples))} tokens, {len(batch.packs)} packs"
        )


def make_step(config: RunConfig, forward: Callable[..., PackOutput], backward: Callable[[torch.Tensor], None]) -> GradCacheStep:
    """The engine's step with the recipe's objectives and weights."""
    weights = {name: stream.objective.weight for name, stream in config.streams.items()}
    return GradCacheStep(forward, backward, weights, [EmbeddingTerm({"embedding": objective(config, "embedding")}, weights)])


def run_packed(bench: Bench, batch: Batch, steps: int) -> dict[str, float]:
    """Median metrics of some packed steps after a warm-up step."""
    on_device = batch.to(torch.device("cuda"))
    lines = []
    for _ in range(steps + 1):
        torch.cuda.reset_peak_memory_stats()
        began = now()
        bench.step(on_device)
        bench.update()
        lines.append(bench.meter(batch, now() - began, 0.0))
    return {key: statistics.median(line[key] for line in lines[1:]) for key in SHOWN}


@dataclass
class Padded:
    """The same samples in padded batches, and the step over them."""

    batch: Batch
    step: GradCacheStep

    @classmethod
    def create(cls, bench: Bench) -> Padded:
        """Arrange a bench's samples in padded batches."""
        batch = padded_batch(bench.samples, bench.config.packing.token_budget, bench.counts).to(torch.device("cuda"))
        forward = padded_forward(bench.trainable.backbone, batch, bench.trainable.token_objectives["generation"])
        return cls(batch, make_step(bench.config, forward, bench.backend.backward))


def run_padded(bench: Bench, padded: Padded, packed_seconds: float) -> None:
    """Run the same step over padded batches of stock transformers, and print its time and memory."""
    seconds = []
    torch.cuda.reset_peak_memory_stats()
    with bench.trainable.backbone.stock_attention():
        for _ in range(3):
            began = now()
            padded.step(padded.batch)
            bench.update()
            seconds.append(now() - began)
    fastest, peak = min(seconds[1:]), torch.cuda.max_memory_allocated() / GIB
    packs = padded.batch.packs
    positions = sum(len(pack.samples) * max(pack.plan.lengths) for pack in packs)
    print(
        f"padded: {len(packs)} batches, {positions} positions, step_seconds {fastest:.4g}, memory_peak_gib {peak:.4g}; ", end=""
    )
    print(f"packed is {fastest / packed_seconds:.2f} times as fast")


def untrained_losses(step: GradCacheStep, trainable: TrainingModule, batch: Batch) -> str:
    """Losses of the step's streams with the initial weights, without dropout."""
    trainable.eval()
    losses = step.losses_only(batch).by_stream
    trainable.train()
    return ", ".join(f"{stream} {loss:.5f}" for stream, loss in losses.items())


def compare_with_estimate(config: RunConfig, measured_gib: float) -> str:
    """The memory that `dry_run` estimates for a recipe, and its ratio to the measured peak."""
    found = estimate(config)
    parts = ", ".join(f"{part} {size / GIB:.2f}" for part, size in found.bytes_by_part.items() if size > GIB / 100)
    ratio = found.total_bytes / GIB / measured_gib
    return f"estimate of dry_run: {found.total_bytes / GIB:.2f} GiB ({parts}), {ratio:.2f} of the measured peak"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="+", metavar="KEY=VALUE", help="a GRIT recipe, and changes to it")
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--chats", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--padded", action="store_true")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("full_size.py measures on a CUDA device, and none is visible.")
    config = compose_run([*arguments.overrides, f"streams.embedding.batch_size={arguments.pairs}"])
    seed_everything(config.seed)
    bench = Bench.create(config, arguments.pairs, arguments.chats)
    batch = make_batch(bench.samples, config.packing.token_budget, bench.counts)
    print(f"{describe_device()}; {' '.join(arguments.overrides)}")
    print(bench.describe(batch))
    losses = untrained_losses(bench.step, bench.trainable, batch.to(torch.device("cuda")))
    print(f"losses before training, without dropout: {losses}")
    padded = Padded.create(bench) if arguments.padded else None
    if padded is not None:
        with bench.trainable.backbone.stock_attention():
            print(f"the same, padded: {untrained_losses(padded.step, bench.trainable, padded.batch)}")
    median = run_packed(bench, batch, arguments.steps)
    print("packed: " + ", ".join(f"{key} {value:.4g}" for key, value in median.items()))
    print(compare_with_estimate(config, median["memory_peak_gib"]))
    if padded is not None:
        run_padded(bench, padded, median["step_seconds"])


if __name__ == "__main__":
    main()
