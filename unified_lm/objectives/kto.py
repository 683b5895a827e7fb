"""KTO: learning from single completions that are desirable or not, without pairs.

Ethayarajh et al., 2024, "KTO: Model Alignment as Prospect Theoretic Optimization" (arXiv 2402.01306), section 4.1. GRIT (arXiv
2402.09906, section 3.2) applies it to a finished GritLM. Legend: S samples, C controls.
"""

from __future__ import annotations

import torch

from unified_lm.batch import LossTerm, SequenceScores
from unified_lm.objectives.kto_config import KTOConfig


class KTO:
    """Kahneman-Tversky optimization (KTO, equations 7 and 8).

    With the log-ratio r = log pi(y|x) - log pi_ref(y|x) of a completion and a reference point z0::

        desirable    w_D * (1 - sigmoid(beta * (r - z0)))
        undesirable  w_U * (1 - sigmoid(beta * (z0 - r)))

    z0 stands for KL(pi || pi_ref) and is estimated by the mean of r over *mismatched* completions (answers to other prompts),
    at least 0, without gradient. Here the mean runs over the whole step and all ranks. trl averages over every device's
    micro-batch, so that its z0 depends on how a batch is split.

    Args:
        config: `beta`, `desirable_weight` and `undesirable_weight` are used.
    """

    Config = KTOConfig

    def __init__(self, config: KTOConfig) -> None:
        self.beta = config.beta
        self.desirable_weight = config.desirable_weight
        self.undesirable_weight = config.undesirable_weight

    def baseline(self, log_ratios: torch.Tensor) -> torch.Tensor:
        """z0 = max(0, mean of the controls' log-ratios); 0 where there are none."""
        if not len(log_ratios):
            return torch.zeros((), device=log_ratios.device)
        return log_ratios.detach().mean().clamp(min=0.0)

    def __call__(self, scores: SequenceScores) -> LossTerm:
        """See `SequenceObjective`; computed in float32."""
        gain_S = torch.where(scores.desirable, 1.0, -1.0) * (scores.log_ratio - scores.baseline)
        weight_S = torch.where(scores.desirable, self.desirable_weight, self.undesirable_weight)
        losses_S = weight_S * torch.sigmoid(-self.beta * gain_S)  # 1 - sigmoid(x) = sigmoid(-x), without the cancellation
        return LossTerm(losses_S.sum(), float(len(losses_S)))

    def measure(self, scores: SequenceScores) -> dict[str, torch.Tensor]:
        """z0, log-probabilities and log-ratios of desirable and of undesirable samples, and how far these are apart.

        Returns:
            "kl" (z0), "log_probability_desirable" and "_undesirable", "log_ratio_desirable" and "_undesirable" (beta times
            these is what trl calls rewards), "margin" (mean log-ratio of desirable minus that of undesirable samples), and
            "accuracy" (1 for a sample on the right side of z0). All in nats but the last.
        """
        good_S, ratio_S = scores.desirable, scores.log_ratio
        numbers = {"kl": scores.baseline, "accuracy": ((ratio_S > scores.baseline) == good_S).float()}
        for name, chosen_S in (("desirable", good_S), ("undesirable", ~good_S)):
            numbers[f"log_probability_{name}"] = scores.policy[chosen_S]
            numbers[f"log_ratio_{name}"] = ratio_S[chosen_S]
        if good_S.any() and not good_S.all():  # a difference of two means, written as one mean over all samples
            share = good_S.float().mean()
            numbers["margin"] = torch.where(good_S, ratio_S / share, -ratio_S / (1 - share))
        return numbers
