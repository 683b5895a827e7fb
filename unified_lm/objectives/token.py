"""Token losses: next-token prediction, and masked next-token prediction.

Legend: `batch/__init__.py`.
"""

from __future__ import annotations

from enum import Enum

import torch

from unified_lm.batch import LossTerm, OutputHead, Supervision
from unified_lm.core.tables import choose
from unified_lm.objectives.cross_entropy import linear_cross_entropy
from unified_lm.objectives.liger import liger_cross_entropy, load_liger
from unified_lm.objectives.token_config import MaskedNextTokenConfig, NextTokenConfig


class CrossEntropy(Enum):
    """What computes the cross-entropy.

    Attributes:
        CHUNKED: our own tiles, on every device (`objectives/cross_entropy.py`).
        LIGER: Liger's fused kernel; needs CUDA and liger-kernel (`objectives/liger.py`).
    """

    CHUNKED = "chunked"
    LIGER = "liger"

    @classmethod
    def parse(cls, name: str) -> CrossEntropy:
        """The implementation of that name.

        Raises:
            ConfigError: there is none.
        """
        return choose(cls, name, "cross_entropy")


class NextToken:
    """Cross-entropy of the next token at every supervised position.

    Hidden states are gathered at supervised positions first, so that neither prompts nor unmasked tokens cost anything in
    the output head.

    Args:
        config: `cross_entropy` is used here; `normalization` has been applied to the weights before (`batch/normalization.py`).

    Raises:
        ConfigError: unknown `cross_entropy`.
        ModelError: Liger was asked for and is not available.
    """

    Config: type[NextTokenConfig] = NextTokenConfig

    def __init__(self, config: NextTokenConfig) -> None:
        self._liger = load_liger() if CrossEntropy.parse(config.cross_entropy) is CrossEntropy.LIGER else None

    def __call__(self, hidden: torch.Tensor, head: OutputHead, supervision: Supervision) -> LossTerm:
        """See `TokenObjective`."""
        states_ND = hidden.index_select(0, supervision.positions)
        if self._liger is not None:
            total = liger_cross_entropy(self._liger, states_ND, head, supervision.targets, supervision.weights)
        else:
            total = linear_cross_entropy(states_ND, head, supervision.targets, supervision.weights)
        return LossTerm(total, float(len(supervision.targets)))


class MaskedNextToken(NextToken):
    """Masked next-token prediction: MNTP (LLM2Vec, arXiv:2404.05961, section 2.2).

    The token at a masked position is predicted from the state one position *earlier*, as in next-token prediction, only
    that the state has seen both sides. The samples say which positions those are and what the model reads there, and
    supervision already points one position back, so the maths is `NextToken`'s.
    """

    Config: type[NextTokenConfig] = MaskedNextTokenConfig
