"""Coupled terms: losses in which one pack's gradient depends on the other packs of the step, and on other ranks.

A contrastive loss compares every embedding with all others, a router balance knows how often each expert was chosen, KTO
compares with a baseline. Activations of a whole step do not fit in memory, so the packs are differentiated one after another
(`engine.step`). What makes this exact is the same for all of them:

1. `begin`: whatever must be known before any pack is forwarded;
2. `couple`: see the step's packs as graph-free outputs and fix something global, over packs and ranks: a gradient with respect
   to each embedding, a share of choices, a baseline. From here on it is a constant;
3. `share`: a scalar for each pack, with a graph. Because the global part is constant, the gradients of the shares of all packs
   on all ranks add up to the gradient of the whole loss;
4. `finish`: what the step measured.

A term whose loss is `L(s)`, with s a sum over the packs of the step, needs no more than the chain rule: `couple` sums s without
a graph, reduces it over ranks and takes `dL/ds`; `share` is the inner product of `dL/ds` with the pack's part of s.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from unified_lm.batch import Batch, Pack
from unified_lm.engine.training_module import PackOutput


@dataclass(frozen=True)
class TermReport:
    """What a term measured in one step, the same on every rank.

    Attributes:
        losses: unweighted loss per stream that this term is the objective of. The step multiplies them by the streams' weights.
        extra: the weighted contribution to the total of what is no stream's loss.
        metrics: further numbers by name ("stream/name"), for the log.
        kept: whatever `CoupledTerm.items` needs of this step.
    """

    losses: Mapping[str, float] = field(default_factory=dict)
    extra: float = 0.0
    metrics: Mapping[str, float] = field(default_factory=dict)
    kept: Any = None


class CoupledTerm(ABC):
    """One loss that couples the packs of a step.

    An object keeps what it knows about the present step between the calls. The methods marked collective are called on every
    rank, in the same order, also on ranks whose packs have nothing to do with the term. Empty packs, which ranks forward to
    keep step with others, are never shown to it.

    Attributes:
        regularizer: whether the term only shapes training. A held-out loss is that of a stream's objective, so
            `GradCacheStep.losses_only` leaves regularizers out.
    """

    regularizer: ClassVar[bool] = False

    def begin(self, batch: Batch) -> None:  # noqa: B027 (most terms have nothing to do here)
        """Start a step, before its first forward. Collective.

        Args:
            batch: this rank's share, on the module's device.
        """

    def sees(self, pack: Pack) -> bool:
        """Whether `couple` must see this pack; it is then forwarded before any backward, and a second time for its gradient."""
        return False

    def couple(self, batch: Batch, seen: Sequence[tuple[Pack, PackOutput]]) -> None:  # noqa: B027
        """Fix what is global, after the first forwards and before the first backward. Collective.

        Args:
            batch: as in `begin`.
            seen: this rank's packs for which `sees` holds, with their outputs, without a graph. While training these lack token
                losses and readouts of labels. There may be none.
        """

    @abstractmethod
    def share(self, pack: Pack, output: PackOutput) -> torch.Tensor | None:
        """The weighted share of one pack in the loss: a scalar, with a graph while training; None where it has no part.

        Not collective. A share that is not finite makes the gradient of the step not finite, and the update is skipped.

        Args:
            pack: any pack of the batch, seen or not.
            output: of its forward; where the pack was seen, of its second one, with the same random numbers.
        """

    @abstractmethod
    def finish(self) -> TermReport:
        """What the step measured, once every pack has had its share. Collective."""

    def items(self, reports: Sequence[TermReport]) -> Mapping[str, torch.Tensor]:
        """Numbers by name ("stream/name") for each sample of several steps, `[n]`: what held-out metrics are means of.

        Args:
            reports: of these steps, in order.
        """
        return {}

    def scored(self, batch: Batch) -> Sequence[Pack]:
        """The packs that `begin` forwards by itself, one entry for each forward: for the count of operations."""
        return ()
