"""Everything of one pack in a single module forward.

Backbone, pooling and output head run inside one `forward`, so that whatever hooks a backend puts around the module see
every use of every parameter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import nn

from unified_lm.batch import LossTerm, Pack
from unified_lm.core.random import RngState
from unified_lm.engine.readout import PackStates, Readout
from unified_lm.models.backbone import Backbone
from unified_lm.models.lora import without_adapters
from unified_lm.models.modes import evaluation_mode
from unified_lm.models.pooling import Projection, pool
from unified_lm.objectives.protocol import TokenObjective


@dataclass(frozen=True)
class PackOutput:
    """What a forward of one pack yields.

    Attributes:
        embeddings: float32 `[E, D]`, in the order of `Pack.pool_spans`, not normalized.
        terms: per stream the token loss of this pack.
        anchor: a zero that depends on every trained parameter, whatever the pack holds, or None. Every backward must include
            it where the backend gives one.
        readouts: by name of a readout its tensors of this pack, by its own keys.
    """

    embeddings: torch.Tensor
    terms: Mapping[str, LossTerm]
    anchor: torch.Tensor | None = None
    readouts: Mapping[str, Mapping[str, torch.Tensor]] = field(default_factory=dict)

    def detached(self) -> PackOutput:
        """Embeddings and readouts without their graph, and nothing else."""
        readouts = {name: {key: tensor.detach() for key, tensor in tensors.items()} for name, tensors in self.readouts.items()}
        return PackOutput(self.embeddings.detach(), {}, readouts=readouts)


class TrainingModule(nn.Module):
    """A backbone with what its streams need on top.

    Args:
        backbone: hidden states of a pack.
        pooling: how states of a pool span become one vector.
        token_objectives: per stream its token objective; streams without one yield embeddings or readouts only.
        projection: a head applied to pooled vectors, or None.
        autocast: dtype to compute the backbone in under autocast, or None to use the weights' own.
        readouts: what coupled terms take from a forward, each under a name of its own. Those that read no labels are part of
            every forward, so that all forwards have the same graph.

    Raises:
        ModelError: a readout reads routers, and the model has none.
    """

    def __init__(
        self,
        backbone: Backbone,
        pooling: str,
        token_objectives: Mapping[str, TokenObjective],
        projection: Projection | None = None,
        autocast: torch.dtype | None = None,
        readouts: Sequence[Readout] = (),
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.pooling = pooling
        self.projection = projection
        self.token_objectives = dict(token_objectives)
        self.autocast = autocast
        self.readouts = {readout.name: readout for readout in readouts}
        assert len(self.readouts) == len(readouts), f"two readouts of one name: {[readout.name for readout in readouts]}"
        self._read_as_wholes = {stream for readout in readouts for stream in readout.labeled_streams}
        self._reads_routers = any(readout.reads_routers for readout in readouts)
        if self._reads_routers:
            backbone.require_routers()  # refuses models without routers before anything is trained

    def forward(self, pack: Pack, *, tokens: bool = True) -> PackOutput:
        """Run one pack.

        Args:
            pack: on the module's device.
            tokens: whether to read labels: token losses, and readouts of whole samples. GradCache's graph-free forwards do not.
        """
        states = self.states(pack, tokens=tokens)
        # Autograd starts from the latest operation and adds the gradients of hidden states up in that order: another order of
        # these three calls would change the last bits of a run.
        terms, readouts = self.token_terms(states, pack), self.read(states, pack)
        return PackOutput(self.pool(states.hidden, pack), terms, readouts=readouts)

    def states(self, pack: Pack, *, tokens: bool = True) -> PackStates:
        """Run the backbone; without a readout of routers no router logits are kept.

        Args:
            pack: on the module's device.
            tokens: as in `forward`.
        """
        router_logits: tuple[torch.Tensor, ...] = ()
        with self._computing(pack):
            if self._reads_routers:
                hidden, router_logits = self.backbone.router_logits(pack)
            else:
                hidden = self.backbone(pack)
        head = self.backbone.output_head() if tokens and pack.supervised else None
        return PackStates(hidden, router_logits, head, self.pooling)

    def token_terms(self, states: PackStates, pack: Pack) -> dict[str, LossTerm]:
        """The token losses of a pack, per stream with supervised positions; none where labels are not read.

        Args:
            states: what the backbone computed.
            pack: where the supervised positions are.
        """
        if states.head is None:
            return {}
        parts = {name: part for name, part in pack.supervised.items() if name not in self._read_as_wholes}
        with self._computing(pack):
            return {name: self.token_objectives[name](states.hidden, states.head, part) for name, part in parts.items()}

    def read(self, states: PackStates, pack: Pack) -> dict[str, Mapping[str, torch.Tensor]]:
        """`PackOutput.readouts` of a pack.

        Args:
            states: what the backbone computed.
            pack: whose they are.
        """
        with self._computing(pack):
            return {
                name: {} if states.head is None and readout.labeled_streams else readout(states, pack)
                for name, readout in self.readouts.items()
            }

    @contextmanager
    def scoring(self, *, reference: bool = False) -> Iterator[None]:
        """Within it forwards only measure: no gradients, no dropout, and the random state is afterwards as it was.

        Args:
            reference: whether forwards show the reference model: this one with its adapters switched off.

        Raises:
            ModelError: `reference` without adapters.
        """
        state = RngState.capture()
        try:
            with (
                evaluation_mode(self),
                torch.no_grad(),
                without_adapters(self.backbone.causal_lm) if reference else nullcontext(),
            ):
                yield
        finally:
            state.restore()

    def hidden_states(self, pack: Pack) -> torch.Tensor:
        """Last hidden states of a pack, `[T, D]`, computed under autocast where that is set."""
        with self._computing(pack):
            hidden: torch.Tensor = self.backbone(pack)
        return hidden

    def _computing(self, pack: Pack) -> torch.autocast:
        """The precision that matrix products run in; objectives turn it off for what must be float32."""
        return torch.autocast(pack.input_ids.device.type, dtype=self.autocast, enabled=self.autocast is not None)

    def pool(self, hidden: torch.Tensor, pack: Pack) -> torch.Tensor:
        """Pooled and projected vectors of a pack, float32 `[E, D]`.

        Args:
            hidden: `[T, D]`.
            pack: where the pool spans are.
        """
        pooled = pool(hidden, pack.pool_spans, self.pooling, pack.num_pooled)
        return pooled if self.projection is None else self.projection(pooled)
