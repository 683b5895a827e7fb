"""What MONET is compared with, in the same skeleton: a sparse mixture of experts, and PEER (He 2024, arXiv:2407.04153).

Legend: T tokens, N experts, H heads, E = sqrt(N) keys of a side, K chosen ones, m hidden channels, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn
from transformers.activations import ACT2FN

from unified_lm.models.monet.configuration import MonetConfig


class SmoeRouter(nn.Module):
    """Chooses the K experts of a token, and weighs them by the softmax of their scores."""

    def __init__(self, config: MonetConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Raw scores `[T, N]`, and weights and numbers of the chosen experts `[T, K]`, of states `[T, D]`."""
        scores = nn.functional.linear(hidden, self.weight)
        best = scores.float().topk(self.top_k, dim=-1)
        return scores, best.values.softmax(-1).to(hidden.dtype), best.indices


class ExpertWeights(nn.Module):
    """Matrices of all experts, `[N, m, D]` and `[N, D, m]`."""

    def __init__(self, config: MonetConfig) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.empty(config.num_experts, config.moe_dim, config.hidden_size))
        self.down = nn.Parameter(torch.empty(config.num_experts, config.hidden_size, config.moe_dim))


class SparseExperts(nn.Module):
    """Experts of a hidden layer each, of which a token visits K. Tokens are sorted by expert."""

    def __init__(self, config: MonetConfig) -> None:
        super().__init__()
        self.act = ACT2FN[config.hidden_act]
        self.router = SmoeRouter(config)
        self.experts = ExpertWeights(config)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[T, D]` of `[T, D]`."""
        _, weights, chosen = self.router(hidden)
        order = chosen.flatten().argsort(stable=True)
        tokens = order // chosen.shape[1]
        ends = chosen.flatten().bincount(minlength=len(self.experts.up)).tolist()
        parts = hidden[tokens].split(ends)
        ups, downs = self.experts.up.unbind(0), self.experts.down.unbind(0)  # once: indexing has a gradient of all experts
        outputs = [self._expert(part, ups[number], downs[number]) for number, part in enumerate(parts) if len(part)]
        weighed = torch.cat(outputs) * weights.flatten()[order, None]
        return torch.zeros_like(hidden).index_add(0, tokens, weighed)

    def _expert(self, hidden: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(self.act(nn.functional.linear(hidden, up)), down)


class PeerExperts(nn.Module):
    """Experts of one hidden channel, found by product keys: the best K of each side, then the best K of their K * K sums."""

    def __init__(self, config: MonetConfig) -> None:
        super().__init__()
        self.act: Callable[[torch.Tensor], torch.Tensor] = ACT2FN[config.hidden_act]
        self.heads, self.top_k = config.moe_heads, config.moe_topk
        self.keys = math.isqrt(config.num_experts)
        self.w1, self.w2 = (nn.Linear(config.hidden_size // 2, self.heads * self.keys, bias=False) for _ in range(2))
        self.up = nn.Embedding(config.num_experts, config.hidden_size)
        self.down = nn.Embedding(config.num_experts, config.hidden_size)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[T, D]` of `[T, D]`."""
        weights, chosen = self.route(hidden)
        channels = self.act(torch.einsum("td,thkd->thk", hidden, self.up(chosen)))
        return torch.einsum("thk,thkd->td", weights.to(hidden.dtype) * channels, self.down(chosen))

    def route(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights (float32) and numbers of the experts that each head chose, `[T, H, K]`, of states `[T, D]`."""
        left, right = hidden.chunk(2, dim=-1)
        sides = (side.unflatten(-1, (self.heads, self.keys)).float() for side in (self.w1(left), self.w2(right)))
        first, second = (side.topk(self.top_k, dim=-1) for side in sides)
        sums = (first.values[..., :, None] + second.values[..., None, :]).flatten(-2)
        best = sums.topk(self.top_k, dim=-1)
        row = first.indices.gather(-1, best.indices // self.top_k)
        column = second.indices.gather(-1, best.indices % self.top_k)
        return best.values.softmax(-1), row * self.keys + column
