"""From token states to one vector per sample: pooling over packed spans, and an optional linear head.

Legend: `batch/__init__.py`; P is the number of pooled tokens of a pack.
"""

from __future__ import annotations

from enum import Enum

import torch
import torch.nn.functional as F
from torch import nn

from unified_lm.core.tables import choose


class Pooling(Enum):
    """How the states of a pool span become one vector.

    Attributes:
        MEAN: their mean.
        WEIGHTED_MEAN: their mean with weights 1, 2, ..., n (SGPT, arXiv:2202.08904, eq. 2); for causal states, where later
            tokens have seen more.
        LAST_TOKEN: the last one.
        CLS: the first one. GritLM's "cls" takes position 0 even if the instruction is not pooled; a span must start at 0 for
            that.
    """

    MEAN = "mean"
    WEIGHTED_MEAN = "weighted_mean"
    LAST_TOKEN = "last_token"
    CLS = "cls"

    @classmethod
    def parse(cls, name: str | Pooling) -> Pooling:
        """The method with this name.

        Raises:
            ConfigError: there is no such method.
        """
        return name if isinstance(name, cls) else choose(cls, str(name), "pooling")


def pool(hidden: torch.Tensor, spans: torch.Tensor, method: str | Pooling, num_tokens: int | None = None) -> torch.Tensor:
    """Pool packed spans, in float32 with autocast off, whatever the states' dtype.

    Args:
        hidden: `[T, D]`, states of a pack.
        spans: int64 `[E, 2]`, pooled `[start, stop)` in pack coordinates, none empty (`Sample` ensures it); E may be 0.
        method: a `Pooling` or its name.
        num_tokens: P, where the host knows it (`Pack.num_pooled`): a mean then does not wait for the device.

    Returns:
        float32 `[E, D]` (float64 for float64 states), not normalized, differentiable. Each row depends only on its own span.

    Raises:
        ConfigError: unknown method.
    """
    kind = Pooling.parse(method)
    work = torch.promote_types(hidden.dtype, torch.float32)
    start_E, stop_E = spans.unbind(1)
    if kind is Pooling.CLS:
        return hidden[start_E].to(work)
    if kind is Pooling.LAST_TOKEN:
        return hidden[stop_E - 1].to(work)
    if not len(spans):
        return hidden[:0].to(work)
    with torch.autocast(hidden.device.type, enabled=False):
        return _mean(hidden, start_E, stop_E - start_E, work, num_tokens, weighted=kind is Pooling.WEIGHTED_MEAN)


def _mean(
    hidden_TD: torch.Tensor,
    start_E: torch.Tensor,
    length_E: torch.Tensor,
    work: torch.dtype,
    num_tokens: int | None,
    *,
    weighted: bool,
) -> torch.Tensor:
    """Mean of each span, its tokens weighted equally or 1..n.

    The sum is a segment reduction. Its order is fixed, unlike that of index_add on CUDA, and it does not lose precision to
    cancellation, unlike differences of cumulative sums.
    """
    row_P = torch.repeat_interleave(torch.arange(len(length_E), device=length_E.device), length_E, output_size=num_tokens)
    offset_P = torch.arange(len(row_P), device=row_P.device) - (length_E.cumsum(0) - length_E)[row_P]  # within its span
    states_PD = hidden_TD[start_E[row_P] + offset_P].to(work)
    total_E = length_E.to(work)
    if weighted:
        states_PD = states_PD * (offset_P + 1).to(work)[:, None]
        total_E = total_E * (total_E + 1) / 2
    summed_ED = torch.segment_reduce(states_PD, "sum", lengths=length_E, unsafe=True)
    return summed_ED / total_E[:, None]


class Projection(nn.Module):
    """A linear head with a bias on the pooled vector, computed in float32.

    GritLM projects token states before pooling, without an activation, which is the same map for mean pooling.

    Args:
        in_features: hidden size of the model.
        out_features: dimensions of the embeddings.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, out_features)

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        """Map float32 `[E, D]` to float32 `[E, out_features]`, whatever the head's own dtype."""
        with torch.autocast(pooled.device.type, enabled=False):
            weight, bias = self.linear.weight, self.linear.bias
            return F.linear(pooled, weight.to(pooled.dtype), bias.to(pooled.dtype))
