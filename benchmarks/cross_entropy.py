"""Memory and time of the next-token loss: tiles against full logits, with the same work on both sides.

Peak extra memory is counted exactly (`LiveTensors`) and not read from the resident set. Hidden states and head exist before and
do not count; their gradients do, on both sides.

    python benchmarks/cross_entropy.py [--tokens 4096] [--vocabulary 49152] [--hidden 576] [--repeats 2]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from unified_lm.batch import OutputHead
from unified_lm.engine.accounting.live_tensors import LiveTensors
from unified_lm.objectives.cross_entropy import TILE_BYTES, linear_cross_entropy

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def full_logits(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The loss of transformers: all logits, upcast to float32, then cross-entropy."""
    logits = (hidden @ weight.t()).float()
    return (F.cross_entropy(logits, targets, reduction="none") * weights).sum()


def tiles(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Our loss, which computes logits in tiles."""
    return linear_cross_entropy(hidden, OutputHead(weight), targets, weights)


def measure(loss: Loss, tensors: tuple[torch.Tensor, ...], repeats: int) -> tuple[float, int, float]:
    """The loss, the peak of extra bytes, and the fastest forward and backward in seconds."""
    leaves = [tensor for tensor in tensors if tensor.requires_grad]
    with LiveTensors() as memory:
        value = loss(*tensors)
        value.backward()
    best = float("inf")
    for _ in range(repeats):
        for leaf in leaves:
            leaf.grad = None
        start = time.perf_counter()
        loss(*tensors).backward()
        best = min(best, time.perf_counter() - start)
    for leaf in leaves:
        leaf.grad = None
    return float(value.detach()), memory.peak, best


def main() -> None:
    """Print one line per dtype and kind of training."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()
    n, v, d = options.tokens, options.vocabulary, options.hidden
    print(
        f"{n} tokens, vocabulary {v}, hidden size {d}, {torch.get_num_threads()} threads, tiles of {TILE_BYTES / 2**20:.0f} MiB"
    )
    columns = f"{'full MB':>8} {'ours MB':>8} {'memory':>8} {'full s':>7} {'ours s':>7} {'time':>6} {'loss diff':>10}"
    print(f"{'weights':10} {'head':8} {columns}")
    for dtype in (torch.bfloat16, torch.float32):
        for trained in (True, False):
            generator = torch.Generator().manual_seed(0)
            hidden = torch.randn(n, d, generator=generator).to(dtype).requires_grad_()
            weight = (0.05 * torch.randn(v, d, generator=generator)).to(dtype).requires_grad_(trained)
            tensors = (hidden, weight, torch.randint(v, (n,), generator=generator), torch.full((n,), 1.0 / n))
            full, full_peak, full_time = measure(full_logits, tensors, options.repeats)
            ours, ours_peak, ours_time = measure(tiles, tensors, options.repeats)
            print(
                f"{str(dtype)[6:]:10} {'trained' if trained else 'frozen':8} {full_peak / 1e6:8.0f} {ours_peak / 1e6:8.0f} "
                f"{ours_peak / full_peak:8.3f} {full_time:7.2f} {ours_time:7.2f} {ours_time / full_time:6.2f} "
                f"{abs(ours / full - 1):10.1e}",
                flush=True,
            )


if __name__ == "__main__":
    main()
