"""Losses. An objective sees hidden states, embeddings or log-probabilities, never a model.

To add one, write a class with the shape of `TokenObjective`, `EmbeddingObjective` or `SequenceObjective`
(`objectives/protocol.py`) whose attribute `Config` holds its settings, and name it by its dotted path in a recipe
(`objective: {name: my_package.MarginLoss, margin: 0.2}`), or add its description to the table below. This package can be
imported without torch: the descriptions stand in `*_config.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from unified_lm.config.objectives import (
    EmbeddingObjectiveConfig,
    ObjectiveConfig,
    ObjectiveKind,
    SequenceObjectiveConfig,
    TokenObjectiveConfig,
)
from unified_lm.config.parts import find_implementation
from unified_lm.objectives.contrastive_config import ContrastiveConfig
from unified_lm.objectives.kto_config import KTOConfig
from unified_lm.objectives.token_config import MaskedNextTokenConfig, NextTokenConfig

if TYPE_CHECKING:
    from unified_lm.objectives.protocol import EmbeddingObjective, SequenceObjective, TokenObjective

__all__ = [
    "OBJECTIVES",
    "ContrastiveConfig",
    "EmbeddingObjectiveConfig",
    "KTOConfig",
    "MaskedNextTokenConfig",
    "NextTokenConfig",
    "ObjectiveConfig",
    "ObjectiveKind",
    "SequenceObjectiveConfig",
    "TokenObjectiveConfig",
    "build_objective",
]

OBJECTIVES: Mapping[str, type[ObjectiveConfig]] = {
    "contrastive": ContrastiveConfig,
    "next_token": NextTokenConfig,
    "masked_next_token": MaskedNextTokenConfig,
    "kto": KTOConfig,
}
"""Objectives by name: the description of each."""


def build_objective(config: ObjectiveConfig) -> TokenObjective | EmbeddingObjective | SequenceObjective:
    """The objective that a stream asks for; `config.kind` says which of the three protocols it follows.

    Raises:
        ConfigError: unknown name, or a dotted path that cannot be imported.
    """
    objective: TokenObjective | EmbeddingObjective | SequenceObjective = find_implementation(config, OBJECTIVES)(config)
    return objective
