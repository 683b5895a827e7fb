"""Cross-checks of a configuration: what single fields cannot know. Every problem is returned, none is raised here."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from unified_lm.config.schema import (
    ChainConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    RunConfig,
    SourceConfig,
    StreamConfig,
)
from unified_lm.core.errors import did_you_mean

MODEL_SOURCES = ("hub", "embedded")
DTYPES = ("float32", "bfloat16")
KERNELS = ("auto", "flash", "flex", "sdpa", "padded")
POOLINGS = ("mean", "weighted_mean", "last_token", "cls")
FORMATS = ("pairs", "chat", "preference", "text", "masked_text", "views")
OBJECTIVES = ("contrastive", "next_token", "masked_next_token", "kto")
ATTENTIONS = ("causal", "bidirectional", "bidirectional_prompt")
NORMALIZATIONS = ("token", "sample", "mixed", "sum_per_sample")
BACKENDS = ("auto", "single", "ddp", "zero0", "zero1", "zero2", "zero3", "zero3_offload")
SCHEDULES = ("linear", "cosine", "constant")

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
_TOKEN_ONLY = ("normalization", "micro_batch_size", "cross_entropy")
_KTO_ONLY = ("beta", "desirable_weight", "undesirable_weight", "reference")
REFERENCES = ("auto", "adapter_off", "cached")


def find_problems(config: RunConfig | ChainConfig) -> list[str]:
    """Every contradiction, value out of range and unknown choice of a configuration, each as one sentence with its key."""
    if isinstance(config, ChainConfig):
        return list(_chain(config))
    return list(_run(config))


def _adapter_dropout(config: RunConfig) -> float:
    return 0.0 if config.lora is None else config.lora.dropout


def find_notices(config: RunConfig) -> list[str]:
    """What is allowed but rarely meant, one sentence each."""
    return list(_notices(config))


def longest_sample(stream: StreamConfig) -> int:
    """The limit of a stream's longest sample, in tokens."""
    if stream.format == "pairs":
        return max(stream.max_query_tokens, stream.max_document_tokens)
    return stream.max_tokens


def zero_stage(backend: str) -> int | None:
    """The ZeRO stage of a backend; None where DeepSpeed is not used."""
    return int(backend[len("zero")]) if backend.startswith("zero") and backend in BACKENDS else None


def _chain(config: ChainConfig) -> Iterator[str]:
    if not config.stages:
        yield "chain: got no stages, expected the names of at least one recipe."
    for stage in config.stages[:-1]:
        if not stage.export.enabled:
            yield f"export.enabled: the stage after {stage.recipe} starts from its export, which is turned off."
    for stage in config.stages:
        if stage.resume not in ("none", "auto"):
            yield f"resume: got '{stage.resume}', a chain takes 'none' or 'auto'."
        yield from (f"stage {stage.recipe}: {problem}" for problem in _run(stage))


def _run(config: RunConfig) -> Iterator[str]:
    yield from _at_least("max_steps", config.max_steps, 1)
    yield from _model(config)
    yield from _lora(config)
    if not config.streams:
        yield "streams: got none, expected at least one."
    for name, stream in config.streams.items():
        yield from _stream(f"streams.{name}", stream)
        if stream.objective.name == "kto" and stream.objective.reference == "adapter_off" and config.lora is None:
            yield (
                f"streams.{name}.objective.reference: 'adapter_off' needs adapters, and lora is none; use lora=all_linear, or "
                "reference=cached."
            )
        if stream.format == "views" and config.model.attention_dropout == 0 and not _adapter_dropout(config):
            yield f"streams.{name}: two views differ by dropout alone, and model.attention_dropout and lora.dropout are 0."
    yield from _optim(config.optim)
    yield from _parallel(config)
    yield from _at_least("packing.token_budget", config.packing.token_budget, 1)
    yield from _at_least("logging.every", config.logging.every, 1)
    yield from _choice("logging.wandb", config.logging.wandb, ("disabled", "offline", "online"))
    if not config.logging.wandb_project:
        yield "logging.wandb_project: is empty; give the wandb project a name."
    yield from _checkpoint(config)
    yield from _validation(config)
    yield from _export(config)
    if config.resume not in ("none", "auto") and not Path(config.resume).is_dir():
        yield f"resume: got '{config.resume}', expected 'none', 'auto' or the folder of a checkpoint; there is no such folder."
    if config.resume == "auto" and not config.run_dir:
        yield "resume: 'auto' looks for checkpoints in run_dir, which is not set; add run_dir=FOLDER."


def _parallel(config: RunConfig) -> Iterator[str]:
    parallel = config.parallel
    yield from _choice("parallel.backend", parallel.backend, BACKENDS)
    yield from _above("parallel.timeout_minutes", parallel.timeout_minutes, 0)
    yield from _at_least("parallel.bucket_elements", parallel.bucket_elements, 1)
    yield from _at_least("parallel.persistence_threshold", parallel.persistence_threshold, 0)
    stage = zero_stage(parallel.backend)
    if stage == 0 and config.model.dtype == "bfloat16":
        yield (
            "parallel.backend: zero0 adds bfloat16 gradients up in bfloat16, and model.dtype is bfloat16; use parallel=ddp or "
            "zero1, which add them up in float32."
        )
    if stage == 3 and config.model.autocast:
        yield (
            f"model.autocast: keeps a bfloat16 copy of every weight while it runs, so {parallel.backend} would save nothing; "
            "set model.dtype=bfloat16 and model.autocast=false, or use parallel=zero2."
        )
    if stage is not None and config.lora is not None and config.lora.quantize_4bit:
        yield (
            f"lora.quantize_4bit: 4-bit weights cannot be partitioned or flattened, got parallel.backend={parallel.backend}; "
            "use parallel=ddp."
        )


def _model(config: RunConfig) -> Iterator[str]:
    model = config.model
    yield from _choice("model.source", model.source, MODEL_SOURCES)
    yield from _choice("model.dtype", model.dtype, DTYPES)
    yield from _choice("model.attention_kernel", model.attention_kernel, KERNELS)
    yield from _choice("model.pooling", model.pooling, POOLINGS)
    if not model.name and not model.tiny_random and model.init_from is None:
        yield "model.name: is empty; choose a model (model=smollm2_135m), or give model.name or model.init_from."
    if model.tiny_random and not model.family:
        yield "model.family: is empty; a tiny random model needs the family to build (llama, mistral, qwen3, ...)."
    if model.autocast and model.dtype != "float32":
        yield f"model.autocast: keeps float32 weights, but model.dtype is {model.dtype}; set model.dtype=float32."
    if model.attention_dropout is not None:
        yield from _share("model.attention_dropout", model.attention_dropout)
        if model.attention_dropout > 0 and model.attention_kernel == "flex":
            yield "model.attention_dropout: the flex kernel has no dropout; choose model.attention_kernel=sdpa or flash."
    if model.projection_dim is not None:
        yield from _at_least("model.projection_dim", model.projection_dim, 1)
        if not any(stream.objective.name == "contrastive" for stream in config.streams.values()):
            yield "model.projection_dim: projects embeddings, but no stream has a contrastive objective."


def _lora(config: RunConfig) -> Iterator[str]:
    lora = config.lora
    if lora is None:
        return
    yield from _at_least("lora.r", lora.r, 1)
    yield from _above("lora.alpha", lora.alpha, 0)
    yield from _share("lora.dropout", lora.dropout)
    if isinstance(lora.target_modules, str):
        yield from _choice("lora.target_modules", lora.target_modules, ("all-linear",))
    elif not lora.target_modules:
        yield "lora.target_modules: is empty; name modules (q_proj, ...), or 'all-linear'."
    if lora.quantize_4bit:
        yield from _quantized(config.model)


def _quantized(model: ModelConfig) -> Iterator[str]:
    if model.source != "hub" or model.tiny_random:
        yield "lora.quantize_4bit: needs weights from the Hub or a directory (model.source=hub)."
    if model.dtype != "bfloat16":
        yield f"lora.quantize_4bit: computes in bfloat16, but model.dtype is {model.dtype}."


def _stream(path: str, stream: StreamConfig) -> Iterator[str]:
    if not stream.sources:
        yield f"{path}.sources: is empty; choose data=... that offers such rows, or give {path}.sources=[{{path: FILE}}]."
    for index, source in enumerate(stream.sources):
        yield from _source(f"{path}.sources.{index}", source)
        if (source.instruction or source.document_instruction) and stream.format != "pairs":
            yield f"{path}.sources.{index}.instruction: only pairs have instructions, got format {stream.format}."
    yield from _choice(f"{path}.format", stream.format, FORMATS, open_ended=True)
    yield from _choice(f"{path}.attention", stream.attention, ATTENTIONS)
    yield from _choice(f"{path}.chunking", stream.chunking, ("record", "concatenate"))
    yield from _at_least(f"{path}.batch_size", stream.batch_size, 1)
    for name in ("max_query_tokens", "max_document_tokens", "max_tokens"):
        yield from _at_least(f"{path}.{name}", getattr(stream, name), 4)
    yield from _at_least(f"{path}.num_hard_negatives", stream.num_hard_negatives, 0)
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


def _source(path: str, source: SourceConfig) -> Iterator[str]:
    given = [name for name in ("path", "hub", "builtin") if getattr(source, name)]
    if len(given) != 1:
        yield f"{path}: got {' and '.join(given) or 'none'} of path, hub, builtin; expected exactly one."
    if source.builtin is not None:
        yield from _choice(f"{path}.builtin", source.builtin, ("pydocs",))
    if source.path and source.subset:
        yield f"{path}.subset: belongs to a Hub or built-in data set, got the path {source.path}."
    if source.streaming and not source.hub:
        yield f"{path}.streaming: belongs to a Hub data set (hub=NAME), and none is given."
    if source.streaming and source.limit is None:
        yield f"{path}.streaming: reads only the first `limit` rows; set limit."
    yield from _above(f"{path}.weight", source.weight, 0)
    yield from _choice(f"{path}.on_empty", source.on_empty, ("error", "skip"))
    if source.limit is not None:
        yield from _at_least(f"{path}.limit", source.limit, 1)


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
    yield from _choice(f"{path}.masking.scheme", masking.scheme, ("bert", "all_mask"))
    if not masking.mask_token:
        yield f"{path}.masking.mask_token: is empty; name an ordinary token, such as '_'."


def _objective(path: str, stream: StreamConfig) -> Iterator[str]:
    objective = stream.objective
    yield from _choice(f"{path}.name", objective.name, OBJECTIVES, open_ended=True)
    if not math.isfinite(objective.weight) or objective.weight < 0:
        yield f"{path}.weight: got {objective.weight}, expected a number of at least 0."
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
    yield from _above(f"{path}.beta", objective.beta, 0)
    for name in ("desirable_weight", "undesirable_weight"):
        yield from _above(f"{path}.{name}", getattr(objective, name), 0)
    yield from _choice(f"{path}.reference", objective.reference, REFERENCES)


def _contrastive(path: str, stream: StreamConfig) -> Iterator[str]:
    objective = stream.objective
    yield from _above(f"{path}.temperature", objective.temperature, 0)
    yield from _choice(f"{path}.gradient_scale", objective.gradient_scale, ("exact", "inverse_world_size"))
    yield from _choice(f"{path}.similarity_dtype", objective.similarity_dtype, DTYPES)
    if stream.batch_size < 2:
        yield f"{path.rpartition('.')[0]}.batch_size: got {stream.batch_size}; contrastive training needs at least 2 groups."
    if objective.gradient_scale == "inverse_world_size" and (objective.reference_world_size or 0) < 1:
        yield f"{path}.reference_world_size: 'inverse_world_size' needs the world size of the published run."
    dims = objective.matryoshka_dims
    if any(dim < 1 for dim in dims) or sorted(set(dims), reverse=True) != list(dims):
        yield f"{path}.matryoshka_dims: got {list(dims)}, expected different positive numbers, largest first."


def _normalization(path: str, stream: StreamConfig) -> Iterator[str]:
    objective = stream.objective
    yield from _choice(f"{path}.normalization", objective.normalization, NORMALIZATIONS)
    yield from _choice(f"{path}.cross_entropy", objective.cross_entropy, ("chunked", "liger"))
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


def _checkpoint(config: RunConfig) -> Iterator[str]:
    checkpoint = config.checkpoint
    yield from _at_least("checkpoint.every", checkpoint.every, 0)
    yield from _at_least("checkpoint.keep_last", checkpoint.keep_last, 1)
    yield from _at_least("checkpoint.keep_every", checkpoint.keep_every, 0)
    if checkpoint.keep_every > 0 and checkpoint.every > 0 and checkpoint.keep_every % checkpoint.every:
        yield (
            f"checkpoint.keep_every: got {checkpoint.keep_every}, expected a multiple of checkpoint.every "
            f"({checkpoint.every}): there is no checkpoint at the steps between."
        )
    if checkpoint.copy_to is not None and config.run_dir:
        own = Path(config.run_dir, "checkpoints").resolve()
        if Path(checkpoint.copy_to).resolve() == own:
            yield f"checkpoint.copy_to: {checkpoint.copy_to} is where the run keeps its checkpoints; name another folder."


def _optim(optim: OptimConfig) -> Iterator[str]:
    yield from _at_least("optim.max_skipped_steps", optim.max_skipped_steps, 1)
    yield from _choice("optim.schedule", optim.schedule, SCHEDULES)
    yield from _above("optim.learning_rate", optim.learning_rate, 0)
    yield from _above("optim.eps", optim.eps, 0)
    for index, beta in enumerate(optim.betas):
        yield from _share(f"optim.betas.{index}", beta)
    for name in ("weight_decay", "max_grad_norm", "warmup_steps"):
        yield from _at_least(f"optim.{name}", getattr(optim, name), 0)
    yield from _share("optim.warmup_ratio", optim.warmup_ratio)
    if not 0 <= optim.final_ratio <= 1:
        yield f"optim.final_ratio: got {optim.final_ratio}, expected 0 to 1."
    if optim.warmup_steps and optim.warmup_ratio:
        yield (
            f"optim.warmup_steps={optim.warmup_steps} and optim.warmup_ratio={optim.warmup_ratio} exclude each other; "
            "set one of them to 0."
        )
    if optim.horizon_steps is not None:
        yield from _at_least("optim.horizon_steps", optim.horizon_steps, 1)
    if optim.schedule == "constant" and (optim.horizon_steps is not None or optim.final_ratio):
        yield "optim.schedule: 'constant' does not decay, so horizon_steps and final_ratio do not apply."


def _validation(config: RunConfig) -> Iterator[str]:
    validation = config.validation
    yield from _at_least("validation.every", validation.every, 0)
    yield from _at_least("validation.num_batches", validation.num_batches, 1)
    if validation.normalization is not None:
        yield from _choice("validation.normalization", validation.normalization, ("token", "sample", "sum_per_sample"))
    for name, sources in validation.sources.items():
        if name not in config.streams:
            yield f"validation.sources.{name}: there is no stream '{name}'.{did_you_mean(name, config.streams)}"
        elif config.streams[name].format == "views":
            yield f"validation.sources.{name}: two views are equal without dropout, so a held-out loss would say nothing."
        for index, source in enumerate(sources):
            yield from _source(f"validation.sources.{name}.{index}", source)
    if validation.retrieval is None:
        return
    yield from _source("validation.retrieval.queries", validation.retrieval.queries)
    yield from _at_least("validation.retrieval.max_queries", validation.retrieval.max_queries, 2)
    if not any(stream.objective.name == "contrastive" for stream in config.streams.values()):
        yield "validation.retrieval: no stream trains embeddings (objective contrastive); remove it: ~validation.retrieval"


def _export(config: RunConfig) -> Iterator[str]:
    export = config.export
    yield from _choice("export.dtype", export.dtype, (*DTYPES, "float16"))
    for index, mode in enumerate(export.modes):
        yield from _choice(f"export.modes.{index}", mode, ("embed", "generate"))
    templates = {name: s.template for name, s in config.streams.items() if s.format in ("pairs", "views", "chat", "preference")}
    if export.enabled and len(set(templates.values())) > 1:
        listed = ", ".join(f"streams.{name}.template is '{template}'" for name, template in templates.items())
        yield f"export: has one template for all modes, but {listed}; make them equal, or set export.enabled=false."
    if export.dtype == "float32" and config.model.dtype == "bfloat16":
        yield "export.dtype: the weights are bfloat16 (model.dtype), so a float32 export would only be larger; use bfloat16."
    for name, stream in config.streams.items():
        if export.enabled and stream.template == "echo":
            yield (
                f"streams.{name}.template: stock tools cannot repeat a text as 'echo' does; choose another template, or set "
                "export.enabled=false."
            )
        if export.enabled and stream.attention == "bidirectional_prompt":
            yield (
                f"streams.{name}.attention: stock tools generate causally and cannot repeat 'bidirectional_prompt'; "
                "train with 'causal', or set export.enabled=false."
            )
    if export.push_to_hub is None:
        return
    owner, _, name = export.push_to_hub.partition("/")
    if not owner or not name or "/" in name:
        yield f"export.push_to_hub: got '{export.push_to_hub}', expected ORGANISATION/NAME."
    if not export.enabled:
        yield "export.push_to_hub: there is nothing to upload with export.enabled=false."


def _notices(config: RunConfig) -> Iterator[str]:
    for name, stream in config.streams.items():
        if longest_sample(stream) > config.packing.token_budget:
            yield (
                f"packing.token_budget={config.packing.token_budget} is below stream {name}'s limit of "
                f"{longest_sample(stream)} tokens: longer samples get a pack of their own."
            )
        if stream.format == "views" and config.model.attention_dropout is None and not _adapter_dropout(config):
            yield (
                f"stream {name}: two views of a text differ by dropout alone, and here only the checkpoint's own settings can "
                "give some; set model.attention_dropout."
            )
    if config.optim.warmup_steps >= config.max_steps:
        yield (
            f"optim.warmup_steps={config.optim.warmup_steps} is not below max_steps={config.max_steps}: "
            "the learning rate never reaches its peak."
        )


def _choice(path: str, value: str, known: tuple[str, ...], *, open_ended: bool = False) -> Iterator[str]:
    if value not in known and not (open_ended and "." in value):
        yield f"{path}: unknown value '{value}'.{did_you_mean(value, known)}"


def _at_least(path: str, value: float, least: float) -> Iterator[str]:
    if not value >= least:
        yield f"{path}: got {value}, expected at least {least}."


def _above(path: str, value: float, bound: float) -> Iterator[str]:
    if not (value > bound and math.isfinite(value)):
        yield f"{path}: got {value}, expected more than {bound}."


def _share(path: str, value: float) -> Iterator[str]:
    if not 0 <= value < 1:
        yield f"{path}: got {value}, expected a share from 0 to below 1."
