"""What objectives take and give: the output head, scores of sequences, and a loss before it is normalized."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch


@dataclass(frozen=True)
class LossTerm:
    """One objective's share of a step on one rank.

    The loss of a step is `weight * total sum / total count`, both summed over every pack and every rank, so that neither
    the split into packs nor the number of ranks changes it.

    Attributes:
        sum: float32 scalar, with gradient.
        count: what the sum is divided by (supervised tokens, samples, micro-batches or queries), on the same share.
    """

    sum: torch.Tensor
    count: float


@dataclass(frozen=True, eq=False)
class SequenceScores:
    """What an objective over whole sequences is computed from; S sequences.

    Attributes:
        policy: `[S]` float32, log-probability of each sample's labeled tokens under the model being trained, in nats; with
            gradient while training.
        reference: `[S]` float32, the same under the reference model.
        desirable: `[S]` bool, whether the labeled tokens are to become more likely, or less.
        baseline: `[S]` float32, what the step's controls gave (`SequenceObjective.baseline`), without gradient.
    """

    policy: torch.Tensor
    reference: torch.Tensor
    desirable: torch.Tensor
    baseline: torch.Tensor

    @property
    def log_ratio(self) -> torch.Tensor:
        """`[S]`, log of how much more likely the sample is than under the reference."""
        return self.policy - self.reference

    @classmethod
    def cat(cls, parts: Sequence[SequenceScores]) -> SequenceScores:
        """The scores of all parts, in order; at least one part."""
        columns = [[getattr(part, field.name) for part in parts] for field in fields(cls)]
        return cls(*(torch.cat(column) for column in columns))


@dataclass(frozen=True, eq=False)
class OutputHead:
    """The language-model head as data: how a hidden state becomes logits.

    ``logits = softcap * tanh((hidden @ weight.T + bias) * scale / softcap)``, without the cap where `softcap` is None.

    Attributes:
        weight: `[V, D]`, in the model's dtype; requires a gradient where it is trained.
        bias: `[V]` or None.
        scale: factor of the logits (Cohere's logit_scale, the inverse of Granite's logits_scaling); 1 for most families.
        softcap: Gemma 2's final_logit_softcapping, or None.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
