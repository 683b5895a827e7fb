"""Settings that decide nothing in a run: what was asked for in vain on the command line is told.

Contradictions are refused (`composition.validate`). These are none: a recipe's group, or a command that is for several runs,
often holds what only some of them use. So nothing is refused, and only what was given on the command line is told.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import fields
from typing import Any

from unified_lm.config.objectives import ObjectiveKind
from unified_lm.config.schema import (
    CheckpointConfig,
    ExportConfig,
    LoggingConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    ValidationConfig,
)
from unified_lm.config.streams import EMBED, StreamConfig

_DEFAULTS = {
    "model": ModelConfig(),
    "parallel": ParallelConfig(),
    "logging": LoggingConfig(),
    "checkpoint": CheckpointConfig(),
    "validation": ValidationConfig(),
    "export": ExportConfig(),
}


def _from_elsewhere(config: RunConfig) -> str:
    if config.model.init_from is not None:
        return "the run starts from model.init_from"
    return "the weights are random (model.tiny_random)" if config.model.tiny_random else ""


def _not_from_hub(config: RunConfig) -> str:
    return _from_elsewhere(config) or ("" if config.model.source == "hub" else f"model.source is {config.model.source}")


def _runs_no_code(config: RunConfig) -> str:
    return "" if config.model.init_from is not None else _not_from_hub(config)


def _not_from_scratch(config: RunConfig) -> str:
    return _from_elsewhere(config) or ("" if config.model.source == "scratch" else "its weights are loaded, not drawn")


def _describes_loaded(config: RunConfig) -> str:
    if config.dry_run or not _not_from_scratch(config):
        return ""
    return _from_elsewhere(config) or "weights bring their own configuration; it describes them for dry_run and parallel=auto"


def _own_tokenizer(config: RunConfig) -> str:
    return "it is that of model.init_from" if config.model.source == "scratch" and config.model.init_from is not None else ""


def _no_vectors(config: RunConfig) -> str:
    embeds = config.trains_embeddings or (config.export.enabled and EMBED in config.export.modes)
    return "" if embeds else "no stream trains embeddings, and the export has none"


def _not_zero3(config: RunConfig) -> str:
    backend = config.parallel.backend
    return "" if backend.startswith(("zero3", "auto")) else f"parallel.backend is {backend}, which divides no weights"


def _not_zero(config: RunConfig) -> str:
    backend = config.parallel.backend
    return "" if backend.startswith(("zero", "auto")) else f"parallel.backend is {backend}, and not one of DeepSpeed's"


def _no_offload(config: RunConfig) -> str:
    backend = config.parallel.backend
    return "" if backend == "zero3_offload" else f"parallel.backend is {backend}; zero3_offload is what offloads"


def _no_wandb(config: RunConfig) -> str:
    return "logging.wandb is disabled" if config.logging.wandb == "disabled" else ""


def _no_checkpoint_on_the_way(config: RunConfig) -> str:
    return "" if config.checkpoint.every else "checkpoint.every is 0, and only the last step is saved"


def _no_held_out_rows(config: RunConfig) -> str:
    return "" if config.validation.sources else "validation.sources has no rows"


def _nothing_validated(config: RunConfig) -> str:
    return "" if config.validation.retrieval else _no_held_out_rows(config)


def _no_held_out_tokens(config: RunConfig) -> str:
    kinds = {stream.objective.kind for name, stream in config.streams.items() if name in config.validation.sources}
    return "" if ObjectiveKind.TOKEN in kinds else "no stream with a loss over tokens has rows in validation.sources"


def _no_upload(config: RunConfig) -> str:
    return "" if config.export.push_to_hub else "export.push_to_hub names no repository"


IDLE: Mapping[str, Callable[[RunConfig], str]] = {
    "model.source": _from_elsewhere,
    "model.name": _from_elsewhere,
    "model.revision": _not_from_hub,
    "model.architecture": _describes_loaded,
    "model.init_seed": _not_from_scratch,
    "model.tokenizer": _own_tokenizer,
    "model.trust_remote_code": _runs_no_code,
    "model.pooling": _no_vectors,
    "model.normalize": _no_vectors,
    "parallel.bucket_elements": _not_zero,
    "parallel.persistence_threshold": _not_zero3,
    "parallel.offload_parameters": _no_offload,
    **dict.fromkeys((f"logging.wandb_{name}" for name in ("project", "entity", "group", "name", "tags")), _no_wandb),
    "checkpoint.keep_every": _no_checkpoint_on_the_way,
    "validation.every": _nothing_validated,
    "validation.num_batches": _no_held_out_rows,
    "validation.normalization": _no_held_out_tokens,
    "export.private": _no_upload,
}
"""Settings that decide something in some runs only -> why one decides nothing in this run; "" where it does."""

STREAM_IDLE: Mapping[str, Callable[[StreamConfig], str]] = {
    "on_few_negatives": lambda stream: "" if getattr(stream, "num_hard_negatives", 1) else "num_hard_negatives is 0",
    "objective.reference_world_size": lambda stream: (
        "" if getattr(stream.objective, "gradient_scale", "") != "exact" else "objective.gradient_scale is exact"
    ),
}
"""The same of a stream and its objective. Most others are refused by their format or objective where they decide nothing."""

EFFECTIVE = frozenset(
    {
        *("recipe", "description", "run_dir", "seed", "max_steps", "dry_run", "resume", "notices"),
        *("model", "model.family", "model.tiny_random", "model.init_from", "model.dtype"),
        *("model.autocast", "model.attention_kernel", "model.attention_dropout", "model.gradient_checkpointing"),
        *("model.checkpoint_keeps", "model.compile", "packing.num_retained"),
        *("model.projection_dim", "lora", "lora.*", "streams", "streams.*", "optim", "optim.*"),
        *("parallel", "parallel.backend", "parallel.timeout_minutes", "packing", "packing.token_budget"),
        *("logging", "logging.every", "logging.wandb", "logging.progress"),
        *("checkpoint", "checkpoint.every", "checkpoint.keep_last", "checkpoint.copy_to"),
        *("validation", "validation.sources", "validation.sources.*", "validation.retrieval", "validation.retrieval.*"),
        *("export", "export.enabled", "export.push_to_hub"),
        *("export.modes", "export.dtype", "export.verify"),  # with export.enabled=false for `unified-lm export RUN`
    }
)
"""All others: they decide something in every run, or are refused where they do not. `*` is anything below."""


def idle_notices(config: RunConfig, given: Collection[str]) -> Iterator[str]:
    """What was given on the command line and decides nothing, one sentence each.

    Args:
        config: the run.
        given: dotted keys that were set there; a section stands for what is in it.
    """
    for key, reason in IDLE.items():
        section, _, name = key.partition(".")
        value: Any = getattr(getattr(config, section), name)
        if _is_given(key, given) and value != getattr(_DEFAULTS[section], name) and (why := reason(config)):
            yield _sentence(key, value, why)
    for stream_name, stream in config.streams.items():
        for key, unused in STREAM_IDLE.items():
            parent, _, name = key.rpartition(".")
            owner: Any = getattr(stream, parent) if parent else stream
            defaults = {field.name: field.default for field in fields(owner)}
            path = f"streams.{stream_name}.{key}"
            if name not in defaults or not _is_given(path, given) or getattr(owner, name) == defaults[name]:
                continue
            if why := unused(stream):
                yield _sentence(path, getattr(owner, name), why)


def _is_given(key: str, given: Collection[str]) -> bool:
    """Whether a setting, what is below it or a section that holds it was given."""
    return any(f"{key}.".startswith(f"{other}.") or other.startswith(f"{key}.") for other in given)


def _sentence(key: str, value: Any, why: str) -> str:
    said = key if isinstance(value, Mapping) else f"{key}={value}"
    return f"{said} has no effect here: {why}."
