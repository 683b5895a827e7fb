"""An objective from outside the package: one file, two parameters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from unified_lm.batch import LossTerm
from unified_lm.config.checks import above
from unified_lm.config.objectives import EmbeddingObjectiveConfig, ObjectiveConfig, ObjectiveKind, StreamFacts


@dataclass(frozen=True, kw_only=True)
class MarginConfig(EmbeddingObjectiveConfig):
    """Settings of `MultipleNegativesMargin`."""

    margin: float = 0.2
    """By how much the positive's cosine must exceed that of every other document."""
    exponent: float = 1.0
    """What violations are raised to."""

    @property
    def coupled(self) -> tuple[str, ...]:
        """See `ObjectiveConfig.coupled`: a coupled term from outside, too."""
        return (*super().coupled, "tests.engine.test_coupled.Decorrelation")

    def problems(self, path: str, stream: StreamFacts) -> Iterator[str]:
        """See `ObjectiveConfig.problems`."""
        yield from super().problems(path, stream)
        yield from above(f"{path}.margin", self.margin, 0)


class MultipleNegativesMargin:
    """Hinge loss of every query against all other documents of the global batch."""

    Config = MarginConfig

    def __init__(self, config: MarginConfig) -> None:
        self.margin, self.exponent = config.margin, config.exponent
        self.metrics: dict[str, float] = {}

    def __call__(self, embeddings: torch.Tensor, text_ids: torch.Tensor | None = None) -> LossTerm:
        """See `EmbeddingObjective`: `[G, K, D]` -> the sum over queries, and G."""
        unit_GKD = F.normalize(embeddings, dim=-1)
        document_MD = unit_GKD[:, 1:].transpose(0, 1).flatten(0, 1)
        score_GM = unit_GKD[:, 0] @ document_MD.T
        positive_G1 = score_GM.diagonal()[:, None]
        violation_GM = (self.margin - positive_G1 + score_GM).clamp(min=0) ** self.exponent
        own_GM = torch.eye(*score_GM.shape, dtype=torch.bool, device=score_GM.device)
        loss_G = violation_GM.masked_fill(own_GM, 0.0).sum(1)
        self.metrics = {"violations": float((violation_GM > 0).float().mean())}
        return LossTerm(loss_G.sum(), float(len(loss_G)))


class Wordless:
    """No objective: it has no description."""


class Contradictory(MultipleNegativesMargin):
    """Fails on every batch."""

    def __call__(self, embeddings: torch.Tensor, text_ids: torch.Tensor | None = None) -> LossTerm:
        """Expects a hard negative, whatever the stream gives."""
        query, positive, negative = embeddings.unbind(1)
        return LossTerm((query * positive - query * negative).sum(), float(len(query)))


class ThawedConfig(EmbeddingObjectiveConfig):
    """No dataclass."""

    margin: float = 0.2


class Thawed(MultipleNegativesMargin):
    """Described by a class whose field is none."""

    Config = ThawedConfig


@dataclass(frozen=True, kw_only=True)
class KindlessConfig(ObjectiveConfig):
    """Does not say what it is computed from."""


class Kindless(MultipleNegativesMargin):
    """Of no kind."""

    Config = KindlessConfig


@dataclass(frozen=True, kw_only=True)
class BaselessConfig(ObjectiveConfig):
    """Says its kind and lacks that kind's settings."""

    kind: ClassVar[ObjectiveKind] = ObjectiveKind.TOKEN


class Baseless(MultipleNegativesMargin):
    """Of a kind by name alone."""

    Config = BaselessConfig


class Numberless:
    """Lacks what a step reads after every call."""

    Config = MarginConfig

    def __init__(self, config: MarginConfig) -> None: ...

    def __call__(self, embeddings: torch.Tensor, text_ids: torch.Tensor | None = None) -> LossTerm:
        """A loss without metrics."""
        return LossTerm(embeddings.square().sum(), float(len(embeddings)))
