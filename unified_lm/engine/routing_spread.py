"""Uniformity and ambiguity of MONET's routers as a coupled term, and the statistics by which routers choose keys.

The uniformity term is a function of mean gates over all tokens of a step, so packs are seen first, and each pack's share is the
inner product of the derivative with its own sums (`engine.coupled`). The same sums over scores, not gates, move the statistics
of the routers once a step: those that are trained, in runs with this term. After the first step they are that step's own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from unified_lm.batch import Batch, Pack
from unified_lm.config.objectives import ObjectiveConfig, TokenObjectiveConfig
from unified_lm.core import distributed
from unified_lm.core.errors import ConfigError, ModelError
from unified_lm.engine.coupled import CoupledTerm, Recompute, TermParts, TermReport
from unified_lm.engine.readout import PackStates, Readout
from unified_lm.engine.training_module import PackOutput
from unified_lm.models import families
from unified_lm.models.backbone import Backbone
from unified_lm.models.monet.router import MonetRouter, find_routers, score_moments
from unified_lm.objectives.routing_spread import ambiguity, uniformity


def product_key_routers(backbone: Backbone) -> list[MonetRouter]:
    """The routers of a MONET model, in the order of the layers.

    Raises:
        ModelError: it is none.
    """
    found = find_routers(backbone.causal_lm)
    if not found:
        family = families.text_config(backbone.causal_lm).model_type
        raise ModelError(
            f"family '{family}' has no routers of product keys, which uniformity and ambiguity are about. Set "
            "streams.NAME.objective.router_uniformity_coef=null and router_ambiguity_coef=null; other mixtures take "
            "router_aux_loss_coef."
        )
    return found


class SpreadReadout(Readout):
    """Sums over some streams' tokens of a pack: per stream gates `[L, 2, H, E]`, ambiguity and chosen keys `[L]`, and moments.

    Args:
        streams: whose tokens count; a pack may hold none of them.
        routers: of the model.
    """

    name = "routing_spread"
    reads_routers = True

    def __init__(self, streams: Collection[str], routers: Sequence[MonetRouter]) -> None:
        self.streams = tuple(streams)
        self.routers = tuple(routers)

    def __call__(self, states: PackStates, pack: Pack) -> dict[str, torch.Tensor]:
        """See `Readout.__call__`."""
        found = {}
        with torch.autocast(pack.input_ids.device.type, enabled=False):
            for stream in self.streams:
                positions = pack.positions_of(stream)
                scores = [of_layer.index_select(0, positions) for of_layer in states.router_logits]
                gates = [router.gates(of_layer) for router, of_layer in zip(self.routers, scores, strict=True)]
                found[f"{stream}/gates"] = torch.stack([of_layer.sum(0) for of_layer in gates])
                found[f"{stream}/ambiguity"] = torch.stack([ambiguity(of_layer).sum() for of_layer in gates])
                chosen = torch.stack([(of_layer > 0).sum() for of_layer in gates])
                found[f"{stream}/chosen"] = chosen.to(gates[0].dtype) / gates[0].shape[1:-1].numel()
                found[f"{stream}/moments"] = torch.stack([score_moments(of_layer) for of_layer in scores])
        return found


@dataclass(frozen=True)
class _Fixed:
    """What a step knows of a stream.

    Attributes:
        gradient: of the uniformity term, with respect to the sums of gates `[L, 2, H, E]`.
        tokens: how many they are.
    """

    gradient: torch.Tensor
    tokens: float


class RoutingSpread(CoupledTerm):
    """Both terms of one run, and what they know about the present step.

    Args:
        weights: per stream the factors of uniformity and of ambiguity.
        routers: of the model, as in its `SpreadReadout`.
    """

    regularizer: ClassVar[bool] = True
    recompute: ClassVar[Recompute] = Recompute.ALL  # the means are over all tokens

    def __init__(self, weights: Mapping[str, tuple[float, float]], routers: Sequence[MonetRouter]) -> None:
        self.weights = dict(weights)
        self.routers = tuple(routers)
        self._fixed: dict[str, _Fixed] = {}
        self._moments: torch.Tensor | None = None
        self._report = TermReport()

    @classmethod
    def make(cls, parts: TermParts) -> CoupledTerm:
        """See `CoupledTerm.make`."""
        routers = product_key_routers(parts.trainable.backbone)
        trained = [routers[0].w1.weight.requires_grad, routers[0].w2.weight.requires_grad]
        if any(p.requires_grad for p in routers[0].parameters()) and not any(trained):
            raise ConfigError(
                "lora adapts MONET's routers (router.w1, router.w2), whose statistics an adapter does not hold, and a stream "
                "has router_uniformity_coef or router_ambiguity_coef. Set both to null, or name other lora.target_modules."
            )
        if any(trained) and not all(trained):
            raise ConfigError(
                "optim.frozen names one side of MONET's routers (router.w1 or router.w2), and a stream has "
                "router_uniformity_coef or router_ambiguity_coef, which move the statistics of both. Name router, or set "
                "both to null."
            )
        weights = {}
        for name, objective in parts.streams.items():
            assert isinstance(objective, TokenObjectiveConfig)
            weights[name] = (objective.router_uniformity_coef or 0.0, objective.router_ambiguity_coef or 0.0)
        return cls(weights, routers)

    @classmethod
    def readout(cls, streams: Mapping[str, ObjectiveConfig], backbone: Backbone) -> Readout:
        """See `CoupledTerm.readout`."""
        return SpreadReadout(streams, product_key_routers(backbone))

    def couple(self, batch: Batch, seen: Sequence[tuple[Pack, PackOutput]]) -> None:
        """Sum gates and scores over packs and ranks."""
        layers, first = len(self.routers), self.routers[0]
        shape = (layers, 2, first.heads, first.keys)
        device = distributed.local_device()
        metrics: dict[str, float] = {}
        extra = 0.0
        self._moments = torch.zeros(*shape[:3], 3, dtype=torch.float64, device=device)
        for stream, (even, clear) in self.weights.items():
            sums = {
                "gates": torch.zeros(shape, dtype=torch.float64, device=device),
                "moments": torch.zeros_like(self._moments),
                **{name: torch.zeros(layers, dtype=torch.float64, device=device) for name in ("ambiguity", "chosen")},
            }
            for _, output in seen:
                for name, total in sums.items():
                    total += output.readouts[SpreadReadout.name][f"{stream}/{name}"]
            for total in sums.values():
                distributed.all_reduce_sum(total)
            tokens = float(sums["moments"][0, 0, 0, 0])
            gates = sums["gates"].requires_grad_()
            with torch.enable_grad():
                spread = uniformity(gates / max(tokens, 1.0)).mean() * (tokens > 0)
            (gradient,) = torch.autograd.grad(spread, gates)
            self._fixed[stream] = _Fixed(gradient, tokens)
            self._moments += sums["moments"]
            measured = {
                "router_uniformity": float(spread.detach()),
                **{f"router_{name}": float(sums[key].mean()) / max(tokens, 1.0) for name, key in _MEANS.items()},
            }
            metrics |= {f"{stream}/{name}": value for name, value in measured.items()}
            extra += even * measured["router_uniformity"] + clear * measured["router_ambiguity"]
        self._report = TermReport(extra=extra, metrics=metrics)

    def share(self, pack: Pack, output: PackOutput) -> torch.Tensor:
        """The weighted shares of one pack's tokens."""
        found = output.readouts[SpreadReadout.name]
        shares = []
        for stream, (even, clear) in self.weights.items():
            fixed, gates = self._fixed[stream], found[f"{stream}/gates"]
            shares.append(even * (fixed.gradient.to(gates.dtype) * gates).sum())
            shares.append(clear / max(fixed.tokens, 1.0) * found[f"{stream}/ambiguity"].mean())
        return torch.stack(shares).sum()

    def finish(self) -> TermReport:
        """Uniformity (nats), ambiguity and keys that a head chose of a side, as "stream/router_..."; statistics move."""
        moments = self._moments
        if moments is not None and bool(torch.isfinite(moments).all()) and float(moments[0, 0, 0, 0]):
            for router, of_layer in zip(self.routers, moments, strict=True):
                if router.w1.weight.requires_grad:
                    router.observe(of_layer, first=not router.is_observed)
        return self._report


_MEANS = {"ambiguity": "ambiguity", "active_keys": "chosen"}
"""Name of a metric -> the sum over tokens that it is the mean of."""
