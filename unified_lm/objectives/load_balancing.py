"""Load balancing for mixture-of-experts families: the auxiliary loss of the Switch Transformer.

``L = E * sum_e f_e * P_e`` (Fedus et al., arXiv:2101.03961, eq. 4-6): f_e the number of times that expert e was chosen, per
token; P_e its mean router probability. Both means run over tokens *and* layers, as in transformers' `load_balancing_loss_func`.
Perfect balance gives `top_k`, every token at the same experts up to E. GritLM hard-codes two experts per token; here it is the
model's number.

f has no gradient, but it multiplies every token's: only with f of the whole step, over all packs and ranks, does the split into
packs not change the loss. So a pack's share is computed in two parts: `route` sums what its routers did, and
`load_balancing` gives the loss once f is known. Shape suffixes: T tokens, E experts, K chosen experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Routing:
    """What the routers did with some tokens, summed over these and over the layers with experts.

    Attributes:
        load: `[E]`, how often each expert was chosen, without gradient.
        probability: `[E]`, router probabilities, with gradient.
    """

    load: torch.Tensor
    probability: torch.Tensor


def route(router_logits: Sequence[torch.Tensor], top_k: int, positions: torch.Tensor) -> Routing:
    """Sum up what the routers did with some tokens of a pack.

    Args:
        router_logits: per layer with experts `[T, E]`, before the softmax, any floating dtype; computed in float32 (float64
            stays).
        top_k: experts chosen per token.
        positions: int64 `[N]`, the tokens that count (GritLM balances generative ones only); may be none.
    """
    num_experts = router_logits[0].shape[-1]
    dtype = torch.promote_types(router_logits[0].dtype, torch.float32)
    load_E, probability_E = (torch.zeros(num_experts, dtype=dtype, device=positions.device) for _ in range(2))
    for logits_TE in router_logits:
        counted_NE = logits_TE.index_select(0, positions).to(dtype)
        chosen_NK = counted_NE.detach().topk(top_k, dim=-1).indices
        load_E.scatter_add_(0, chosen_NK.flatten(), torch.ones_like(chosen_NK, dtype=dtype).flatten())
        probability_E = probability_E + counted_NE.softmax(-1).sum(0)
    return Routing(load_E, probability_E)


def expert_fraction(load: torch.Tensor, top_k: int) -> tuple[torch.Tensor, float]:
    """f of the loss, and what its sum is divided by.

    Args:
        load: `[E]`, `Routing.load` summed over everything that is balanced together.
        top_k: experts chosen per token.

    Returns:
        f `[E]`, and tokens times layers. Both are 0 where no token counts.
    """
    rows = float(load.sum()) / top_k
    return load / max(rows, 1.0), rows


def load_balancing(probability: torch.Tensor, fraction: torch.Tensor) -> torch.Tensor:
    """The sum of the loss over some tokens and all layers; divided by tokens times layers it is the loss.

    Args:
        probability: `[E]`, `Routing.probability` of these tokens.
        fraction: `[E]`, f over everything that is balanced together (`expert_fraction`).

    Returns:
        A scalar, additive over tokens.
    """
    return len(fraction) * (fraction.to(probability.dtype) * probability).sum()
