"""The settings of the token losses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from unified_lm.config.checks import choice
from unified_lm.config.objectives import StreamFacts, TokenObjectiveConfig


@dataclass(frozen=True, kw_only=True)
class NextTokenConfig(TokenObjectiveConfig):
    """Cross-entropy of the next token at every supervised position."""

    implementation: ClassVar[str] = "unified_lm.objectives.token.NextToken"

    name: str = "next_token"
    """The objective."""
    cross_entropy: str = "chunked"
    """"chunked" (every device), or "liger" (Liger's fused kernel; needs CUDA and the extra "liger")."""

    def problems(self, path: str, stream: StreamFacts) -> Iterator[str]:
        """See `ObjectiveConfig.problems`."""
        yield from super().problems(path, stream)
        yield from choice(f"{path}.cross_entropy", self.cross_entropy, ("chunked", "liger"))


@dataclass(frozen=True, kw_only=True)
class MaskedNextTokenConfig(NextTokenConfig):
    """Masked next-token prediction, MNTP (LLM2Vec, arXiv:2404.05961, section 2.2)."""

    implementation: ClassVar[str] = "unified_lm.objectives.token.MaskedNextToken"
    predicts_hidden: ClassVar[bool] = True

    name: str = "masked_next_token"
    """The objective."""
