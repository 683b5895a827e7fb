"""Everything of one pack in a single module forward.

Backbone, pooling and output head run inside one `forward`, so that whatever hooks a backend puts around the module see
every use of every parameter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from unified_lm.batch import LossTerm, Pack
from unified_lm.models.backbone import Backbone
from unified_lm.models.pooling import Projection, pool
from unified_lm.objectives import TokenObjective


@dataclass(frozen=True)
class PackOutput:
    """What a forward of one pack yields.

    Attributes:
        embeddings: float32 `[E, D]`, in the order of `Pack.pool_spans`, not normalised.
        terms: per stream the token loss of this pack.
        anchor: a zero that depends on every trained parameter, whatever the pack holds, or None. Every backward must include
            it where the backend gives one.
    """

    embeddings: torch.Tensor
    terms: Mapping[str, LossTerm]
    anchor: torch.Tensor | None = None


class Trainable(nn.Module):
    """A backbone with what its streams need on top.

    Args:
        backbone: hidden states of a pack.
        pooling: how states of a pool span become one vector.
        token_objectives: per stream its token objective; streams without one yield embeddings only.
        projection: a head applied to pooled vectors, or None.
        autocast: dtype to compute the backbone in under autocast, or None to use the weights' own.
    """

    def __init__(
        self,
        backbone: Backbone,
        pooling: str,
        token_objectives: Mapping[str, TokenObjective],
        projection: Projection | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.pooling = pooling
        self.projection = projection
        self.token_objectives = dict(token_objectives)
        self.autocast = autocast

    def forward(self, pack: Pack, *, tokens: bool = True) -> PackOutput:
        """Run one pack.

        Args:
            pack: on the module's device.
            tokens: whether to compute token losses; GradCache's graph-free forwards need embeddings only.
        """
        hidden = self.hidden_states(pack)
        terms = self.token_terms(hidden, pack) if tokens else {}
        return PackOutput(self.pool(hidden, pack), terms)

    def token_terms(self, hidden: torch.Tensor, pack: Pack) -> dict[str, LossTerm]:
        """The token losses of a pack, per stream with supervised positions.

        Args:
            hidden: `[T, D]`.
            pack: where the supervised positions are.
        """
        if not pack.supervised:
            return {}
        head = self.backbone.output_head()
        with self._computing(pack):
            return {name: self.token_objectives[name](hidden, head, part) for name, part in pack.supervised.items()}

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
        pooled = pool(hidden, pack.pool_spans, self.pooling)
        return pooled if self.projection is None else self.projection(pooled)
