"""One GRIT step packed against the same samples padded to the longest of their kind.

SmolLM2-135M in bfloat16, 32 pairs and 8 chats with log-normal lengths of up to 256 tokens, forward and backward, at the
embedded recipe's temperature. The text is running text of pydocs; a pair's document is what follows its query. The padded side
is what the reference systems do: queries, documents and chats each in a padded batch of their own through stock transformers
(sdpa), queries and documents bidirectional. Losses are computed by the same functions on both sides.

Usage: python benchmarks/packed_vs_padded.py [repetitions]
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from unified_lm.batch import IGNORE, Batch, Sample, make_batch
from unified_lm.config.schema import ModelConfig
from unified_lm.core.allocator import keep_freed_memory
from unified_lm.core.distributed import local_device
from unified_lm.data.pydocs.dataset import pydocs_file
from unified_lm.data.rows.records import RecordKind
from unified_lm.engine.accounting.throughput import describe_device
from unified_lm.engine.embedding_term import EmbeddingTerm
from unified_lm.engine.step import GradCacheStep
from unified_lm.engine.training_module import PackOutput, TrainingModule
from unified_lm.models.backbone import Backbone
from unified_lm.models.loading import load_model
from unified_lm.models.pooling import pool
from unified_lm.objectives import ContrastiveConfig, NextTokenConfig, build_objective

WEIGHTS = {"embedding": 1.0, "generation": 1.0}
PROMPT = 12
TEMPERATURE = 0.05


def make_samples(
    tokenizer: PreTrainedTokenizerBase, num_pairs: int = 32, num_chats: int = 8, longest: int = 256
) -> list[Sample]:
    """Real text, cut to log-normal lengths: short queries, longer documents and chats."""
    random = np.random.default_rng(0)
    _, file = pydocs_file("text", "train", RecordKind.TEXT)
    rows = [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines()]

    def length(median: float) -> int:
        return int(np.clip(random.lognormal(np.log(median), 0.7), PROMPT + 4, longest))

    def text(count: int) -> np.ndarray:
        start = int(random.integers(len(rows) - 20))  # twenty rows in sequence are more than two of the longest samples
        return np.array(tokenizer("\n".join(rows[start : start + 20]))["input_ids"][:count])

    samples = []
    for group in range(num_pairs):
        sizes = length(30), length(60)
        for slot, ids in enumerate(np.split(text(sum(sizes)), [sizes[0]])):
            span = (0, len(ids))
            samples.append(
                Sample(input_ids=ids, stream="embedding", bidirectional=span, pool=(PROMPT, len(ids)), group=group, slot=slot)
            )
    for group in range(num_chats):
        ids = text(length(90))
        labels = np.where(np.arange(len(ids)) >= len(ids) // 3, ids, IGNORE)
        samples.append(Sample(input_ids=ids, stream="generation", labels=labels, group=group))
    return samples


def padded_forward(backbone: Backbone, batch: Batch, objective: Callable) -> Callable[..., PackOutput]:
    """A `forward` that runs the pack's samples in padded batches, one per kind, through stock transformers."""

    def forward(pack, *, tokens: bool = True) -> PackOutput:
        kinds: dict[tuple[str, int], list[int]] = {}
        for index, sample in enumerate(pack.samples):
            kinds.setdefault((sample.stream, sample.slot), []).append(index)
        parts, places = [], []
        for (stream, _), members in kinds.items():
            states, where = padded_states(backbone, pack, members, causal=stream == "generation")
            parts.append(states)
            places.append(where)
        hidden = torch.cat(parts)[torch.argsort(torch.cat(places))]
        embeddings = pool(hidden, pack.pool_spans, "mean")
        terms = {n: objective(hidden, backbone.output_head(), part) for n, part in pack.supervised.items()} if tokens else {}
        return PackOutput(embeddings, terms)

    return forward


def padded_states(backbone: Backbone, pack, members: list[int], causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """States of some samples through a padded batch: `[tokens, D]`, and where each token lies in the pack."""
    lengths = [pack.plan.lengths[index] for index in members]
    ids = torch.zeros(len(members), max(lengths), dtype=torch.int64, device=pack.input_ids.device)
    mask = torch.zeros_like(ids)
    for row, (index, length) in enumerate(zip(members, lengths, strict=True)):
        start = pack.plan.offsets[index]
        ids[row, :length] = pack.input_ids[start : start + length]
        mask[row, :length] = 1
    decoder = backbone.causal_lm.model
    states = decoder(input_ids=ids, attention_mask=mask, use_cache=False, is_causal=causal).last_hidden_state
    where = [torch.arange(pack.plan.offsets[i], pack.plan.offsets[i] + n) for i, n in zip(members, lengths, strict=True)]
    return states[mask.bool()], torch.cat(where).to(ids.device)


def main(repetitions: int = 3) -> None:
    """Print tokens, seconds, losses and the ratio."""
    keep_freed_memory()
    loaded = load_model(ModelConfig(source="embedded", name="smollm2-135m", family="llama"))
    samples = make_samples(loaded.tokenizer)
    counts = {"generation": float(sum(s.num_supervised for s in samples))}
    device = local_device()
    batch = make_batch(samples, 1_000_000, counts).to(device)
    next_token = build_objective(NextTokenConfig())
    contrastive = build_objective(ContrastiveConfig(temperature=TEMPERATURE))
    terms = [EmbeddingTerm({"embedding": contrastive}, WEIGHTS)]
    backbone = Backbone(loaded.causal_lm, "auto").to(device)
    trainable = TrainingModule(backbone, "mean", {"generation": next_token})
    sides = {"packed": trainable, "padded": padded_forward(backbone, batch, next_token)}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    losses = {}
    for _ in range(repetitions + 1):
        for name, forward in sides.items():
            loaded.causal_lm.zero_grad()
            started = now()
            if name == "padded":
                with backbone.stock_attention():
                    losses[name] = GradCacheStep(forward, torch.Tensor.backward, WEIGHTS, terms)(batch).by_stream
            else:
                losses[name] = GradCacheStep(forward, torch.Tensor.backward, WEIGHTS, terms)(batch).by_stream
            seconds[name].append(now() - started)
    report(samples, {name: values[1:] for name, values in seconds.items()}, losses)


def now() -> float:
    """Seconds, once the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def report(samples: list[Sample], seconds: dict[str, list[float]], losses: dict[str, dict[str, float]]) -> None:
    """Print what was measured; the first repetition warmed up and does not count."""
    real = sum(map(len, samples))
    kinds: dict[tuple[str, int], list[int]] = {}
    for sample in samples:
        kinds.setdefault((sample.stream, sample.slot), []).append(len(sample))
    padded = sum(len(lengths) * max(lengths) for lengths in kinds.values())
    print(describe_device(), end="; ")
    print(f"tokens: {real} packed, {padded} padded ({padded / real:.2f} times)")
    for name, values in seconds.items():
        shown = ", ".join(f"{stream} {loss:.5f}" for stream, loss in losses[name].items())
        print(f"{name}: median {statistics.median(values):.3f} s of {[round(v, 3) for v in values]}; losses: {shown}")
    ratios = [b / a for a, b in zip(seconds["packed"], seconds["padded"], strict=True)]
    print(f"packed is {statistics.median(ratios):.2f} times faster (per repetition: {[round(r, 2) for r in ratios]})")
    for stream, loss in losses["packed"].items():
        print(f"{stream}: relative difference of the losses {abs(loss - losses['padded'][stream]) / abs(loss):.1e}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
