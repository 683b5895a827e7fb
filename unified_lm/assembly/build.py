"""From a `RunConfig` to objects that train."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from unified_lm.assembly.same_inputs import input_facts, require_same
from unified_lm.assembly.trained_tokens import trained_tokens, untrained_notices
from unified_lm.batch import Batch
from unified_lm.checkpoint.state import Identity, load_state
from unified_lm.checkpoint.store import find_checkpoint, restore_metrics
from unified_lm.config.schema import ModelConfig, RunConfig, StreamConfig
from unified_lm.config.streams import EMBED
from unified_lm.core import distributed
from unified_lm.core.agreement import run_on_rank0
from unified_lm.core.allocator import keep_freed_memory
from unified_lm.core.errors import CheckpointError, ConfigError
from unified_lm.core.random import seed_everything
from unified_lm.core.tracing import traced
from unified_lm.data.loader import SampleCost, StepLoader
from unified_lm.data.prefetch import PrefetchingLoader
from unified_lm.data.retrieval import RetrievalSet, build_retrieval
from unified_lm.data.stream import Stream
from unified_lm.data.streams import TableStream, build_streams, build_validation_streams
from unified_lm.engine.accounting.estimate import recomputes_layers
from unified_lm.engine.accounting.flops import ModelFlops
from unified_lm.engine.accounting.throughput import ComputeClock, StepMeter, describe_device
from unified_lm.engine.backends.backend import Backend, check_backend, make_backend
from unified_lm.engine.backends.deepspeed import ZeroSharding
from unified_lm.engine.coupled import CoupledTerm, TermParts, term_classes
from unified_lm.engine.fit import TrainingState
from unified_lm.engine.interruption import StopRequest
from unified_lm.engine.metrics import Reporter
from unified_lm.engine.readout import Readout
from unified_lm.engine.step import Forward, GradCacheStep
from unified_lm.engine.training_module import TrainingModule
from unified_lm.engine.validation import Validator
from unified_lm.export.manifest import Manifest
from unified_lm.export.verify import load_projection
from unified_lm.models.backbone import Backbone
from unified_lm.models.compiled import compile_blocks
from unified_lm.models.frozen import freeze
from unified_lm.models.identity import configuration_facts
from unified_lm.models.loading import LoadedModel, load_model
from unified_lm.models.lora import LoraReport, apply_lora
from unified_lm.models.modes import GatherParameters, no_gathering
from unified_lm.models.pooling import Projection
from unified_lm.models.positions import check_lengths
from unified_lm.models.probe import probe_attention
from unified_lm.models.routing import router_parameters
from unified_lm.models.sharded import load_sharded
from unified_lm.objectives import ObjectiveKind
from unified_lm.objectives.trial import tried_objective


@dataclass(frozen=True)
class RunResult:
    """How a run ended: what a chain and an ablation must know of it before they go on.

    Attributes:
        run_dir: its folder.
        is_finished: whether its last step is taken and its export written, where it has one.
        stopped_by: the name of the signal that asked to stop, also where it came too late to leave anything of this run
            undone; None without one.
    """

    run_dir: Path
    is_finished: bool
    stopped_by: str | None = None


@dataclass
class Run:
    """A run that is ready to train.

    Attributes:
        training: what `fit` takes.
        loaded: model and tokenizer, with where they came from.
        streams: the training streams, for their counts of rejected and truncated rows.
        lora: what adapters were applied, or None.
        scored: the streams, also held-out ones, that take reference log-probabilities before training (`assembly.stages`).
        stop: notes the signals that ask the run to stop.
        trained: None before `fit_run`; then whether the last step is taken.
        result: how the run ended, once it has.
    """

    training: TrainingState
    loaded: LoadedModel
    streams: dict[str, Stream]
    lora: LoraReport | None
    scored: tuple[TableStream, ...] = ()
    stop: StopRequest = field(default_factory=StopRequest)
    trained: bool | None = None
    result: RunResult | None = None

    @property
    def run_dir(self) -> Path:
        """The folder of the run."""
        return self.training.run_dir


def assemble_run(config: RunConfig, run_dir: Path, console: Console) -> Run:
    """Load the model and the data, and put the parts of a run together; `assembly.stages.build_run` makes it ready to train."""
    check_backend(config.parallel)
    seed_everything(config.seed)
    device = distributed.local_device()
    if device.type == "cpu":
        keep_freed_memory()
    quantize = config.lora is not None and config.lora.quantize_4bit
    whole: GatherParameters = no_gathering
    if config.parallel.zero_stage == 3:
        sharding = ZeroSharding(config.parallel)
        loaded, whole = load_sharded(config.model, sharding, needs_head=config.needs_head), sharding.filling
    else:
        loaded = load_model(config.model, quantize_4bit=quantize, needs_head=config.needs_head)
    check_lengths(loaded.causal_lm, _lengths(config))
    tokens = trained_tokens(config, loaded.tokenizer)
    loaded.provenance["notices"] += _vector_notices(config, loaded.provenance)
    lora = apply_lora(loaded.causal_lm, config.lora, config.seed, tokens, whole) if config.lora else None
    if config.optim.frozen:
        loaded.provenance["notices"].append(freeze(loaded.causal_lm, config.optim.frozen))
    loaded.provenance["notices"] += untrained_notices(config, loaded, tokens, whole)
    backbone = _make_backbone(config.model, loaded, device)
    streams = build_streams(config, loaded.tokenizer)
    held_out = build_validation_streams(config, loaded.tokenizer)
    retrieval = build_retrieval(config, loaded.tokenizer)
    objectives = _objectives(config, backbone.hidden_size, device)
    trainable = _make_trainable(config, loaded, backbone, objectives, whole).to(device)
    require_same(input_facts(loaded, trainable.projection, streams, held_out, retrieval))
    backend = make_backend(trainable, config.optim, config.parallel)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.model.autocast):
        probe_attention(backbone, longest=max(_lengths(config).values()), whole=backend.whole)
    weights = {name: stream.objective.weight for name, stream in config.streams.items()}
    identity = identity_of(config, loaded, trainable)
    resume_from = run_on_rank0(lambda: _checkpoint_to_resume(config, run_dir, identity, console))
    clock = ComputeClock()
    forward, backward = traced("forward", clock.timed(backend.forward)), traced("backward", clock.timed(backend.backward))
    terms = _coupled_terms(config, objectives, forward, trainable, backend.equal_forwards)
    retained = config.packing.num_retained or 1
    step = GradCacheStep(forward, backward, weights, terms, retained, backend.equal_forwards)
    meter = StepMeter(trainable, step, clock, recomputes=recomputes_layers(config.model))
    training = TrainingState(
        config=config,
        run_dir=run_dir,
        trainable=trainable,
        backend=backend,
        step=step,
        loader=PrefetchingLoader(_make_loader(config, streams, trainable), config.max_steps),
        validator=_make_validator(config, backend, trainable, objectives, held_out, retrieval),
        reporter=Reporter(config.logging, run_dir, config.max_steps, asdict(config), console, _facts(meter)),
        meter=meter,
        identity=identity,
        decode=lambda ids: str(loaded.tokenizer.decode(list(ids))),
        resume_from=resume_from,
    )
    seed_everything(config.seed + 1 + distributed.rank())  # dropout differs between ranks, and from initialization
    both = [*streams.items(), *held_out.items()]
    cached = [stream for name, stream in both if _is_cached(config, config.streams[name])]
    scored = tuple(stream for stream in cached if isinstance(stream, TableStream))
    return Run(training, loaded, streams, lora, scored)


def _checkpoint_to_resume(config: RunConfig, run_dir: Path, identity: Identity, console: Console) -> Path | None:
    """Find and check the checkpoint, on rank 0: files of a shared disk may show up on other nodes later.

    Raises:
        CheckpointError: there is one, and it does not belong to this run or is ahead of it.
    """
    copies = config.checkpoint.copy_to
    found = find_checkpoint(config.resume, run_dir / "checkpoints", Path(copies) if copies else None)
    for notice in found.notices:
        console.print(notice, highlight=False, soft_wrap=True)
    if found.path is None:
        return None
    taken = load_state(found.path, identity).step
    if taken > config.max_steps:
        raise CheckpointError(f"{found.path} has taken {taken} steps, max_steps is {config.max_steps}. Raise max_steps.")
    restore_metrics(found.path, run_dir)
    return found.path


def _facts(meter: StepMeter) -> dict[str, Any]:
    """What a reader of the metrics must know about the machine."""
    return {
        "world_size": distributed.world_size(),
        "device": describe_device(),
        "peak_teraflops_per_device": meter.peak.flops / 1e12,
        "peak_source": meter.peak.source,
    }


_Objectives = Mapping[str, Any]
"""The objectives of a run by stream: each follows the protocol of its kind (`objectives/protocol.py`)."""


def _objectives(config: RunConfig, hidden_size: int, device: torch.device) -> _Objectives:
    found = {}
    for name, stream in config.streams.items():
        dim = (config.model.projection_dim or hidden_size) if stream.pooled else hidden_size
        found[name] = tried_objective(name, stream, dim, device)
    return found


def _lengths(config: RunConfig) -> dict[str, int]:
    """Every limit of a sample, in tokens, by its key; of a sample that has several parts, that of all of them together."""
    found: dict[str, int] = {}
    for name, stream in config.streams.items():
        found |= {f"streams.{name}.{key}": getattr(stream, key) for key in stream.limit_keys}
        if stream.longest_sample > max(getattr(stream, key) for key in stream.limit_keys):
            found[f"streams.{name}, {', '.join(stream.limit_keys)} of one sample together"] = stream.longest_sample
    return found


def _is_cached(config: RunConfig, stream: StreamConfig) -> bool:
    """Whether a stream's reference log-probabilities are computed before training."""
    return stream.objective.needs_reference_scores(has_adapters=config.lora is not None)


def _vector_notices(config: RunConfig, provenance: Mapping[str, Any]) -> list[str]:
    """What a user should know where training goes on with other vectors, or another mask, than the export it starts from."""
    manifest = provenance.get("manifest") or {}
    if EMBED not in manifest.get("modes", ()):
        return []
    notices, earlier, start = [], manifest.get("method", "hs"), config.model.init_from
    if earlier not in ("hs", config.vectors[0]) and config.trains_embeddings:
        notices.append(
            f"{start} embeds with method {earlier}; this run compares {config.vectors[0]}, and so will its export "
            f"(streams.NAME.objective.vectors={earlier} keeps it)."
        )
    attention = manifest.get("attention")
    for name, stream in config.streams.items():
        if EMBED in stream.modes and attention not in (None, stream.attention):
            notices.append(
                f"{start} was trained to embed with {attention} attention; streams.{name}.attention={stream.attention} is "
                f"another, which it has to learn first (streams.{name}.attention={attention} keeps it)."
            )
    return notices


def make_projection(config: RunConfig, loaded: LoadedModel, hidden_size: int) -> Projection | None:
    """The head on pooled vectors: that of the export the run starts from, or a new one.

    Raises:
        ConfigError: the recipe's size is not that of the export.
    """
    earlier = (loaded.provenance.get("manifest") or {}).get("projection_dim")
    wanted = config.model.projection_dim
    if earlier is not None:
        if wanted != earlier:
            raise ConfigError(
                f"model.projection_dim is {wanted}, and {config.model.init_from} has a projection to {earlier} dimensions. "
                f"Set model.projection_dim={earlier}."
            )
        folder = Path(loaded.provenance["init_from"])
        return load_projection(folder, Manifest.load(folder), hidden_size)
    return None if wanted is None else Projection(hidden_size, wanted)


def _make_backbone(config: ModelConfig, loaded: LoadedModel, device: torch.device) -> Backbone:
    backbone = Backbone(loaded.causal_lm, config.attention_kernel).to(device)
    if config.gradient_checkpointing:
        backbone.enable_gradient_checkpointing(config.checkpoint_keeps == "products")
    if config.compile:
        compile_blocks(loaded.causal_lm)
    return backbone


def _make_trainable(
    config: RunConfig, loaded: LoadedModel, backbone: Backbone, objectives: _Objectives, whole: GatherParameters
) -> TrainingModule:
    projection = make_projection(config, loaded, backbone.hidden_size)
    return TrainingModule(
        backbone,
        config.model.pooling,
        {name: of for name, of in objectives.items() if config.streams[name].objective.kind is ObjectiveKind.TOKEN},
        projection,
        torch.bfloat16 if config.model.autocast else None,
        _readouts(config, backbone, whole),
    )


def _readouts(config: RunConfig, backbone: Backbone, whole: GatherParameters) -> list[Readout]:
    """What the coupled terms take from a forward; while they are made, routers are whole and can be asked."""
    settings = {name: stream.objective for name, stream in config.streams.items()}
    terms = term_classes(settings).items()
    with whole(router_parameters(backbone.causal_lm)) if config.vectors[0] != "hs" else nullcontext():
        found = [term.readout({name: settings[name] for name in names}, backbone) for term, names in terms]
    return [readout for readout in found if readout is not None]


def _coupled_terms(
    config: RunConfig, objectives: _Objectives, forward: Forward, trainable: TrainingModule, equal_forwards: bool
) -> list[CoupledTerm]:
    """The losses that couple the packs of a step, as the streams' objectives name them, for the streams in `objectives`."""
    settings = {name: stream.objective for name, stream in config.streams.items() if name in objectives}
    weights = {name: stream.objective.weight for name, stream in config.streams.items()}
    return [
        term.make(
            TermParts(
                streams={name: settings[name] for name in names},
                objectives={name: objectives[name] for name in names},
                weights=weights,
                forward=forward,
                trainable=trainable,
                equal_forwards=equal_forwards,
            )
        )
        for term, names in term_classes(settings).items()
    ]


def _make_loader(config: RunConfig, streams: Mapping[str, Stream], trainable: TrainingModule) -> StepLoader:
    flops = ModelFlops.of(trainable)
    per_token = 2 * (flops.trained + flops.frozen)
    return StepLoader(
        streams,
        token_budget=config.packing.token_budget,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        cost=SampleCost(per_token, flops.pair * sum(flops.windows.values())),
    )


def _make_validator(
    config: RunConfig,
    backend: Backend,
    trainable: TrainingModule,
    objectives: _Objectives,
    streams: dict[str, TableStream],
    retrieval: RetrievalSet | None,
) -> Validator | None:
    if not streams and retrieval is None:
        return None
    measured = {name: objective for name, objective in objectives.items() if name in streams}
    forward = traced("forward", backend.forward)
    held_out = GradCacheStep(
        forward,
        backend.backward,
        {name: stream.objective.weight for name, stream in config.streams.items()},
        _coupled_terms(config, measured, forward, trainable, backend.equal_forwards),
        num_retained=0,
        equal_forwards=backend.equal_forwards,
    )
    return Validator(
        trainable,
        held_out,
        _fixed_batches(config, streams, trainable),
        retrieval,
        config.packing.token_budget,
        *config.vectors,
    )


def _fixed_batches(
    config: RunConfig, streams: dict[str, TableStream], trainable: TrainingModule
) -> Callable[[], Iterator[Batch]]:
    """The same held-out batches every time they are asked for."""
    if not streams:
        return lambda: iter(())
    loader = _make_loader(config, streams, trainable)
    one_epoch = min(max(1, stream.num_rows // stream.batch_size) for stream in streams.values())

    def batches() -> Iterator[Batch]:
        """The same batches on every call: the loader starts from its beginning."""
        loader.reset()
        for _ in range(min(config.validation.num_batches, one_epoch)):
            yield loader.next_batch()

    return batches


def identity_of(config: RunConfig, loaded: LoadedModel, trainable: TrainingModule) -> Identity:
    """The identity that a checkpoint of this run has."""
    # a parameter that ZeRO-3 has shared out is empty, and remembers its shape
    shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in trainable.named_parameters() if p.requires_grad}
    tokenizer = loaded.tokenizer.backend_tokenizer.to_str()
    return Identity(
        recipe=config.recipe,
        model=f"{loaded.provenance['family']} {loaded.provenance['fingerprint']}",
        tokenizer=blake2b(tokenizer.encode(), digest_size=16).hexdigest(),
        trained=shapes,
        configuration=configuration_facts(loaded.causal_lm),
    )
