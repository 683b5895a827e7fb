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
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar

import torch

from unified_lm.batch import Batch, Pack
from unified_lm.config.objectives import ObjectiveConfig, ObjectiveKind
from unified_lm.core.errors import ConfigError
from unified_lm.core.tables import resolve
from unified_lm.engine.readout import Readout
from unified_lm.engine.training_module import PackOutput, TrainingModule
from unified_lm.models.backbone import Backbone


class Recompute(Enum):
    """Which packs of a step a term must see before the first backward; where they do not fit one, they are forwarded twice.

    Attributes:
        NOTHING: none.
        OWN: those with samples of its streams, as GradCache does.
        ALL: every pack of the step.
    """

    NOTHING = "nothing"
    OWN = "own"
    ALL = "all"


@dataclass(frozen=True, eq=False)
class TermParts:
    """What a run has for a coupled term to be made of.

    Attributes:
        streams: the streams that take part, with their objectives' settings.
        objectives: the same streams' objectives.
        weights: per stream of the run the factor of its loss.
        forward: pack -> `PackOutput`.
        trainable: the module behind `forward`.
        equal_forwards: whether every rank must run the same sequence of forwards (ZeRO-2 and 3).
    """

    streams: Mapping[str, ObjectiveConfig]
    objectives: Mapping[str, Any]
    weights: Mapping[str, float]
    forward: Callable[..., PackOutput]
    trainable: TrainingModule
    equal_forwards: bool


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
        recompute: which packs it must see: what `sees` says, and what the estimate of a run's work counts.
        streams: whose samples are its own (for `Recompute.OWN`).
    """

    regularizer: ClassVar[bool] = False
    recompute: ClassVar[Recompute] = Recompute.NOTHING
    streams: Collection[str] = ()

    @classmethod
    def make(cls, parts: TermParts) -> CoupledTerm:
        """Make the term of a run in which a stream's objective names this class as `coupled`.

        Raises:
            ConfigError: the class does not say how.
        """
        raise ConfigError(
            f"{cls.__module__}.{cls.__qualname__} cannot be made for a run: it needs a class method `make` "
            "(docs/coupled-terms.md)."
        )

    @classmethod
    def readout(cls, streams: Mapping[str, ObjectiveConfig], backbone: Backbone) -> Readout | None:
        """What the term takes from a forward beside embeddings, or None.

        Args:
            streams: as in `TermParts`.
            backbone: the model.
        """
        return None

    def begin(self, batch: Batch) -> None:  # noqa: B027 (most terms have nothing to do here)
        """Start a step, before its first forward. Collective.

        Args:
            batch: this rank's share, on the module's device.
        """

    def sees(self, pack: Pack) -> bool:
        """Whether `couple` must see this pack; it is then forwarded before any backward, and a second time for its gradient."""
        if self.recompute is Recompute.OWN:
            return any(sample.stream in self.streams for sample in pack.samples)
        return self.recompute is Recompute.ALL

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


def term_classes(objectives: Mapping[str, ObjectiveConfig]) -> dict[type[CoupledTerm], list[str]]:
    """The coupled terms that streams name, each with its streams.

    In one order for all recipes, by what objectives are computed from: a step's total is a sum of floats, whose last bit
    depends on the order.

    Args:
        objectives: per stream its objective's settings.

    Raises:
        ConfigError: a name cannot be imported, or is no coupled term.
    """
    kinds = (ObjectiveKind.EMBEDDING, ObjectiveKind.SEQUENCE, ObjectiveKind.TOKEN)
    found: dict[type[CoupledTerm], list[str]] = {}
    for name, objective in sorted(objectives.items(), key=lambda item: kinds.index(item[1].kind)):
        for path in objective.coupled:
            term = resolve(path, {}, "coupled term")
            if not (isinstance(term, type) and issubclass(term, CoupledTerm)):
                raise ConfigError(f"'{path}', named by objective {objective.name}, is no subclass of {__name__}.CoupledTerm.")
            found.setdefault(term, []).append(name)
    return found


def forwarded_twice(objectives: Mapping[str, ObjectiveConfig]) -> list[str]:
    """The streams whose packs are forwarded twice in a step of several packs.

    Args:
        objectives: per stream its objective's settings.
    """
    terms = term_classes(objectives)
    if any(term.recompute is Recompute.ALL for term in terms):
        return list(objectives)
    own = {name for term, names in terms.items() if term.recompute is Recompute.OWN for name in names}
    return [name for name in objectives if name in own]
