"""A LoRA training step against full fine-tuning of the same batch on the CPU.

SmolLM2-135M in bfloat16; one batch of 8 x 128 tokens through stock causal attention; the loss is the mean cross-entropy at 200
positions; forward, backward, clipping and an AdamW step on float32 master weights. Repetitions are interleaved, so that another
process on the machine disturbs all contestants alike.

    python benchmarks/lora_step.py [--repetitions 5] [--threads 2] [--peft]

`--peft` adds peft's own layers, as `get_peft_model` makes them (float32 adapters, torch's dropout).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from unified_lm.config.schema import LoraConfig
from unified_lm.models.embedded import embedded_directory
from unified_lm.models.lora import apply_lora

SHAPE = (8, 128)
NUM_SUPERVISED = 200
LORA = LoraConfig(r=16, alpha=32.0, dropout=0.05)


class MasterAdamW:
    """AdamW on float32 copies of bfloat16 parameters."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        self.parameters = parameters
        self.masters = [p.detach().float().clone() for p in parameters]
        self.optimizer = torch.optim.AdamW(self.masters, lr=1e-5, fused=True)

    def step(self) -> None:
        """One update of the masters, copied back."""
        for master, parameter in zip(self.masters, self.parameters, strict=True):
            master.grad = parameter.grad.float() if parameter.grad is not None else None
            parameter.grad = None
        torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.masters)


def load(attention: str = "sdpa") -> PreTrainedModel:
    """The embedded model in bfloat16, in training mode."""
    model = AutoModelForCausalLM.from_pretrained(embedded_directory(), dtype=torch.bfloat16, attn_implementation=attention)
    return model.train()


def stock_peft(model: PreTrainedModel) -> PreTrainedModel:
    """The model with adapters as peft's own `get_peft_model` makes them; returns the inner causal language model."""
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    config = PeftConfig(r=LORA.r, lora_alpha=LORA.alpha, lora_dropout=LORA.dropout, target_modules="all-linear")
    return get_peft_model(model, config).base_model.model


def step_of(model: PreTrainedModel, seed: int = 0) -> Callable[[], float]:
    """A function that takes one training step and returns the loss."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(100, model.config.vocab_size, SHAPE, generator=generator)
    positions = torch.randperm(tokens.numel(), generator=generator)[:NUM_SUPERVISED]
    targets = torch.randint(100, model.config.vocab_size, (NUM_SUPERVISED,), generator=generator)
    optimizer = MasterAdamW([p for p in model.parameters() if p.requires_grad])

    def step() -> float:
        hidden = model.model(input_ids=tokens, use_cache=False)[0].flatten(0, 1)[positions]
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden).float(), targets)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def main() -> None:
    """Run, and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--peft", action="store_true", help="also time peft's own layers")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    adapted = load()
    report = apply_lora(adapted, LORA, seed=0)
    contestants = {"full fine-tuning": step_of(load()), "LoRA (ours)": step_of(adapted)}
    if arguments.peft:
        contestants["LoRA (stock peft)"] = step_of(stock_peft(load()))
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    processor: dict[str, list[float]] = {name: [] for name in contestants}
    for repetition in range(arguments.repetitions + 1):
        for name, step in contestants.items():
            start, start_processor = time.perf_counter(), time.process_time()
            step()
            if repetition:  # the first one warms up
                seconds[name].append(time.perf_counter() - start)
                processor[name].append(time.process_time() - start_processor)

    num_tokens = SHAPE[0] * SHAPE[1]
    print(f"{num_tokens} tokens, {arguments.threads} threads, {arguments.repetitions} repetitions; LoRA r={LORA.r}, ", end="")
    print(f"dropout {LORA.dropout}, {len(report.targets)} modules, {report.num_trainable:,} of {report.num_total:,} parameters")
    print(f"{'':20}{'median s':>10}{'fastest s':>11}{'tokens/s':>10}{'CPU s':>8}   faster than full by median, fastest, CPU")
    first = next(iter(contestants))
    for name in contestants:
        mine, base = _summary(seconds[name], processor[name]), _summary(seconds[first], processor[first])
        ratios = "  ".join(f"{b / m:5.2f}" for b, m in zip(base, mine, strict=True))
        print(f"{name:20}{mine[0]:10.2f}{mine[1]:11.2f}{num_tokens / mine[0]:10.0f}{mine[2]:8.2f}   {ratios}")


def _summary(seconds: list[float], processor: list[float]) -> tuple[float, float, float]:
    """Median and fastest wall time, and median processor time (which other processes disturb least), in seconds."""
    return statistics.median(seconds), min(seconds), statistics.median(processor)


if __name__ == "__main__":
    main()
