"""Attention over packs on CPU: dense groups against torch's fused attention, one call per sequence.

Both do the same work, forward and backward, in one run. Times are CPU seconds of one thread by default, which depend little on
other load. First by sequence length (the source of the limits in `models/attention/sdpa.py`), then on packs of realistic
lengths.

    python benchmarks/attention.py [--heads 9 3 64] [--threads 1]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from unified_lm.batch import AttentionPlan
from unified_lm.models.attention import Heads, SdpaKernel
from unified_lm.models.attention.grouped import group_by_length

TOKENS = 2048
"""Tokens of every pack measured."""


def lognormal_lengths(tokens: int, seed: int = 0, low: int = 10, high: int = 256) -> list[int]:
    """Lengths of sentences and passages: log-normal, median 40 tokens, sigma 0.8, cut to `[low, high]`."""
    draws = np.random.default_rng(seed).lognormal(np.log(40), 0.8, tokens).clip(low, high).astype(int)
    count = int(np.searchsorted(np.cumsum(draws), tokens))
    return [int(length) for length in draws[: max(count, 1)]]


def make_step(
    lengths: Sequence[int], shape: tuple[int, int, int], dtype: torch.dtype, kernel: SdpaKernel, dropout: float
) -> Callable[[], None]:
    """A function that runs forward and backward of one layer over a pack whose samples are one quarter causal."""
    num_heads, num_kv, size = shape
    spans = [(0, 0) if index % 4 == 0 else (0, length) for index, length in enumerate(lengths)]
    plan, total = AttentionPlan.build(lengths, spans), sum(lengths)
    q, k, v = (torch.randn(total, n, size, dtype=dtype, requires_grad=True) for n in (num_heads, num_kv, num_kv))
    heads = Heads(q, k, v, plan, scaling=size**-0.5, dropout=dropout)
    grad = torch.randn(total, num_heads, size, dtype=dtype)

    def step() -> None:
        """One forward and backward."""
        torch.autograd.grad(kernel(heads), (q, k, v), grad)

    return step


def seconds(step: Callable[[], None], clock: Callable[[], float], repeats: int) -> float:
    """Median time of a step after two warm-ups."""
    step(), step()
    times = []
    for _ in range(repeats):
        begin = clock()
        step()
        times.append(clock() - begin)
    return float(np.median(times))


def compare(label: str, lengths: Sequence[int], args: argparse.Namespace, dtype: torch.dtype, dropout: float = 0.0) -> None:
    """Print one line: milliseconds of both formulations and their ratio."""
    clock = time.process_time if args.threads == 1 else time.perf_counter
    shape = tuple(args.heads)
    fused = seconds(make_step(lengths, shape, dtype, SdpaKernel(longest_grouped=0), dropout), clock, args.repeats)
    dense = seconds(make_step(lengths, shape, dtype, SdpaKernel(longest_grouped=4096), dropout), clock, args.repeats)
    name = str(dtype).removeprefix("torch.")
    print(f"{name:>9} {label:<34} per sequence {1e3 * fused:7.1f} ms   grouped {1e3 * dense:7.1f} ms   {fused / dense:5.2f}x")


def main() -> None:
    """Run all comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--heads", type=int, nargs=3, default=(9, 3, 64), help="query heads, key heads, head size (SmolLM2-135M)"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for dtype in (torch.bfloat16, torch.float32):
        for length in (16, 32, 64, 128, 256, 384, 512, 1024):
            compare(f"{TOKENS // length} x {length} tokens", [length] * (TOKENS // length), args, dtype)
        lengths = lognormal_lengths(TOKENS)
        groups = len(group_by_length(lengths))
        compare(f"{len(lengths)} log-normal in {groups} groups", lengths, args, dtype)
        compare("the same, attention dropout 0.1", lengths, args, dtype, dropout=0.1)


if __name__ == "__main__":
    main()
