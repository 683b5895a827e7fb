"""Everything of one pack in a single module forward.

Backbone, pooling and output head run inside one `forward`, so that whatever hooks a backend puts around the module see
every use of every parameter.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import nn

from unified_lm.batch import LossTerm, Pack
from unified_lm.core.random import RngState
from unified_lm.models.backbone import Backbone
from unified_lm.models.lora import without_adapters
from unified_lm.models.pooling import Projection, pool
from unified_lm.objectives.balance import Routing, route
from unified_lm.objectives.cross_entropy import token_losses
from unified_lm.objectives.protocol import TokenObjective


@dataclass(frozen=True)
class PackOutput:
    """What a forward of one pack yields.

    Attributes:
        embeddings: float32 `[E, D]`, in the order of `Pack.pool_spans`, not normalized.
        terms: per stream the token loss of this pack.
        anchor: a zero that depends on every trained parameter, whatever the pack holds, or None. Every backward must include
            it where the backend gives one.
        scores: per stream with a sequence objective, float32 `[S]`: the log-probability of each of its labeled samples, in
            nats, in the order of `Pack.labeled`.
        routing: per balanced stream what the routers did with its tokens in this pack, of which there may be none.
    """

    embeddings: torch.Tensor
    terms: Mapping[str, LossTerm]
    anchor: torch.Tensor | None = None
    scores: Mapping[str, torch.Tensor] = field(default_factory=dict)
    routing: Mapping[str, Routing] = field(default_factory=dict)


class TrainingModule(nn.Module):
    """A backbone with what its streams need on top.

    Args:
        backbone: hidden states of a pack.
        pooling: how states of a pool span become one vector.
        token_objectives: per stream its token objective; streams without one yield embeddings or scores only.
        projection: a head applied to pooled vectors, or None.
        autocast: dtype to compute the backbone in under autocast, or None to use the weights' own.
        sequence_streams: streams whose samples are scored as wholes (`PackOutput.scores`).
        balanced_streams: streams whose tokens' routers are watched (`PackOutput.routing`), in every forward, so that all
            forwards have the same graph.

    Raises:
        ModelError: there are balanced streams, and the model has no routers that can be balanced.
    """

    def __init__(
        self,
        backbone: Backbone,
        pooling: str,
        token_objectives: Mapping[str, TokenObjective],
        projection: Projection | None = None,
        autocast: torch.dtype | None = None,
        sequence_streams: Collection[str] = (),
        balanced_streams: Collection[str] = (),
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.pooling = pooling
        self.projection = projection
        self.token_objectives = dict(token_objectives)
        self.autocast = autocast
        self.sequence_streams = frozenset(sequence_streams)
        self.balanced_streams = tuple(balanced_streams)
        self._top_k = backbone.experts()[1] if self.balanced_streams else 0

    def forward(self, pack: Pack, *, tokens: bool = True) -> PackOutput:
        """Run one pack.

        Args:
            pack: on the module's device.
            tokens: whether to compute token losses and scores; GradCache's graph-free forwards need embeddings and routing.
        """
        hidden, routing = self.routed_states(pack)
        if not tokens:
            return PackOutput(self.pool(hidden, pack), {}, routing=routing)
        terms, scores = self.token_terms(hidden, pack), self.sequence_scores(hidden, pack)
        return PackOutput(self.pool(hidden, pack), terms, scores=scores, routing=routing)

    def token_terms(self, hidden: torch.Tensor, pack: Pack) -> dict[str, LossTerm]:
        """The token losses of a pack, per stream with supervised positions.

        Args:
            hidden: `[T, D]`.
            pack: where the supervised positions are.
        """
        parts = {name: part for name, part in pack.supervised.items() if name not in self.sequence_streams}
        if not parts:
            return {}
        head = self.backbone.output_head()
        with self._computing(pack):
            return {name: self.token_objectives[name](hidden, head, part) for name, part in parts.items()}

    def sequence_scores(self, hidden: torch.Tensor, pack: Pack) -> dict[str, torch.Tensor]:
        """`PackOutput.scores` of a pack; logits are never whole (`objectives/cross_entropy.py`).

        Args:
            hidden: `[T, D]`.
            pack: where the labeled samples are.
        """
        parts = {name: part for name, part in pack.supervised.items() if name in self.sequence_streams}
        if not parts:
            return {}
        head = self.backbone.output_head()
        scores = {}
        with self._computing(pack):
            for name, part in parts.items():
                losses = token_losses(hidden.index_select(0, part.positions), head, part.targets).losses
                scores[name] = -torch.stack([losses_of_sample.sum() for losses_of_sample in losses.split(part.lengths)])
        return scores

    @contextmanager
    def scoring(self, *, reference: bool = False) -> Iterator[None]:
        """Within it forwards only measure: no gradients, no dropout, and the random state is afterwards as it was.

        Args:
            reference: whether forwards show the reference model: this one with its adapters switched off.

        Raises:
            ModelError: `reference` without adapters.
        """
        was_training = self.training
        state = RngState.capture()
        self.eval()
        try:
            with torch.no_grad(), without_adapters(self.backbone.causal_lm) if reference else nullcontext():
                yield
        finally:
            self.train(was_training)
            state.restore()

    def hidden_states(self, pack: Pack) -> torch.Tensor:
        """Last hidden states of a pack, `[T, D]`, computed under autocast where that is set."""
        with self._computing(pack):
            hidden: torch.Tensor = self.backbone(pack)
        return hidden

    def routed_states(self, pack: Pack) -> tuple[torch.Tensor, dict[str, Routing]]:
        """`hidden_states`, and `PackOutput.routing`; without balanced streams no router logits are kept."""
        if not self.balanced_streams:
            return self.hidden_states(pack), {}
        with self._computing(pack):
            hidden, router_logits = self.backbone.router_logits(pack)
        with torch.autocast(pack.input_ids.device.type, enabled=False):
            routing = {name: route(router_logits, self._top_k, pack.positions_of(name)) for name in self.balanced_streams}
        return hidden, routing

    def _computing(self, pack: Pack) -> torch.autocast:
        """The precision that matrix products run in; objectives turn it off for what must be float32."""
        return torch.autocast(pack.input_ids.device.type, dtype=self.autocast, enabled=self.autocast is not None)

    def pool(self, hidden: torch.Tensor, pack: Pack) -> torch.Tensor:
        """Pooled and projected vectors of a pack, float32 `[E, D]`.

        Args:
            hidden: `[T, D]`.
            pack: where the pool spans are.
        """
        pooled = pool(hidden, pack.pool_spans, self.pooling)
        return pooled if self.projection is None else self.projection(pooled)
