"""What routing costs beside hidden states, and what the published way of computing both costs.

A mixture of experts with random weights (OLMoE's architecture; `--hidden`, `--layers`, `--experts`), texts of random tokens, on
the CPU. In turns, so that a slow minute of the machine meets all of them:

    hs          pooled hidden states, packed
    moee_sum    hidden states and routing of the same forward, packed
    published   a padded batch through the whole model; logits of the vocabulary, all hidden states and all routings are kept

Memory is the growth of the process's peak in a process of its own for each way.

Usage: python benchmarks/moee.py [--texts 64] [--repeats 5]
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import OlmoeConfig, OlmoeForCausalLM

from unified_lm.batch import Sample
from unified_lm.models.backbone import Backbone
from unified_lm.models.embedding import embed_samples
from unified_lm.models.moee import RoutedPooling, WeightedBlocks
from unified_lm.models.pooling import Pooling
from unified_lm.models.routing import Routers

Way = Callable[[], torch.Tensor]


def ways(options: argparse.Namespace) -> dict[str, Way]:
    """The three ways of embedding the same texts."""
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=50_304,
        hidden_size=options.hidden,
        intermediate_size=options.hidden // 2,
        num_hidden_layers=options.layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        num_experts=options.experts,
        num_experts_per_tok=8,
        pad_token_id=0,
    )
    model = OlmoeForCausalLM(config).eval()
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(3.6, 0.7, options.texts), 4, 256).astype(int)
    texts = [rng.integers(1, config.vocab_size, length) for length in lengths]
    samples = [Sample(input_ids=ids, stream="s", pool=(0, len(ids))) for ids in texts]
    backbone = Backbone(model, "sdpa").eval()
    routers = Routers(backbone)
    blocks = WeightedBlocks(backbone.hidden_size, 1.0)

    def packed(pooling: Pooling | RoutedPooling, head: torch.nn.Module | None = None) -> torch.Tensor:
        return embed_samples(backbone, samples, pooling, token_budget=4096, device="cpu", projection=head)

    @torch.no_grad()
    def published() -> torch.Tensor:
        found = []
        with backbone.stock_attention() as stock:
            for start in range(0, len(texts), 16):
                part = texts[start : start + 16]
                longest = max(map(len, part))
                ids = torch.tensor(np.array([np.pad(ids, (longest - len(ids), 0)) for ids in part]))
                out = stock(
                    input_ids=ids,
                    attention_mask=(ids > 0).long(),
                    output_hidden_states=True,
                    output_router_logits=True,
                    use_cache=False,
                )
                routing = [logits.view(len(part), longest, -1)[:, -1].softmax(-1) for logits in out.router_logits]
                found.append(blocks(torch.cat([out.hidden_states[-1][:, -1], *routing], dim=1)))
        return torch.cat(found)

    return {
        "hs": lambda: packed(Pooling.LAST_TOKEN),
        "moee_sum": lambda: packed(RoutedPooling(routers, Pooling.LAST_TOKEN), blocks),
        "published": published,
    }


def resident(field: str) -> int:
    """Kilobytes of memory of this process, now ("VmRSS") or at most ("VmHWM")."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def peak(name: str, options: argparse.Namespace, queue: multiprocessing.Queue[float]) -> None:
    """Megabytes that one way needs beside the model."""
    way = ways(options)[name]
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmRSS")
    way()
    queue.put((resident("VmHWM") - before) / 1024)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--experts", type=int, default=64)
    options = parser.parse_args()
    found = ways(options)
    vectors = {name: way() for name, way in found.items()}
    print("the published way gives the same vectors:", torch.allclose(vectors["moee_sum"], vectors["published"], atol=1e-4))
    seconds: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(options.repeats):
        for name, way in found.items():
            started = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - started)
    ratios = {name: [s / h for s, h in zip(times, seconds["hs"], strict=True)] for name, times in seconds.items()}
    queue: multiprocessing.Queue[float] = multiprocessing.get_context("spawn").Queue()
    for name, times in seconds.items():
        process = multiprocessing.get_context("spawn").Process(target=peak, args=(name, options, queue))
        process.start()
        grown = queue.get()
        process.join()
        print(
            f"{name:10s} {statistics.median(times):.2f} s, {statistics.median(ratios[name]):.3f} of hs "
            f"({min(ratios[name]):.3f} to {max(ratios[name]):.3f}), peak + {grown:.0f} MB"
        )


if __name__ == "__main__":
    main()
