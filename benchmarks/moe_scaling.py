"""Time, parameters and memory of one layer against the number of its experts: SMoE, PEER, MONET horizontal and vertical.

One layer of a router and experts at a small width, forward and backward on the CPU in float32, in turns. Exponents are slopes
in log-log over the larger half of the sizes. A layer whose weights do not fit (`--most-gib`) is counted, not run.

Routing is sparse in all four, execution only in SMoE and PEER: MONET runs the halves of all E = sqrt(N) keys for every token,
as a dense layer of E * m channels does (column "multiply-adds"), and pays for N experts what that costs.

Usage: python benchmarks/moe_scaling.py [--tokens 256] [--plot docs/images/moe-scaling.png]
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from unified_lm.engine.accounting.live_tensors import LiveTensors
from unified_lm.models.monet import MonetConfig
from unified_lm.models.monet.baselines import PeerExperts, SparseExperts
from unified_lm.models.monet.experts import HorizontalExperts, VerticalExperts
from unified_lm.models.monet.router import MonetRouter, score_moments

WIDTH, CHANNELS, HEADS = 256, 8, 4
SIZES = (256, 1024, 4096, 16384, 65536, 262144)
LAYERS: dict[str, type[nn.Module]] = {"monet vertical": VerticalExperts, "monet horizontal": HorizontalExperts}


class Monet(nn.Module):
    """A router and experts."""

    def __init__(self, config: MonetConfig, experts: type[nn.Module]) -> None:
        super().__init__()
        self.router, self.experts = MonetRouter(config), experts(config)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[T, D]` of `[T, D]`."""
        output: torch.Tensor = self.experts(hidden, self.router(hidden)[0])
        return output


def make(kind: str, count: int) -> nn.Module:
    """A layer with so many experts, without weights."""
    keys = math.isqrt(count)
    config = MonetConfig(
        hidden_size=WIDTH,
        num_attention_heads=4,
        vocab_size=8,
        moe_experts=keys,
        moe_dim=CHANNELS,
        moe_heads=HEADS,
        moe_topk=max(1, keys // 16),
        num_experts=count,
        num_experts_per_tok=2,
        feed_forward={"smoe": "smoe", "peer": "peer"}.get(kind, "monet"),
        moe_decompose="horizontal" if kind.endswith("horizontal") else "vertical",
    )
    with torch.device("meta"):
        if kind in LAYERS:
            return Monet(config, LAYERS[kind])
        if kind == "peer":
            config.moe_topk = 8
            return PeerExperts(config)
        return SparseExperts(config)


def multiply_adds(kind: str, count: int) -> int:
    """Of a token's forward: matrices, and what mixes them."""
    keys = math.isqrt(count)
    if kind == "smoe":
        return WIDTH * count + 2 * 2 * CHANNELS * WIDTH
    if kind == "peer":
        return HEADS * keys * WIDTH + 2 * HEADS * 8 * WIDTH
    routed = 2 * HEADS * keys * WIDTH
    halves = 2 * keys * CHANNELS * WIDTH + keys * WIDTH
    return routed + halves + 4 * HEADS * keys * CHANNELS


def draw(layer: nn.Module, hidden: torch.Tensor) -> nn.Module:
    """The layer with random weights; a router learns its statistics."""
    drawn = layer.to_empty(device="cpu")
    for parameter in drawn.parameters():
        nn.init.normal_(parameter, std=0.02)
    if isinstance(drawn, Monet):
        for norm in (drawn.router.norm1, drawn.router.norm2):
            norm.reset_running_stats()
        with torch.no_grad():
            drawn.router.observe(score_moments(drawn.router(hidden)[1]), first=True)
    return drawn


def step(layer: nn.Module, hidden: torch.Tensor) -> None:
    """Forward and backward."""
    output = layer(hidden.detach().requires_grad_())
    output.backward(torch.ones_like(output))


def seconds(run: Callable[[], None]) -> float:
    """Of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def exponent(sizes: list[int], values: list[float]) -> float:
    """Slope in log-log over the larger half of the sizes."""
    half = max(2, len(sizes) // 2)
    return float(np.polyfit(np.log(sizes[-half:]), np.log(values[-half:]), 1)[0])


def main() -> None:
    """Measure, print and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--most-gib", type=float, default=1.5, help="weights of a layer that is still run")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    hidden = torch.randn(options.tokens, WIDTH)
    kinds = ("smoe", "peer", *LAYERS)
    parameters: dict[str, list[float]] = {kind: [] for kind in kinds}
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    memory: dict[str, list[float]] = {kind: [] for kind in kinds}
    print("| experts | layer | parameters | multiply-adds a token | forward + backward, ms | memory at most, MB |")
    print("| --- | --- | --- | --- | --- | --- |")
    for count in SIZES:
        layers = {kind: make(kind, count) for kind in kinds}
        for kind, layer in layers.items():
            parameters[kind].append(sum(parameter.numel() for parameter in layer.parameters()))
        fitting = {k: draw(layer, hidden) for k, layer in layers.items() if 4 * parameters[k][-1] < options.most_gib * 2**30}
        found: dict[str, list[float]] = {kind: [] for kind in fitting}
        for _ in range(options.repeats + 1):  # the first is not counted
            for kind, layer in fitting.items():
                layer.zero_grad(set_to_none=False)
                found[kind].append(seconds(lambda layer=layer: step(layer, hidden)))  # type: ignore[misc]
        for kind in kinds:
            cells = ["not run", "not run"]
            if kind in fitting:
                fitting[kind].zero_grad(set_to_none=False)
                with LiveTensors() as live:
                    step(fitting[kind], hidden)
                times[kind].append(statistics.median(found[kind][1:]))
                memory[kind].append(live.peak / 2**20)
                cells = [f"{1000 * times[kind][-1]:.1f}", f"{memory[kind][-1]:.0f}"]
            counts = f"{parameters[kind][-1] / 1e6:.2f} M | {multiply_adds(kind, count) / 1e6:.2f} M"
            print(f"| {count:,} | {kind} | {counts} | {' | '.join(cells)} |", flush=True)
    print("\nexponents of N:")
    for kind in kinds:
        own = list(SIZES)
        shown = f"{kind}: parameters {exponent(own, parameters[kind]):.2f}"
        if len(times[kind]) > 2:
            run = own[: len(times[kind])]
            shown += f", time {exponent(run, times[kind]):.2f}, memory {exponent(run, memory[kind]):.2f} (to N = {run[-1]:,})"
        print(shown)
    if options.plot:
        plot(options.plot, parameters, times, memory)


def plot(path: Path, *panels: dict[str, list[float]]) -> None:
    """One panel each of parameters, time and memory."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    names = ("parameters", "forward + backward, s", "memory at most, MB")
    for axes, name, panel in zip(figure.subplots(1, 3), names, panels, strict=True):
        for kind, values in panel.items():
            slope = f" (N^{exponent(list(SIZES[: len(values)]), values):.2f})" if len(values) > 2 else ""
            axes.loglog(SIZES[: len(values)], values, marker="o", markersize=3, label=kind + slope)
        axes.set(xlabel="experts N", ylabel=name)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
