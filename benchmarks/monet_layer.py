"""Forward and backward of one MONET layer at the shape of the 850M model, in four ways that give the same numbers.

In turns, on the CPU in float32, so that a slow minute of the machine meets all of them:

    by hand      `models.monet.experts`, with its own backward
    by autograd  the same layer, one call after another
    published    the einsums of the published code, which contract the key before the head; gates must sum to one
    as written   the sum over pairs first, as the formula has it: `[tokens, heads, E, E]`. Only where that is below 3 GiB

Memory is what tensors hold, beside weights, inputs and the sums of weights' gradients, in which those of earlier packs are.

Usage: python benchmarks/monet_layer.py [--tokens 1024] [--kind vertical] [--repeats 5]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from unified_lm.engine.accounting.live_tensors import LiveTensors
from unified_lm.models.monet import MonetConfig, experts
from unified_lm.models.monet.experts import HorizontalExperts, VerticalExperts
from unified_lm.models.monet.router import MonetRouter, score_moments

SHAPE: dict[str, Any] = {"hidden_size": 1536, "num_attention_heads": 12, "moe_dim": 12, "moe_heads": 6, "vocab_size": 8}
LAYERS = {"vertical": VerticalExperts, "horizontal": HorizontalExperts}
_MOST_BYTES = 3 << 30

Way = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def make(kind: str, tokens: int) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A layer, states `[T, D]` and the gates that a router with statistics of its own gives them."""
    torch.manual_seed(0)
    config = MonetConfig(**SHAPE, num_hidden_layers=4, moe_decompose=kind)
    router, layer = MonetRouter(config), LAYERS[kind](config)
    for parameter in (*router.parameters(), *layer.parameters()):
        nn.init.normal_(parameter, std=0.02)
    hidden = torch.randn(tokens, SHAPE["hidden_size"])
    with torch.no_grad():
        router.observe(score_moments(router(hidden)[1]), first=True)
        gates, _ = router(hidden)
    return layer, hidden, gates


def published(layer: Any, hidden: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """The published order of contractions."""
    first, second = gates.unbind(1)
    keys = gates.shape[-1]

    def values(up: nn.Linear) -> torch.Tensor:
        return torch.relu(up(hidden)).square().view(len(hidden), keys, -1)

    if isinstance(layer, HorizontalExperts):
        mixed = torch.einsum("tim,thi,thj->tjm", values(layer.u), first, second)
        return layer.v(mixed.flatten(1)) + torch.einsum("thj,jd->td", second, layer.b)
    left, right = values(layer.u1), values(layer.u2)
    top = layer.v11((left * first.sum(1)[..., None]).flatten(1))
    top = top + layer.v12(torch.einsum("tjm,thj,thi->tim", right, second, first).flatten(1))
    top = top + torch.einsum("thi,id->td", first, layer.b1)
    bottom = layer.v21(torch.einsum("tim,thi,thj->tjm", left, first, second).flatten(1))
    bottom = bottom + layer.v22((right * second.sum(1)[..., None]).flatten(1))
    return torch.cat([top, bottom + torch.einsum("thj,jd->td", second, layer.b2)], dim=-1)


def as_written(layer: Any, hidden: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """The weight of every pair first, then the experts' halves."""
    first, second = gates.unbind(1)
    keys = gates.shape[-1]
    pairs = torch.einsum("thi,thj->thij", first, second)

    def values(up: nn.Linear) -> torch.Tensor:
        return torch.relu(up(hidden)).square().view(len(hidden), keys, -1)

    if isinstance(layer, HorizontalExperts):
        mixed = torch.einsum("thij,tim->tjm", pairs, values(layer.u))
        return layer.v(mixed.flatten(1)) + torch.einsum("thij,jd->td", pairs, layer.b)
    left, right = values(layer.u1), values(layer.u2)
    top = layer.v11(torch.einsum("thij,tim->tim", pairs, left).flatten(1))
    top = top + layer.v12(torch.einsum("thij,tjm->tim", pairs, right).flatten(1)) + torch.einsum("thij,id->td", pairs, layer.b1)
    bottom = layer.v21(torch.einsum("thij,tim->tjm", pairs, left).flatten(1))
    bottom = bottom + layer.v22(torch.einsum("thij,tjm->tjm", pairs, right).flatten(1))
    return torch.cat([top, bottom + torch.einsum("thij,jd->td", pairs, layer.b2)], dim=-1)


def by_autograd(layer: Any, hidden: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """The layer without its own backward."""
    plain, experts._are_plain = experts._are_plain, lambda linears: False
    try:
        output: torch.Tensor = layer(hidden, gates)
    finally:
        experts._are_plain = plain
    return output


def ways(layer: Any, tokens: int) -> dict[str, Way]:
    """Those that fit."""
    found: dict[str, Way] = {
        "by hand": layer,
        "by autograd": lambda hidden, gates: by_autograd(layer, hidden, gates),
        "published": lambda hidden, gates: published(layer, hidden, gates),
    }
    if 4 * tokens * SHAPE["moe_heads"] * layer.keys**2 < _MOST_BYTES:
        found["as written"] = lambda hidden, gates: as_written(layer, hidden, gates)
    return found


def step(way: Way, layer: nn.Module, hidden: torch.Tensor, gates: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Forward and backward; the output, and the gradient of the states."""
    layer.zero_grad(set_to_none=False)
    states = hidden.detach().requires_grad_()
    output = way(states, gates.detach().requires_grad_())
    output.backward(torch.ones_like(output))
    assert states.grad is not None
    return output.detach(), states.grad


def held(way: Way, layer: nn.Module, hidden: torch.Tensor, gates: torch.Tensor) -> tuple[float, float]:
    """Megabytes that tensors hold between forward and backward, and at most; counted tensor by tensor."""
    layer.zero_grad(set_to_none=False)
    states, weights = hidden.detach().requires_grad_(), gates.detach().requires_grad_()
    with LiveTensors() as live:
        output = way(states, weights)
        kept = live.now - output.nbytes
        output.backward(torch.ones_like(output))
    return kept / 2**20, live.peak / 2**20


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--kind", choices=sorted(LAYERS), default="vertical")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    layer, hidden, gates = make(options.kind, options.tokens)
    found = ways(layer, options.tokens)
    expected = step(found["by hand"], layer, hidden, gates)
    for name, way in found.items():
        for one, other in zip(step(way, layer, hidden, gates), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
        print(f"{name}: the same numbers")
    seconds: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(options.repeats):
        for name, way in found.items():
            started = time.perf_counter()
            step(way, layer, hidden, gates)
            seconds[name].append(time.perf_counter() - started)
    print(f"{options.kind}, {options.tokens} tokens, {torch.get_num_threads()} threads")
    for name, measured in seconds.items():
        kept, most = held(found[name], layer, hidden, gates)
        ratio = statistics.median(one / own for one, own in zip(measured, seconds["by hand"], strict=True))
        own = f"{statistics.median(measured):7.3f} s  {ratio:5.2f} times by hand"
        print(f"{name:12} {own}  {kept:8.1f} MB kept for the backward  {most:8.1f} MB at most")


if __name__ == "__main__":
    main()
