"""Reference log-probabilities that a run computes before its first step."""

from __future__ import annotations

from unified_lm.assembly.build import Run
from unified_lm.core.tracing import trace_span, traced
from unified_lm.engine.reference_scores import ReferenceCache
from unified_lm.models.identity import identity_key


def score_references(run: Run) -> None:
    """Give every stream that needs them the log-probabilities of its rows; what the cache lacks is computed. Collective.

    It takes one forward of whole sources, so call it when nothing is left that could refuse the run; and before the first
    update and before a checkpoint is read, since the weights as loaded are the reference.
    """
    if not run.scored:
        return
    training, model = run.training, run.training.config.model
    backbone = training.trainable.backbone
    with trace_span("hash the weights"):
        key = identity_key(backbone.causal_lm, training.backend.whole)
    cache = ReferenceCache(
        traced("forward", training.backend.forward),
        training.trainable,
        f"{key} {model.dtype} {model.autocast} {backbone.kernel}",
        training.config.packing.token_budget,
        equal_forwards=training.backend.equal_forwards,
        progress=training.config.logging.progress,
    )
    for stream in run.scored:
        cache.attach(stream)
