"""A LoRA training step against full fine-tuning of the same batch on the CPU, through the engine.

SmolLM2-135M in bfloat16; one pack of 8 samples of 128 tokens, causal, 200 supervised positions; a whole optimizer step:
forward, backward, clipping, AdamW on float32 master weights. Each contestant is a process of its own, as a training run is: in
one process the heap that full fine-tuning leaves behind slows LoRA's steps. One process works while the others wait, step by
step in turn, so that whatever else runs on the machine disturbs all alike.

    python benchmarks/lora_step.py [--repetitions 20] [--threads 2] [--peft]

Steps of the two that follow each other make a pair; the ratio is the median over pairs, with its 95 % interval (bootstrap).
`--peft` adds peft's own layers, as `get_peft_model` makes them (float32 adapters, torch's dropout), in the same engine.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import numpy as np
import torch
from transformers import PreTrainedModel

from unified_lm.batch import IGNORE, Batch, Sample, make_batch
from unified_lm.config.schema import LoraConfig, ModelConfig, OptimConfig
from unified_lm.core.allocator import keep_freed_memory
from unified_lm.engine.backends.backend import TorchBackend
from unified_lm.engine.step import GradCacheStep
from unified_lm.engine.training_module import TrainingModule
from unified_lm.evaluation.bootstrap import bootstrap_interval
from unified_lm.models.backbone import Backbone
from unified_lm.models.loading import load_model
from unified_lm.models.lora import apply_lora
from unified_lm.objectives import NextTokenConfig, build_objective

NUM_SAMPLES, LENGTH, NUM_SUPERVISED = 8, 128, 200
LORA = LoraConfig(r=16, alpha=32.0, dropout=0.05)
FULL, OURS, STOCK = "full fine-tuning", "LoRA (ours)", "LoRA (stock peft)"
WARM_UP = 2


def load() -> PreTrainedModel:
    """The embedded model in bfloat16."""
    return load_model(ModelConfig(source="embedded", name="smollm2-135m", family="llama")).causal_lm


def stock_peft(model: PreTrainedModel) -> PreTrainedModel:
    """The model with adapters as peft's own `get_peft_model` makes them; returns the inner causal language model."""
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    config = PeftConfig(r=LORA.r, lora_alpha=LORA.alpha, lora_dropout=LORA.dropout, target_modules="all-linear")
    return get_peft_model(model, config).base_model.model


def make_samples(vocabulary: int) -> Batch:
    """One pack of random tokens."""
    random = np.random.default_rng(0)
    samples = []
    for group in range(NUM_SAMPLES):
        ids = random.integers(100, vocabulary, size=LENGTH)
        labels = np.full(LENGTH, IGNORE)
        chosen = 1 + random.permutation(LENGTH - 1)[: NUM_SUPERVISED // NUM_SAMPLES]
        labels[chosen] = ids[chosen]
        samples.append(Sample(input_ids=ids, stream="text", labels=labels, group=group))
    return make_batch(samples, NUM_SAMPLES * LENGTH, {"text": float(NUM_SUPERVISED)})


def step_of(model: PreTrainedModel) -> Callable[[], None]:
    """A function that takes one optimizer step."""
    objective = build_objective(NextTokenConfig())
    trainable = TrainingModule(Backbone(model, "sdpa"), "mean", {"text": objective}).train()
    backend = TorchBackend(trainable, OptimConfig())
    losses = GradCacheStep(backend.forward, backend.backward, {"text": 1.0})
    batch = make_samples(model.config.vocab_size)

    def step() -> None:
        losses(batch)
        backend.update(1e-5, 1.0)

    return step


def work(name: str, threads: int, end: Connection) -> None:
    """A contestant's process: take a step whenever told to, and answer with its seconds."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    model, report = load(), (0, 0, 0)
    if name == OURS:
        applied = apply_lora(model, LORA, seed=0)
        report = len(applied.targets), applied.num_trainable, applied.num_total
    step = step_of(stock_peft(model) if name == STOCK else model)
    end.send(report)
    while end.recv():
        start = time.perf_counter()
        step()
        end.send(time.perf_counter() - start)


def main() -> None:
    """Run, and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--peft", action="store_true", help="also time peft's own layers")
    arguments = parser.parse_args()
    if arguments.repetitions < 2:
        parser.error(f"--repetitions is {arguments.repetitions}; an interval needs at least 2.")
    names = [FULL, OURS, *([STOCK] if arguments.peft else [])]
    context = multiprocessing.get_context("spawn")
    ends, reports = {}, {}
    for name in names:
        ends[name], theirs = context.Pipe()
        context.Process(target=work, args=(name, arguments.threads, theirs), daemon=True).start()
        reports[name] = ends[name].recv()  # one after the other: loading two models at once takes longer
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for repetition in range(arguments.repetitions + WARM_UP):
        for name, end in ends.items():
            end.send(True)
            taken = end.recv()
            if repetition >= WARM_UP:
                seconds[name].append(taken)
    for end in ends.values():
        end.send(False)
    modules, trainable, total = reports[OURS]
    num_tokens = NUM_SAMPLES * LENGTH
    print(f"{num_tokens} tokens, {arguments.threads} threads, {arguments.repetitions} repetitions; LoRA r={LORA.r}, ", end="")
    print(f"dropout {LORA.dropout}, {modules} modules, {trainable:,} of {total:,} parameters")
    full = seconds[FULL]
    for name, values in seconds.items():
        median = statistics.median(values)
        print(f"{name:20} median {median:.2f} s, fastest {min(values):.2f} s, {num_tokens / median:.0f} tokens/s", end="")
        if name != FULL:
            ratio = bootstrap_interval(lambda ratios: float(np.median(ratios)), np.divide(full, values))
            print(f", {ratio.value:.2f} times as fast as full fine-tuning ({ratio.low:.2f} to {ratio.high:.2f})", end="")
        print()


if __name__ == "__main__":
    main()
