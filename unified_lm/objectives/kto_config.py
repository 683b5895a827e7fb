"""The settings of KTO."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from unified_lm.config.checks import above
from unified_lm.config.objectives import SequenceObjectiveConfig, StreamFacts


@dataclass(frozen=True, kw_only=True)
class KTOConfig(SequenceObjectiveConfig):
    """Kahneman-Tversky optimization (arXiv:2402.01306, section 4.1)."""

    implementation: ClassVar[str] = "unified_lm.objectives.kto.KTO"

    name: str = "kto"
    """The objective."""
    beta: float = 0.1
    """How sharply the loss reacts to log-ratios, per nat; larger keeps the model closer to the reference."""
    desirable_weight: float = 1.0
    """Factor of desirable rows; keep weight times rows of both kinds within 1 to 4/3 (the paper's advice)."""
    undesirable_weight: float = 1.0
    """Factor of undesirable rows."""

    def problems(self, path: str, stream: StreamFacts) -> Iterator[str]:
        """See `ObjectiveConfig.problems`."""
        yield from super().problems(path, stream)
        yield from above(f"{path}.beta", self.beta, 0)
        for key in ("desirable_weight", "undesirable_weight"):
            yield from above(f"{path}.{key}", getattr(self, key), 0)
