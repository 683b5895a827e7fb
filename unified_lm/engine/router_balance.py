"""Router balance as a coupled term: how often each expert was chosen, known before the first backward.

The loss (`objectives.load_balancing`) multiplies each token's router probabilities by the fraction of choices f that an
expert got. With the f of one pack, or of one rank, the split into packs and ranks would change loss and gradients. So every
pack of the step is forwarded once before anything is differentiated, as GradCache does with pooled ones (`engine.step`), the
choices are summed over packs and ranks, and f is a constant when packs are forwarded again, with the same random numbers and
so the same choices.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import ClassVar

import torch

from unified_lm.batch import Batch, Pack
from unified_lm.config.objectives import ObjectiveConfig
from unified_lm.core import distributed
from unified_lm.engine.coupled import CoupledTerm, Recompute, TermParts, TermReport
from unified_lm.engine.readout import PackStates, Readout
from unified_lm.engine.training_module import PackOutput
from unified_lm.models.backbone import Backbone
from unified_lm.objectives.load_balancing import Routing, expert_fraction, load_balancing, route


class RoutingReadout(Readout):
    """What the routers did with some streams' tokens: per stream `[2, E]`, the load and the probability of `Routing`.

    Args:
        streams: whose tokens count; a pack may hold none of them.
        top_k: experts chosen per token.
    """

    name = "routing"
    reads_routers = True

    def __init__(self, streams: Collection[str], top_k: int) -> None:
        self.streams = tuple(streams)
        self.top_k = top_k

    def __call__(self, states: PackStates, pack: Pack) -> dict[str, torch.Tensor]:
        """See `Readout.__call__`."""
        # The softmax over experts runs in the precision of `route`: under autocast, sums over many tokens would be halves.
        with torch.autocast(pack.input_ids.device.type, enabled=False):
            found = {name: route(states.router_logits, self.top_k, pack.positions_of(name)) for name in self.streams}
        return {name: torch.stack([routing.load, routing.probability]) for name, routing in found.items()}


class RouterBalance(CoupledTerm):
    """The balance loss of one run, and what it knows about the present step.

    Args:
        weights: per balanced stream the factor of its loss. The module has a `RoutingReadout` of these streams.
        num_experts: E, of a layer.
        top_k: experts chosen per token.
    """

    regularizer: ClassVar[bool] = True
    recompute: ClassVar[Recompute] = Recompute.ALL  # f counts all tokens, and choices are known only after a forward

    def __init__(self, weights: Mapping[str, float], num_experts: int, top_k: int) -> None:
        self.weights = dict(weights)
        self.num_experts = num_experts
        self.top_k = top_k
        self._losses: dict[str, float] = {}
        self._fractions: dict[str, tuple[torch.Tensor, float]] = {}

    @classmethod
    def make(cls, parts: TermParts) -> CoupledTerm:
        """See `CoupledTerm.make`."""
        weights = {name: objective.router_balance for name, objective in parts.streams.items()}
        return cls(weights, *parts.trainable.backbone.experts())

    @classmethod
    def readout(cls, streams: Mapping[str, ObjectiveConfig], backbone: Backbone) -> Readout:
        """See `CoupledTerm.readout`."""
        return RoutingReadout(streams, backbone.experts()[1])

    def couple(self, batch: Batch, seen: Sequence[tuple[Pack, PackOutput]]) -> None:
        """Sum up the step's choices over packs and ranks."""
        sums = torch.zeros(len(self.weights), 2, self.num_experts, dtype=torch.float64, device=distributed.local_device())
        for _, output in seen:
            for index, stream in enumerate(self.weights):
                sums[index] += output.readouts[RoutingReadout.name][stream]
        distributed.all_reduce_sum(sums)
        for (load, probability), stream in zip(sums, self.weights, strict=True):
            fraction, rows = expert_fraction(load, self.top_k)
            self._fractions[stream] = fraction, rows
            self._losses[stream] = float(load_balancing(probability, fraction)) / rows if rows else 0.0

    def share(self, pack: Pack, output: PackOutput) -> torch.Tensor:
        """The weighted balance losses of one pack's tokens under the step's f."""
        losses = []
        for stream, weight in self.weights.items():
            fraction, rows = self._fractions[stream]
            routing = Routing(*output.readouts[RoutingReadout.name][stream])
            losses.append(load_balancing(routing.probability, fraction) * (weight / max(rows, 1.0)))
        return torch.stack(losses).sum()

    def finish(self) -> TermReport:
        """The unweighted losses as "stream/router_balance"; weighted they are an extra to the total, and no stream's loss."""
        return TermReport(
            extra=sum(weight * self._losses[stream] for stream, weight in self.weights.items()),
            metrics={f"{stream}/router_balance": loss for stream, loss in self._losses.items()},
        )
