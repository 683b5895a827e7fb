"""Load balancing for mixture-of-experts families."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from unified_lm.batch import LossTerm


def expert_load(router_logits: Sequence[torch.Tensor], top_k: int, mask: torch.Tensor | None = None) -> torch.Tensor:
    """How often each expert was chosen: the counts behind f of `load_balancing`.

    Args:
        router_logits: per MoE layer `[T, E]`, E experts.
        top_k: experts chosen per token.
        mask: bool `[T]`, True where a token counts; None counts all.

    Returns:
        float32 `[E]`, choices summed over layers and tokens, without gradient. Sum it over packs and ranks where `share` of
        `load_balancing` is wanted.
    """
    load = torch.zeros(router_logits[0].shape[-1], device=router_logits[0].device)
    with torch.no_grad():
        for logits_TE in router_logits:
            chosen_TK = logits_TE.float().topk(top_k, dim=-1).indices
            counted_TK = torch.ones_like(chosen_TK, dtype=torch.float32) if mask is None else mask[:, None].expand_as(chosen_TK)
            load.scatter_add_(0, chosen_TK.flatten(), counted_TK.flatten().float())
    return load


def load_balancing(
    router_logits: Sequence[torch.Tensor],
    top_k: int,
    mask: torch.Tensor | None = None,
    share: torch.Tensor | None = None,
) -> LossTerm:
    """The auxiliary loss of the Switch Transformer (Fedus et al., arXiv:2101.03961, eq. 4-6), over all layers at once.

    ``L = E * sum_e f_e * P_e``: f_e the number of times that expert e was chosen, per token; P_e its mean router
    probability; both means run over tokens *and* layers, as in transformers' `load_balancing_loss_func`. Perfect balance
    gives `top_k`. GritLM hard-codes two experts per token; here it is the model's number.

    Args:
        router_logits: per MoE layer `[T, E]`, before the softmax, any floating dtype; computed in float32.
        top_k: experts chosen per token.
        mask: bool `[T]`, True where a token counts (GritLM balances generative tokens only); None counts all.
        share: float32 `[E]`, f of the whole step over packs and ranks, if known (`expert_load` summed, divided by
            layers x tokens). The term is then exactly additive. Without it f is this pack's own, and splitting a step into
            other packs changes the loss slightly, as splitting into micro-batches does in every implementation.

    Returns:
        The loss times the tokens that count, and their number.
    """
    num_experts = router_logits[0].shape[-1]
    keep = None if mask is None else mask.to(torch.float32)
    num_tokens = float(len(router_logits[0])) if keep is None else float(keep.sum())
    if not num_tokens:
        return LossTerm(sum((logits.float().sum() * 0.0 for logits in router_logits), torch.zeros(())), 0.0)
    rows = num_tokens * len(router_logits)
    if share is None:
        share = expert_load(router_logits, top_k, mask) / rows
    probability_E = torch.zeros(num_experts, device=router_logits[0].device)
    with torch.autocast(router_logits[0].device.type, enabled=False):
        for logits_TE in router_logits:
            probability_TE = logits_TE.float().softmax(-1)
            probability_E = probability_E + (probability_TE if keep is None else probability_TE * keep[:, None]).sum(0)
        loss = num_experts * (share * probability_E / rows).sum()
    return LossTerm(loss * num_tokens, num_tokens)
