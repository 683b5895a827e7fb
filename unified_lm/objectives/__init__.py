"""Losses. An objective sees hidden states, embeddings or log-probabilities, never a model.

To add one, write a class with the shape of `TokenObjective`, `EmbeddingObjective` or `SequenceObjective`
(`objectives/protocol.py`) and name it by its dotted path in a recipe (`objective.name: my_package.MyObjective`), or add it to
a table below.
"""

from __future__ import annotations

from typing import Any

from unified_lm.config.schema import ObjectiveConfig
from unified_lm.core.errors import ConfigError
from unified_lm.core.tables import resolve
from unified_lm.objectives.contrastive import Contrastive
from unified_lm.objectives.kto import KTO
from unified_lm.objectives.protocol import EmbeddingObjective, ObjectiveKind, SequenceObjective, TokenObjective
from unified_lm.objectives.token import MaskedNextToken, NextToken

TOKEN_OBJECTIVES: dict[str, Any] = {"next_token": NextToken, "masked_next_token": MaskedNextToken}
"""Objectives over supervised positions, by the name a recipe uses."""

EMBEDDING_OBJECTIVES: dict[str, Any] = {"contrastive": Contrastive}
"""Objectives over pooled vectors, by the name a recipe uses."""

SEQUENCE_OBJECTIVES: dict[str, Any] = {"kto": KTO}
"""Objectives over log-probabilities of whole samples, by the name a recipe uses."""

__all__ = [
    "EMBEDDING_OBJECTIVES",
    "SEQUENCE_OBJECTIVES",
    "TOKEN_OBJECTIVES",
    "EmbeddingObjective",
    "ObjectiveKind",
    "SequenceObjective",
    "TokenObjective",
    "build_objective",
]


def build_objective(config: ObjectiveConfig) -> TokenObjective | EmbeddingObjective | SequenceObjective:
    """The objective that a stream asks for; its `kind` says which of the three protocols it follows.

    Raises:
        ConfigError: unknown name, dotted path that cannot be imported, or a class that is no objective.
    """
    known = {**TOKEN_OBJECTIVES, **EMBEDDING_OBJECTIVES, **SEQUENCE_OBJECTIVES}
    made_by = resolve(config.name, known, "objective")
    if not isinstance(getattr(made_by, "kind", None), ObjectiveKind):
        raise ConfigError(
            f"'{config.name}' is no objective: it has no class attribute `kind`. "
            "Give it kind = ObjectiveKind.TOKEN, EMBEDDING or SEQUENCE (unified_lm/objectives/protocol.py)."
        )
    objective: TokenObjective | EmbeddingObjective | SequenceObjective = made_by(config)
    return objective
