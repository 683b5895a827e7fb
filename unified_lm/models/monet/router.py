"""MONET's router: for each head two lists of keys, whose product addresses one expert of E * E.

Only the softmax of the chosen keys' raw scores weighs experts. Which keys are chosen is a question to a normalized score: above
the quantile `1 - moe_topk / E` of a standard normal, or, where none is, the best one. Mean and variance belong to a head and a
side, over tokens and keys, and are what training has seen so far. The published code normalizes by those of the batch while it
trains, so that a token's experts depend on its neighbors, on the pack and on the rank. Here they are updated once a step, from
all packs of all ranks (`engine.routing_spread`), and are constants of a forward: packs and ranks change nothing.

Legend: E keys of a side, H heads, D hidden size; the two sides come first, so gates are `[..., 2, H, E]`.
"""

from __future__ import annotations

from statistics import NormalDist
from typing import cast

import torch
from torch import nn

from unified_lm.models.monet.configuration import MonetConfig


class MonetRouter(nn.Module):
    """Gates of the layers of a group.

    Args:
        config: of the model.

    Attributes:
        w1, w2: scores of the keys of either side.
        norm1, norm2: hold the statistics of either side under the names of the published checkpoints; they are never called.
        keep: bool `[E, E]`, the experts that are not left out, where the configuration says that there is a mask.
    """

    keep: torch.Tensor | None

    def __init__(self, config: MonetConfig) -> None:
        super().__init__()
        self.heads, self.keys, self.topk = config.moe_heads, config.moe_experts, config.moe_topk
        self.selection = config.moe_selection
        self.quantile = NormalDist().inv_cdf(1 - self.topk / self.keys)
        self.w1 = nn.Linear(config.hidden_size, self.heads * self.keys, bias=False)
        self.w2 = nn.Linear(config.hidden_size, self.heads * self.keys, bias=False)
        self.norm1 = nn.BatchNorm1d(self.heads, affine=False)
        self.norm2 = nn.BatchNorm1d(self.heads, affine=False)
        keep = torch.ones(self.keys, self.keys, dtype=torch.bool) if config.moe_masked else None
        self.register_buffer("keep", keep)

    @property
    def trained_buffers(self) -> tuple[str, ...]:
        """The buffers that training changes, for checkpoints."""
        names = ("running_mean", "running_var", "num_batches_tracked")
        return tuple(f"{side}.{name}" for side in ("norm1", "norm2") for name in names)

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose and weigh keys.

        Args:
            hidden: `[..., D]`.

        Returns:
            Gates and raw scores, both float32 `[..., 2, H, E]`; gates of each head and side sum to one, and are zero for keys
            that were not chosen.
        """
        shape = (*hidden.shape[:-1], self.heads, self.keys)
        scores = torch.stack([self.w1(hidden).view(shape), self.w2(hidden).view(shape)], dim=-3)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        return self.gates(scores), scores

    def gates(self, scores: torch.Tensor, statistics: tuple[torch.Tensor, torch.Tensor] | None = None) -> torch.Tensor:
        """Weights of the keys.

        Args:
            scores: raw, `[..., 2, H, E]`.
            statistics: mean and (biased) variance of each side and head, `[2, H]`; None takes what training has seen.

        Returns:
            As the scores; the choice has no gradient, the weights do.
        """
        chosen = scores.detach() >= self._thresholds(scores.detach(), statistics)
        return scores.masked_fill(~chosen, float("-inf")).softmax(-1)

    def _thresholds(self, scores: torch.Tensor, statistics: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
        """The least score that is chosen, `[..., 2, H, 1]`; never above the best one."""
        if self.selection == "topk":
            return scores.topk(self.topk, dim=-1).values[..., -1:]
        mean, variance = self.statistics if statistics is None else statistics
        least = mean + self.quantile * (variance + self.norm1.eps).sqrt()
        return torch.minimum(scores.amax(-1, keepdim=True), least[..., None].to(scores.dtype))

    @property
    def statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and variance of the scores of each side and head that training has seen, `[2, H]`."""
        sides = (self.norm1, self.norm2)
        return torch.stack([side.running_mean for side in sides]), torch.stack([side.running_var for side in sides])  # type: ignore[misc]

    @property
    def is_observed(self) -> bool:
        """Whether any statistics were seen: converted checkpoints may have them without a count of batches."""
        mean, variance = self.statistics
        return bool(self.norm1.num_batches_tracked) or bool(mean.any()) or bool((variance != 1).any())

    @torch.no_grad()
    def observe(self, moments: torch.Tensor, *, first: bool = False) -> None:
        """Move the statistics towards those of a batch, by a tenth, as `torch.nn.BatchNorm1d` does.

        Args:
            moments: see `score_moments`, of everything that counts.
            first: take them as they are: what was there before means nothing.
        """
        count = moments[..., 0] * self.keys
        mean, variance = mean_and_variance(moments)
        variance = variance * count / (count - 1).clamp_min(1)
        for side, norm in enumerate((self.norm1, self.norm2)):
            rate = 1.0 if first else float(norm.momentum or 0.1)
            norm.running_mean.lerp_(mean[side].to(norm.running_mean.dtype), rate)  # type: ignore[union-attr]
            norm.running_var.lerp_(variance[side].to(norm.running_var.dtype), rate)  # type: ignore[union-attr]
            cast("torch.Tensor", norm.num_batches_tracked).add_(1)


def find_routers(model: nn.Module) -> list[MonetRouter]:
    """The routers of a model, in the order of the layers; none of other families and of baselines."""
    return [module for module in model.modules() if isinstance(module, MonetRouter)]


def score_moments(scores: torch.Tensor) -> torch.Tensor:
    """Number of tokens, and their sums of means over keys of scores and of squares; all add up over packs and ranks.

    Args:
        scores: `[..., 2, H, E]`.

    Returns:
        `[2, H, 3]`, summed up in float64 and in the dtype of the scores.
    """
    scores = scores.detach().flatten(0, -4)
    total, squares = scores.mean(-1).double().sum(0), scores.square().mean(-1).double().sum(0)
    return torch.stack([torch.full_like(total, len(scores)), total, squares], dim=-1).to(scores.dtype)


def mean_and_variance(moments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance, `[2, H]`, of `score_moments`."""
    count, total, squares = moments.unbind(-1)
    mean = total / count.clamp_min(1)
    return mean, (squares / count.clamp_min(1) - mean.square()).clamp_min(0)
