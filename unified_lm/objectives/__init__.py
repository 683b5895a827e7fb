"""Losses. An objective sees hidden states or embeddings, never a model.

To add one, write a class with the shape of `TokenObjective` or `EmbeddingObjective` (`objectives/protocol.py`) and name it
by its dotted path in a recipe (`objective.name: my_package.MyObjective`), or add it to a table below.
"""

from __future__ import annotations

from typing import Any

from unified_lm.config.schema import ObjectiveConfig
from unified_lm.core.errors import ConfigError
from unified_lm.core.tables import resolve
from unified_lm.objectives.contrastive import Contrastive
from unified_lm.objectives.protocol import EmbeddingObjective, ObjectiveKind, TokenObjective
from unified_lm.objectives.token import MaskedNextToken, NextToken

TOKEN_OBJECTIVES: dict[str, Any] = {"next_token": NextToken, "masked_next_token": MaskedNextToken}
"""Objectives over supervised positions, by the name a recipe uses."""

EMBEDDING_OBJECTIVES: dict[str, Any] = {"contrastive": Contrastive}
"""Objectives over pooled vectors, by the name a recipe uses."""

__all__ = [
    "EMBEDDING_OBJECTIVES",
    "TOKEN_OBJECTIVES",
    "EmbeddingObjective",
    "ObjectiveKind",
    "TokenObjective",
    "build_objective",
]


def build_objective(config: ObjectiveConfig) -> TokenObjective | EmbeddingObjective:
    """The objective that a stream asks for; its `kind` says which of the two protocols it follows.

    Raises:
        ConfigError: unknown name, dotted path that cannot be imported, or a class that is no objective.
    """
    made_by = resolve(config.name, {**TOKEN_OBJECTIVES, **EMBEDDING_OBJECTIVES}, "objective")
    if not isinstance(getattr(made_by, "kind", None), ObjectiveKind):
        raise ConfigError(
            f"'{config.name}' is no objective: it has no class attribute `kind`. "
            "Give it kind = ObjectiveKind.TOKEN or ObjectiveKind.EMBEDDING (unified_lm/objectives/protocol.py)."
        )
    objective: TokenObjective | EmbeddingObjective = made_by(config)
    return objective
