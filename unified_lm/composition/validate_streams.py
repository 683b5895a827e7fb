"""Cross-checks of one stream: its sources, format, attention, masking and objective."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import MISSING, fields
from typing import Any

from unified_lm.config.checks import above, at_least, choice
from unified_lm.config.schema import ObjectiveConfig, SourceConfig, StreamConfig

DTYPES = ("float32", "bfloat16")
FORMATS = ("pairs", "chat", "preference", "text", "masked_text", "views")
OBJECTIVES = ("contrastive", "next_token", "masked_next_token", "kto")
ATTENTIONS = ("causal", "bidirectional", "bidirectional_prompt")
NORMALIZATIONS = ("token", "sample", "mixed", "sum_per_sample")
REFERENCES = ("auto", "adapter_off", "cached")

_OBJECTIVE_OF_FORMAT = {
    "pairs": ("contrastive",),
    "views": ("contrastive",),
    "chat": ("next_token",),
    "preference": ("kto",),
    "text": ("next_token",),
    "masked_text": ("masked_next_token",),
}
_CONTRASTIVE_ONLY = (
    "temperature",
    "symmetric",
    "mask_same_text",
    "matryoshka_dims",
    "gradient_scale",
    "reference_world_size",
    "similarity_dtype",
)
_TOKEN_ONLY = ("normalization", "micro_batch_size", "cross_entropy", "router_aux_loss_coef")
_KTO_ONLY = ("beta", "desirable_weight", "undesirable_weight", "reference")


def stream_problems(path: str, stream: StreamConfig) -> Iterator[str]:
    """What is wrong with a stream, its sources and its objective; `path` is its key."""
    if not stream.sources:
        yield f"{path}.sources: is empty; choose data=... that offers such rows, or give {path}.sources=[{{path: FILE}}]."
    for index, source in enumerate(stream.sources):
        yield from source_problems(f"{path}.sources.{index}", source)
        if (source.instruction or source.document_instruction) and stream.format != "pairs":
            yield f"{path}.sources.{index}.instruction: only pairs have instructions, got format {stream.format}."
    yield from choice(f"{path}.format", stream.format, FORMATS, open_ended=True)
    yield from choice(f"{path}.attention", stream.attention, ATTENTIONS)
    yield from choice(f"{path}.chunking", stream.chunking, ("record", "concatenate"))
    yield from at_least(f"{path}.batch_size", stream.batch_size, 1)
    for name in ("max_query_tokens", "max_document_tokens", "max_tokens"):
        yield from at_least(f"{path}.{name}", getattr(stream, name), 4)
    yield from at_least(f"{path}.num_hard_negatives", stream.num_hard_negatives, 0)
    if not 0 <= stream.source_temperature <= 1:
        yield f"{path}.source_temperature: got {stream.source_temperature}, expected 0 to 1."
    prompted = stream.format in ("chat", "preference") or stream.format not in FORMATS
    if stream.attention == "bidirectional_prompt" and not prompted:
        yield (
            f"{path}.attention: 'bidirectional_prompt' needs prompts and answers (format chat or preference), got format "
            f"{stream.format}."
        )
    if stream.attention == "bidirectional" and stream.objective.name in ("next_token", "kto"):
        objective = stream.objective.name
        yield f"{path}.attention: a bidirectional sample sees the tokens it should predict; {objective} needs 'causal'."
    if stream.mix_sources and stream.format not in ("pairs", "views") and stream.format in FORMATS:
        yield f"{path}.mix_sources: only pairs and views take one source a batch otherwise, got format {stream.format}."
    if stream.chunking != "record" and stream.format not in ("text", "masked_text"):
        yield f"{path}.chunking: joins running text (formats text, masked_text), got format {stream.format}."
    if stream.num_hard_negatives and stream.format != "pairs":
        yield f"{path}.num_hard_negatives: only pairs have negatives, got format {stream.format}."
    yield from _masking(path, stream)
    yield from _objective(f"{path}.objective", stream)


def source_problems(path: str, source: SourceConfig) -> Iterator[str]:
    """What is wrong with a source; `path` is its key."""
    given = [name for name in ("path", "hub", "builtin") if getattr(source, name)]
    if len(given) != 1:
        yield f"{path}: got {' and '.join(given) or 'none'} of path, hub, builtin; expected exactly one."
    if source.builtin is not None:
        yield from choice(f"{path}.builtin", source.builtin, ("pydocs",))
    if source.path and source.subset:
        yield f"{path}.subset: belongs to a Hub or built-in data set, got the path {source.path}."
    if source.streaming and not source.hub:
        yield f"{path}.streaming: belongs to a Hub data set (hub=NAME), and none is given."
    if source.streaming and source.limit is None:
        yield f"{path}.streaming: reads only the first `limit` rows; set limit."
    yield from above(f"{path}.weight", source.weight, 0)
    yield from choice(f"{path}.on_empty", source.on_empty, ("error", "skip"))
    if source.limit is not None:
        yield from at_least(f"{path}.limit", source.limit, 1)


def _masking(path: str, stream: StreamConfig) -> Iterator[str]:
    masking = stream.masking
    if masking is None:
        if stream.format == "masked_text":
            yield f"{path}.masking: is missing; masked_text needs probability, scheme and mask_token."
        return
    if stream.format != "masked_text":
        yield f"{path}.masking: only applies to format masked_text, got format {stream.format}."
    if not 0 < masking.probability < 1:
        yield f"{path}.masking.probability: got {masking.probability}, expected a share between 0 and 1."
    yield from choice(f"{path}.masking.scheme", masking.scheme, ("bert", "all_mask"))
    if not masking.mask_token:
        yield f"{path}.masking.mask_token: is empty; name an ordinary token, such as '_'."


def _objective(path: str, stream: StreamConfig) -> Iterator[str]:
    objective = stream.objective
    yield from choice(f"{path}.name", objective.name, OBJECTIVES, open_ended=True)
    if not math.isfinite(objective.weight) or objective.weight < 0:
        yield f"{path}.weight: got {objective.weight}, expected a number of at least 0."
    if not math.isfinite(objective.router_aux_loss_coef) or objective.router_aux_loss_coef < 0:
        yield f"{path}.router_aux_loss_coef: got {objective.router_aux_loss_coef}, expected a number of at least 0."
    expected = _OBJECTIVE_OF_FORMAT.get(stream.format)
    if objective.name in OBJECTIVES and expected is not None and objective.name not in expected:
        yield f"{path}.name: format {stream.format} trains {' or '.join(expected)}, got {objective.name}."
    if objective.name == "contrastive":
        yield from _contrastive(path, stream)
        yield from _unused(path, objective, (*_TOKEN_ONLY, *_KTO_ONLY))
    elif objective.name == "kto":
        yield from _kto(path, objective)
        yield from _unused(path, objective, (*_TOKEN_ONLY, *_CONTRASTIVE_ONLY))
    elif objective.name in OBJECTIVES:
        yield from _unused(path, objective, (*_CONTRASTIVE_ONLY, *_KTO_ONLY))
        yield from _normalization(path, stream)


def _kto(path: str, objective: ObjectiveConfig) -> Iterator[str]:
    yield from above(f"{path}.beta", objective.beta, 0)
    for name in ("desirable_weight", "undesirable_weight"):
        yield from above(f"{path}.{name}", getattr(objective, name), 0)
    yield from choice(f"{path}.reference", objective.reference, REFERENCES)


def _contrastive(path: str, stream: StreamConfig) -> Iterator[str]:
    objective = stream.objective
    yield from above(f"{path}.temperature", objective.temperature, 0)
    yield from choice(f"{path}.gradient_scale", objective.gradient_scale, ("exact", "inverse_world_size"))
    yield from choice(f"{path}.similarity_dtype", objective.similarity_dtype, DTYPES)
    if stream.batch_size < 2:
        yield f"{path.rpartition('.')[0]}.batch_size: got {stream.batch_size}; contrastive training needs at least 2 groups."
    if objective.gradient_scale == "inverse_world_size" and (objective.reference_world_size or 0) < 1:
        yield f"{path}.reference_world_size: 'inverse_world_size' needs the world size of the published run."
    dims = objective.matryoshka_dims
    if any(dim < 1 for dim in dims) or sorted(set(dims), reverse=True) != list(dims):
        yield f"{path}.matryoshka_dims: got {list(dims)}, expected different positive numbers, largest first."


def _normalization(path: str, stream: StreamConfig) -> Iterator[str]:
    objective = stream.objective
    yield from choice(f"{path}.normalization", objective.normalization, NORMALIZATIONS)
    yield from choice(f"{path}.cross_entropy", objective.cross_entropy, ("chunked", "liger"))
    if objective.normalization == "mixed":
        if objective.micro_batch_size is None or objective.micro_batch_size < 1:
            yield f"{path}.micro_batch_size: 'mixed' needs the samples of one micro-batch (GritLM's 7B: 32)."
        elif stream.batch_size % objective.micro_batch_size:
            yield (
                f"{path}.micro_batch_size: got {objective.micro_batch_size}, which does not divide the batch of "
                f"{stream.batch_size} samples."
            )
    elif objective.micro_batch_size is not None:
        yield f"{path}.micro_batch_size: only applies to normalization 'mixed', got '{objective.normalization}'."


def _unused(path: str, objective: ObjectiveConfig, names: tuple[str, ...]) -> Iterator[str]:
    """Options that the objective ignores, where they differ from their defaults."""
    defaults = {f.name: f.default for f in fields(ObjectiveConfig) if f.default is not MISSING}
    for name in names:
        value: Any = getattr(objective, name)
        if value != defaults[name]:
            yield f"{path}.{name}: does not apply to the objective {objective.name}, and is set to {value!r}."
