"""Router balance over a step: how often each expert was chosen, known before the first backward.

The loss (`objectives.balance`) multiplies each token's router probabilities by the share of choices f that an expert got. With
the f of one pack, or of one rank, the split into packs and ranks would change loss and gradients. So every pack of the step is
forwarded once before anything is differentiated, as GradCache does with pooled ones (`engine.step`), the choices are summed
over packs and ranks, and f is a constant when packs are forwarded again, with the same random numbers and so the same choices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from unified_lm.core import distributed
from unified_lm.objectives.balance import Routing, expert_share, load_balancing


class RouterBalance:
    """The balance loss of one run, and what it knows about the present step.

    Args:
        weights: per balanced stream the factor of its loss.
        num_experts: E, of a layer.
        top_k: experts chosen per token.
    """

    def __init__(self, weights: Mapping[str, float], num_experts: int, top_k: int) -> None:
        self.weights = dict(weights)
        self.num_experts = num_experts
        self.top_k = top_k
        self.losses: dict[str, float] = {}
        self._shares: dict[str, tuple[torch.Tensor, float]] = {}

    def begin(self, routings: Sequence[Mapping[str, Routing]]) -> None:
        """Sum up a step's choices over packs and ranks; `losses` then holds the unweighted loss of every stream. Collective.

        Args:
            routings: `PackOutput.routing` of every pack of this rank.
        """
        sums = torch.zeros(len(self.weights), 2, self.num_experts, dtype=torch.float64, device=distributed.local_device())
        for routing in routings:
            for index, stream in enumerate(self.weights):
                sums[index, 0] += routing[stream].load
                sums[index, 1] += routing[stream].probability.detach()
        distributed.all_reduce_sum(sums)
        for (load, probability), stream in zip(sums, self.weights, strict=True):
            share, rows = expert_share(load, self.top_k)
            self._shares[stream] = share, rows
            self.losses[stream] = float(load_balancing(probability, share)) / rows if rows else 0.0

    def share_of_pack(self, routing: Mapping[str, Routing]) -> torch.Tensor:
        """The weighted share of one pack in the step's balance losses, with gradient.

        Args:
            routing: of its forward; the pack is one of those that `begin` was called with.
        """
        shares = []
        for stream, weight in self.weights.items():
            share, rows = self._shares[stream]
            shares.append(load_balancing(routing[stream].probability, share) * (weight / max(rows, 1.0)))
        return torch.stack(shares).sum()

    @property
    def total(self) -> float:
        """The weighted sum of the losses of the present step."""
        return sum(weight * self.losses[stream] for stream, weight in self.weights.items())
