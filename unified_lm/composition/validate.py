"""Cross-checks of a configuration: what single fields cannot know. Every problem is returned, none is raised here."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

from unified_lm.composition.idle import idle_notices
from unified_lm.config.checks import above, at_least, at_most, choice, fraction
from unified_lm.config.kernels import KERNELS
from unified_lm.config.schedules import SCHEDULES
from unified_lm.config.schema import BACKENDS, VERIFICATIONS, ChainConfig, ModelConfig, OptimConfig, RunConfig
from unified_lm.config.streams import MODES
from unified_lm.core.errors import did_you_mean

MODEL_SOURCES = ("hub", "embedded", "scratch")
DTYPES = ("float32", "bfloat16")
AUTO = "auto"
LONGEST_WAIT = 365 * 24 * 60
"""Minutes of a year; clocks that count nanoseconds hold 292 of them."""
POOLINGS = ("mean", "weighted_mean", "last_token", "cls")


def find_problems(config: RunConfig | ChainConfig) -> list[str]:
    """Every contradiction, value out of range and unknown choice of a configuration, each as one sentence with its key."""
    if isinstance(config, ChainConfig):
        return list(_chain(config))
    return list(_run(config))


def find_notices(config: RunConfig, given: Collection[str] = ()) -> list[str]:
    """What is allowed but rarely meant, one sentence each.

    Args:
        config: the run.
        given: dotted keys that were set on the command line.
    """
    return [*_notices(config), *idle_notices(config, given)]


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
    yield from at_least("max_steps", config.max_steps, 1)
    yield from _model(config)
    yield from _blocks(config)
    yield from _lora(config)
    if not config.streams:
        yield "streams: got none, expected at least one."
    for name, stream in config.streams.items():
        yield from stream.problems(f"streams.{name}")
        yield from stream.run_problems(f"streams.{name}", config)
    yield from _vectors(config)
    yield from _optim(config.optim)
    yield from _parallel(config)
    yield from at_least("packing.token_budget", config.packing.token_budget, 1)
    if config.packing.num_retained is not None:
        yield from at_least("packing.num_retained", config.packing.num_retained, 1)
    yield from at_least("logging.every", config.logging.every, 1)
    yield from choice("logging.wandb", config.logging.wandb, ("disabled", "offline", "online"))
    if not config.logging.wandb_project:
        yield "logging.wandb_project: is empty; give the wandb project a name."
    yield from _checkpoint(config)
    yield from _validation(config)
    yield from _export(config)
    if config.resume not in ("none", "auto") and not Path(config.resume).is_dir():
        yield f"resume: got '{config.resume}', expected 'none', 'auto' or the folder of a checkpoint; there is no such folder."
    if config.resume == "auto" and not config.run_dir:
        yield "resume: 'auto' looks for checkpoints in run_dir, which is not set; add run_dir=FOLDER."


def _vectors(config: RunConfig) -> Iterator[str]:
    if len(config.all_vectors) > 1:
        listed = ", ".join(f"{method} (alpha {alpha:g})" for method, alpha in sorted(config.all_vectors))
        yield f"streams: compare different vectors ({listed}), and an export embeds in one way; give them the same `vectors`."


def _parallel(config: RunConfig) -> Iterator[str]:
    parallel = config.parallel
    yield from choice("parallel.backend", parallel.backend, BACKENDS)
    yield from above("parallel.timeout_minutes", parallel.timeout_minutes, 0)
    yield from at_most("parallel.timeout_minutes", parallel.timeout_minutes, LONGEST_WAIT)
    yield from at_least("parallel.bucket_elements", parallel.bucket_elements, 1)
    yield from at_least("parallel.persistence_threshold", parallel.persistence_threshold, 0)
    stage = parallel.zero_stage
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
    yield from choice("model.source", model.source, MODEL_SOURCES)
    yield from choice("model.dtype", model.dtype, (*DTYPES, AUTO))
    yield from choice("model.attention_kernel", model.attention_kernel, tuple(KERNELS))
    yield from choice("model.pooling", model.pooling, POOLINGS)
    if model.source == "scratch":
        yield from _from_scratch(config)
    elif not model.name and not model.tiny_random and model.init_from is None:
        yield "model.name: is empty; choose a model (model=smollm2_135m), or give model.name or model.init_from."
    if model.tiny_random and not model.family:
        yield "model.family: is empty; a tiny random model needs the family to build (llama, mistral, qwen3, ...)."
    if model.autocast and model.dtype != "float32":
        yield f"model.autocast: keeps float32 weights, but model.dtype is {model.dtype}; set model.dtype=float32."
    if model.attention_dropout is not None:
        yield from fraction("model.attention_dropout", model.attention_dropout)
        if model.attention_dropout > 0 and not model.kernel.drops:
            yield f"model.attention_dropout: the {model.attention_kernel} kernel has no dropout; choose sdpa or flash."
    if model.projection_dim is not None:
        yield from at_least("model.projection_dim", model.projection_dim, 1)
        if not config.trains_embeddings:
            yield "model.projection_dim: projects embeddings, but no stream trains any."
        if config.vectors[0] == "rw":
            yield (
                "model.projection_dim: projects hidden states, and vectors=rw compares routing alone, which would train no "
                "head. Leave it out, or choose vectors=moee_sum."
            )


def _blocks(config: RunConfig) -> Iterator[str]:
    """What becomes of decoder blocks: recomputed, compiled."""
    model = config.model
    yield from choice("model.checkpoint_keeps", model.checkpoint_keeps, ("inputs", "products"))
    if model.checkpoint_keeps == "products" and not model.gradient_checkpointing:
        yield "model.checkpoint_keeps: nothing is checkpointed; set model.gradient_checkpointing=true."
    if not model.compile:
        return
    if config.parallel.zero_stage == 3:
        yield "model.compile: ZeRO-3 gathers weights inside of blocks, so these cannot be compiled; use zero2, or set it false."
    if model.checkpoint_keeps == "products":
        yield "model.compile: compiled blocks show no single matrix products; set model.checkpoint_keeps=inputs."
    if model.attention_kernel == "padded":
        yield "model.compile: is for packs, and the padded kernel has none; choose another model.attention_kernel."


def _from_scratch(config: RunConfig) -> Iterator[str]:
    model = config.model
    if model.init_from is not None or model.tiny_random:
        return
    for name in ("family", "architecture", "tokenizer"):
        if not getattr(model, name):
            yield f"model.{name}: is empty, and model.source=scratch builds a model of it."
    if model.name:
        yield f"model.name: got {model.name}, and model.source=scratch loads no weights; leave it empty, or choose source=hub."
    routed = model.family == "monet" and model.architecture.get("feed_forward", "monet") == "monet"
    if routed and not any("RoutingSpread" in term for stream in config.streams.values() for term in stream.objective.coupled):
        yield (
            "streams.NAME.objective.router_uniformity_coef: no stream has it or router_ambiguity_coef, and MONET's routers "
            "learn the statistics by which they choose keys in streams that do; the paper has 1e-3 for both, and 0 is enough."
        )
    if config.lora is not None:
        yield "lora: adapts weights that mean something already, and model.source=scratch draws them; use lora=none."


def _lora(config: RunConfig) -> Iterator[str]:
    lora = config.lora
    if lora is None:
        return
    yield from at_least("lora.r", lora.r, 1)
    yield from above("lora.alpha", lora.alpha, 0)
    yield from fraction("lora.dropout", lora.dropout)
    if isinstance(lora.target_modules, str):
        yield from choice("lora.target_modules", lora.target_modules, ("all-linear",))
    elif not lora.target_modules:
        yield "lora.target_modules: is empty; name modules (q_proj, ...), or 'all-linear'."
    if lora.quantize_4bit:
        yield from _quantized(config.model)


def _quantized(model: ModelConfig) -> Iterator[str]:
    if model.source != "hub" or model.tiny_random:
        yield "lora.quantize_4bit: needs weights from the Hub or a directory (model.source=hub)."
    if model.dtype != "bfloat16":
        yield f"lora.quantize_4bit: computes in bfloat16, but model.dtype is {model.dtype}."


def _checkpoint(config: RunConfig) -> Iterator[str]:
    checkpoint = config.checkpoint
    yield from at_least("checkpoint.every", checkpoint.every, 0)
    yield from at_least("checkpoint.keep_last", checkpoint.keep_last, 1)
    yield from at_least("checkpoint.keep_every", checkpoint.keep_every, 0)
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
    yield from at_least("optim.max_skipped_steps", optim.max_skipped_steps, 1)
    yield from choice("optim.schedule", optim.schedule, tuple(SCHEDULES))
    yield from above("optim.learning_rate", optim.learning_rate, 0)
    yield from above("optim.eps", optim.eps, 0)
    for index, beta in enumerate(optim.betas):
        yield from fraction(f"optim.betas.{index}", beta)
    for name in ("weight_decay", "max_grad_norm", "warmup_steps"):
        yield from at_least(f"optim.{name}", getattr(optim, name), 0)
    yield from fraction("optim.warmup_ratio", optim.warmup_ratio)
    if not 0 <= optim.final_ratio <= 1:
        yield f"optim.final_ratio: got {optim.final_ratio}, expected 0 to 1."
    if optim.warmup_steps and optim.warmup_ratio:
        yield (
            f"optim.warmup_steps={optim.warmup_steps} and optim.warmup_ratio={optim.warmup_ratio} exclude each other; "
            "set one of them to 0."
        )
    if optim.horizon_steps is not None:
        yield from at_least("optim.horizon_steps", optim.horizon_steps, 1)
    never_decays = optim.schedule in SCHEDULES and not SCHEDULES[optim.schedule].decays
    if never_decays and (optim.horizon_steps is not None or optim.final_ratio):
        yield f"optim.schedule: '{optim.schedule}' does not decay, so horizon_steps and final_ratio do not apply."


def _validation(config: RunConfig) -> Iterator[str]:
    validation = config.validation
    yield from at_least("validation.every", validation.every, 0)
    yield from at_least("validation.num_batches", validation.num_batches, 1)
    if validation.normalization is not None:
        yield from choice("validation.normalization", validation.normalization, ("token", "sample", "sum_per_sample"))
    for name, sources in validation.sources.items():
        if name not in config.streams:
            yield f"validation.sources.{name}: there is no stream '{name}'.{did_you_mean(name, config.streams)}"
        elif obstacle := config.streams[name].held_out_obstacle:
            yield f"validation.sources.{name}: {obstacle}."
        for index, source in enumerate(sources):
            yield from source.problems(f"validation.sources.{name}.{index}")
            if source.flows:
                yield (
                    f"validation.sources.{name}.{index}.streaming: held-out rows are read before training, so that every "
                    "validation has the same; remove it, or read the first rows of a Hub data set with limit=N."
                )
    if validation.retrieval is None:
        return
    yield from validation.retrieval.queries.problems("validation.retrieval.queries")
    yield from at_least("validation.retrieval.max_queries", validation.retrieval.max_queries, 2)
    if not config.trains_embeddings:
        yield "validation.retrieval: no stream trains embeddings; remove it: ~validation.retrieval"


def _export(config: RunConfig) -> Iterator[str]:
    export = config.export
    yield from choice("export.dtype", export.dtype, (*DTYPES, "float16"))
    yield from choice("export.verify", export.verify, VERIFICATIONS)
    for index, mode in enumerate(export.modes):
        yield from choice(f"export.modes.{index}", mode, MODES)
    templates = {name: s.template for name, s in config.streams.items() if s.templated}
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
    if export.enabled and not export.modes and config.streams and not any(stream.modes for stream in config.streams.values()):
        yield "export: no stream's format trains a mode of an export; set export.modes, or export.enabled=false."
    if export.push_to_hub is None:
        return
    owner, _, name = export.push_to_hub.partition("/")
    if not owner or not name or "/" in name:
        yield f"export.push_to_hub: got '{export.push_to_hub}', expected ORGANIZATION/NAME."
    if not export.enabled:
        yield "export.push_to_hub: there is nothing to upload with export.enabled=false."


def _notices(config: RunConfig) -> Iterator[str]:
    for name, stream in config.streams.items():
        yield from stream.run_notices(name, config)
    if config.optim.warmup_steps >= config.max_steps:
        yield (
            f"optim.warmup_steps={config.optim.warmup_steps} is not below max_steps={config.max_steps}: "
            "the learning rate never reaches its peak."
        )
    if config.export.enabled:
        yield from _missing_modes(config)


def _missing_modes(config: RunConfig) -> Iterator[str]:
    """What is trained and the export will not have: said in capitals, since nobody reads the manifest of a fresh export."""
    for name, stream in config.streams.items():
        chosen = config.export.modes
        for mode in stream.modes:
            if chosen and mode not in chosen:
                yield f"THE EXPORT WILL NOT {mode.upper()}, WHICH STREAM {name} TRAINS: export.modes is {list(chosen)}."
        if not stream.modes:
            yield (
                f"STREAM {name} TRAINS NO MODE OF AN EXPORT: its format {stream.format} says modes=(). Set `modes` in its "
                "description, or export.enabled=false."
            )
