"""What a mask of experts changes: how well texts of each kind are predicted, beside masks drawn at random."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from unified_lm.core.errors import ModelError
from unified_lm.evaluation.experts.domains import random_mask
from unified_lm.evaluation.generation.perplexity import Domain, perplexity
from unified_lm.inference.unified import UnifiedLM
from unified_lm.models.monet.masks import ExpertMask, apply_mask, routers_of


@dataclass(frozen=True)
class Effect:
    """Cross-entropy of one kind of text, in nats a token.

    Attributes:
        name: of the kind.
        before: with all experts.
        after: without those of the mask.
        random: of each random mask.
        as_used: of each random mask of experts that are used as much; empty without statistics.
    """

    name: str
    before: float
    after: float
    random: tuple[float, ...]
    as_used: tuple[float, ...]


def edit_effects(
    model: UnifiedLM,
    domains: Sequence[Domain],
    mask: ExpertMask,
    *,
    context: int,
    draws: int = 3,
    use: Sequence[np.ndarray] | None = None,
    report: Callable[[str], None] | None = None,
) -> list[Effect]:
    """Measure a mask. The model is afterwards as it was.

    Args:
        model: a MONET model, without a mask of its own.
        domains: held-out texts of each kind.
        mask: the experts that are left out.
        context: tokens of a window.
        draws: random masks of each sort.
        use: see `random_mask`; None for no comparison with experts that are used as much.
        report: called with a line before each pass over the texts.

    Raises:
        ModelError: the mask is not of this model, or the model has one already.
    """
    with model.borrow_backbone() as backbone:
        if any(router.keep is not None for router in routers_of(backbone.causal_lm)):
            raise ModelError("the model leaves experts out already; measure an edit on the model with all of them.")
    named: list[tuple[str, ExpertMask | None]] = [("all experts", None), ("the edit", mask)]
    named += [(f"random {seed}", random_mask(mask, seed)) for seed in range(draws)]
    if use is not None:
        named += [(f"as used {seed}", random_mask(mask, seed, use)) for seed in range(draws)]
    nats: dict[str, dict[str, float]] = {}
    for name, each in named:
        if report is not None:
            report(name)
        with masked(model, each):
            scores = {domain.name: perplexity(model, domain, context=context, num_resamples=100) for domain in domains}
        nats[name] = {kind: of_kind["nats"] / of_kind["tokens"] for kind, of_kind in scores.items()}
    return [
        Effect(
            domain.name,
            nats["all experts"][domain.name],
            nats["the edit"][domain.name],
            tuple(nats[f"random {seed}"][domain.name] for seed in range(draws)),
            tuple(nats[f"as used {seed}"][domain.name] for seed in range(draws if use is not None else 0)),
        )
        for domain in domains
    ]


@contextmanager
def masked(model: UnifiedLM, mask: ExpertMask | None) -> Iterator[None]:
    """Context in which experts are left out of a model.

    Raises:
        ModelError: the mask is not of this model.
    """
    with model.borrow_backbone() as backbone:
        before = [router.keep for router in routers_of(backbone.causal_lm)]
        was_masked = backbone.causal_lm.config.moe_masked
    try:
        with model.borrow_backbone() as backbone:
            apply_mask(backbone.causal_lm, mask)
        yield
    finally:
        with model.borrow_backbone() as backbone:
            backbone.causal_lm.config.moe_masked = was_masked
            for router, keep in zip(routers_of(backbone.causal_lm), before, strict=True):
                router.keep = keep
