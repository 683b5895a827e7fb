"""Memory and time of the next-token loss: tiles against full logits, same work on both sides.

Peak extra memory is counted, not guessed from the resident set: every operation of forward and backward is watched, and the
bytes of all storages that were made and are still alive are added up. Hidden states and head exist before and do not count;
their gradients do, on both sides.

    python benchmarks/cross_entropy.py [--tokens 4096] [--vocabulary 49152] [--hidden 576] [--repeats 2]
"""

from __future__ import annotations

import argparse
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from unified_lm.batch import OutputHead
from unified_lm.objectives.cross_entropy import TILE_BYTES, linear_cross_entropy

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class PeakMemory(TorchDispatchMode):
    """Bytes of the storages that operations under it made, at their peak.

    Args:
        existing: tensors whose storages do not count.
    """

    def __init__(self, *existing: torch.Tensor) -> None:
        super().__init__()
        self._known = {tensor.untyped_storage()._cdata for tensor in existing}
        self.alive = 0
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count what it returned."""
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor):
                self._count(value.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size


def full_logits(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """What transformers does: all logits, upcast to float32, cross-entropy."""
    logits = (hidden @ weight.t()).float()
    return (F.cross_entropy(logits, targets, reduction="none") * weights).sum()


def tiles(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Ours."""
    return linear_cross_entropy(hidden, OutputHead(weight), targets, weights)


def measure(loss: Loss, tensors: tuple[torch.Tensor, ...], repeats: int) -> tuple[float, int, float]:
    """The loss, the peak of extra bytes, and the best seconds of forward and backward."""
    leaves = [tensor for tensor in tensors if tensor.requires_grad]
    with PeakMemory(*tensors) as memory:
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
