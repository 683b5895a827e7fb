"""A published recipe at its real size on one GPU: tokens/s, MFU, and measured memory against the estimate of `dry_run`.

The model has the recipe's architecture and random weights (what a step costs does not depend on their values); samples are
random tokens with log-normal lengths up to the recipe's limits: queries of a median of 40 tokens, documents 180, chats 450.
The step is the engine's own: packs, GradCache, checkpointing, objectives, clipping, AdamW. Only batch sizes are the script's.

`--padded` runs the same samples the other way too: queries, documents and chats in padded batches of their own through stock
transformers, cut so that a padded batch holds at most as many positions as a pack has tokens; same objectives, same GradCache.

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
from unified_lm.engine.training_module import TrainingModule
from unified_lm.models.backbone import Backbone
from unified_lm.models.lora import apply_lora
from unified_lm.objectives import build_objective

GIB = 2**30
INSTRUCTION = 12
"""Tokens before a pool span begins."""
MEDIANS = {"query": 40, "document": 180, "chat": 450}


def make_samples(config: RunConfig, vocabulary: int, num_pairs: int, num_chats: int) -> list[Sample]:
    """Pairs and chats of random tokens, log-normal in length."""
    random = np.random.default_rng(0)

    def ids(kind: str, longest: int) -> np.ndarray:
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
    """Packs of one kind each, in the order of the data, whose padded positions are within the budget."""
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
    places = {id(sample): sample.group * size + sample.slot for sample in samples if sample.pool is not None}
    return replace(whole, packs=tuple(make_pack(rows, places) for rows in batches))


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
    trainable = build(config)
    samples = make_samples(config, trainable.backbone.vocab_size, arguments.pairs, arguments.chats)
    counts = {"generation": float(sum(sample.num_supervised for sample in samples))}
    backend = TorchBackend(trainable, config.optim)
    weights = {name: stream.objective.weight for name, stream in config.streams.items()}
    terms = [EmbeddingTerm({"embedding": objective(config, "embedding")}, weights)]
    clock = ComputeClock()
    step = GradCacheStep(clock.timed(backend.forward), clock.timed(backend.backward), weights, terms)
    meter = StepMeter(trainable, step, clock, recomputes=config.model.gradient_checkpointing)
    batch = make_batch(samples, config.packing.token_budget, counts)
    print(f"{describe_device()}; {' '.join(arguments.overrides)}")
    trained = sum(p.numel() for p in trainable.parameters() if p.requires_grad)
    print(f"{sum(p.numel() for p in trainable.parameters()) / 1e9:.2f} G parameters, {trained / 1e6:.1f} M trained; ", end="")
    print(f"{arguments.pairs} pairs, {arguments.chats} chats, {sum(map(len, samples))} tokens, {len(batch.packs)} packs")
    on_device = batch.to(torch.device("cuda"))
    print(f"losses before training, without dropout: {untrained_losses(step, trainable, on_device)}")
    padded = None
    if arguments.padded:
        other = padded_batch(samples, config.packing.token_budget, counts).to(torch.device("cuda"))
        forward = padded_forward(trainable.backbone, other, trainable.token_objectives["generation"])
        padded = Padded(other, GradCacheStep(forward, backend.backward, weights, terms))
        with trainable.backbone.stock_attention():
            print(f"the same, padded: {untrained_losses(padded.step, trainable, other)}")
    lines = []
    for index in range(arguments.steps + 1):
        torch.cuda.reset_peak_memory_stats()
        began = now()
        step(on_device)
        backend.update(1e-6, 1.0)
        seconds = now() - began
        line = meter(batch, seconds, 0.0)
        if index:
            lines.append(line)
    show = ("step_seconds", "tokens_per_second", "mfu", "hfu", "memory_peak_gib")
    median = {key: statistics.median(line[key] for line in lines) for key in show}
    print("packed: " + ", ".join(f"{key} {value:.4g}" for key, value in median.items()))
    found = estimate(config)
    parts = ", ".join(f"{part} {size / GIB:.2f}" for part, size in found.bytes_by_part.items() if size > GIB / 100)
    ratio = found.total_bytes / GIB / median["memory_peak_gib"]
    print(f"estimate of dry_run: {found.total_bytes / GIB:.2f} GiB ({parts}), {ratio:.2f} of what was measured")
    if padded is not None:
        run_padded(padded, trainable, lambda: backend.update(1e-6, 1.0), median["step_seconds"])


@dataclass
class Padded:
    """The same samples in padded batches, and the step over them."""

    batch: Batch
    step: GradCacheStep


def run_padded(padded: Padded, trainable: TrainingModule, update: Callable[[], float], packed_seconds: float) -> None:
    """The same step over padded batches of stock transformers."""
    seconds = []
    torch.cuda.reset_peak_memory_stats()
    with trainable.backbone.stock_attention():
        for _ in range(3):
            began = now()
            padded.step(padded.batch)
            update()
            seconds.append(now() - began)
    fastest, peak = min(seconds[1:]), torch.cuda.max_memory_allocated() / GIB
    packs = padded.batch.packs
    positions = sum(len(pack.samples) * max(pack.plan.lengths) for pack in packs)
    print(
        f"padded: {len(packs)} batches, {positions} positions, step_seconds {fastest:.4g}, memory_peak_gib {peak:.4g}; ", end=""
    )
    print(f"packed is {fastest / packed_seconds:.2f} times as fast")


def untrained_losses(step: GradCacheStep, trainable: TrainingModule, batch: Batch) -> str:
    """Losses of the step's streams with the weights as they are."""
    trainable.eval()
    losses = step.losses_only(batch).by_stream
    trainable.train()
    return ", ".join(f"{stream} {loss:.5f}" for stream, loss in losses.items())


if __name__ == "__main__":
    main()
