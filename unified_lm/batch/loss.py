"""What objectives take and give: the output head, and a loss before it is normalised."""

from __future__ import annotations

from dataclasses import dataclass

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
