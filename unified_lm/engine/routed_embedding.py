"""Contrastive training of routing, or of states and routing together, as a coupled term: vectors of MOEE that are trained.

What `models.moee` makes of a trained model, made in the forward of training: coupled over packs and ranks as hidden states are
(`engine.embedding_term`), through the probabilities that each layer's router gives to its experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from unified_lm.batch import Pack
from unified_lm.config.objectives import EmbeddingObjectiveConfig, ObjectiveConfig
from unified_lm.engine.coupled import CoupledTerm, TermParts
from unified_lm.engine.embedding_term import EmbeddingTerm
from unified_lm.engine.readout import PackStates, Readout
from unified_lm.engine.training_module import PackOutput, TrainingModule
from unified_lm.models.backbone import Backbone
from unified_lm.models.moee import RoutedPooling, WeightedBlocks, moee_head
from unified_lm.models.pooling import Pooling, pool
from unified_lm.models.routing import Routers


class RoutingVectors(Readout):
    """Pooled routing probabilities of all layers, float32 `[E, F]`, in the order of `Pack.pool_spans`.

    Args:
        routers: of the model.
    """

    name = "routing_vectors"
    reads_routers = True

    def __init__(self, routers: Routers) -> None:
        self.routers = routers

    def __call__(self, states: PackStates, pack: Pack) -> dict[str, torch.Tensor]:
        """See `Readout.__call__`."""
        told = self.routers.probabilities(states.router_logits)
        layers = [pool(probabilities, pack.pool_spans, states.pooling, pack.num_pooled) for probabilities in told]
        return {self.name: torch.cat(layers, dim=1)}


class RoutedEmbeddingTerm(EmbeddingTerm):
    """The objectives over vectors in which routing has a part; arguments as of `EmbeddingTerm`.

    Args:
        method: "rw", "moee_concat" or "moee_sum" (`models.moee`).
        alpha: weight of the routing in method "moee_sum".
    """

    def __init__(self, *arguments: Any, method: str, alpha: float) -> None:
        super().__init__(*arguments)
        self.method = method
        self.alpha = alpha

    def vectors(self, output: PackOutput) -> torch.Tensor:
        """See `EmbeddingTerm.vectors`."""
        routing = output.readouts[RoutingVectors.name][RoutingVectors.name]
        if self.method == "rw":
            return routing
        both = torch.cat([output.embeddings, routing.to(output.embeddings.dtype)], dim=1)
        return both if self.method == "moee_concat" else WeightedBlocks(output.embeddings.shape[1], self.alpha)(both)

    @classmethod
    def make(cls, parts: TermParts) -> CoupledTerm:
        """See `CoupledTerm.make`."""
        # One way for all streams: `composition.validate` sees to it, since an export embeds in one way.
        config = next(iter(parts.streams.values()))
        assert isinstance(config, EmbeddingObjectiveConfig)
        alpha = 1.0 if config.alpha is None else config.alpha
        return cls(parts.objectives, parts.weights, method=config.vectors, alpha=alpha)

    @classmethod
    def readout(cls, streams: Mapping[str, ObjectiveConfig], backbone: Backbone) -> Readout:
        """See `CoupledTerm.readout`."""
        return RoutingVectors(Routers(backbone))


def vectors_of(trainable: TrainingModule, method: str, alpha: float) -> tuple[Pooling | RoutedPooling, nn.Module | None]:
    """What pools, and what is applied to the pooled vectors, where texts are embedded between steps.

    Args:
        trainable: has `RoutingVectors` among its readouts where `method` is not "hs".
        method: see `models.moee`.
        alpha: weight of the routing in method "moee_sum".
    """
    pooling = Pooling.parse(trainable.pooling)
    if method == "hs":
        return pooling, trainable.projection
    readout = trainable.readouts[RoutingVectors.name]
    assert isinstance(readout, RoutingVectors)
    head = trainable.projection
    states = trainable.backbone.hidden_size if head is None else head.linear.out_features
    routed = RoutedPooling(readout.routers, pooling, head, states=method != "rw")
    return routed, moee_head(method, alpha, (states, readout.routers.num_features), None)
