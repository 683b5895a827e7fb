"""From a `RunConfig` to objects that train."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from unified_lm.batch import Batch
from unified_lm.checkpoint.manifest import Manifest
from unified_lm.checkpoint.state import Identity, check_identity, find_checkpoint
from unified_lm.checkpoint.verify import load_projection
from unified_lm.config.schema import RunConfig
from unified_lm.core import distributed
from unified_lm.core.allocator import keep_freed_memory
from unified_lm.core.errors import CheckpointError, ConfigError
from unified_lm.core.random import seed_everything
from unified_lm.data.loader import StepLoader
from unified_lm.data.retrieval import build_retrieval
from unified_lm.data.streams import Stream, build_streams, build_validation_streams
from unified_lm.engine.backend import make_backend
from unified_lm.engine.fit import Training
from unified_lm.engine.metrics import Reporter
from unified_lm.engine.step import GradCacheStep
from unified_lm.engine.trainable import Trainable
from unified_lm.engine.validation import Validator
from unified_lm.models.backbone import Backbone
from unified_lm.models.loading import LoadedModel, load_model
from unified_lm.models.lora import LoraReport, apply_lora
from unified_lm.models.pooling import Projection
from unified_lm.models.probe import probe_attention
from unified_lm.objectives import EmbeddingObjective, ObjectiveKind, TokenObjective, build_objective


@dataclass
class Run:
    """A run that is ready to train.

    Attributes:
        training: what `fit` takes.
        loaded: model and tokenizer, with where they came from.
        streams: the training streams, for their counts of rejected and truncated rows.
        lora: what adapters were applied, or None.
    """

    training: Training
    loaded: LoadedModel
    streams: dict[str, Stream]
    lora: LoraReport | None


def build_run(config: RunConfig, run_dir: Path, console: Console) -> Run:
    """Load the model and the data, and put the parts of a run together."""
    seed_everything(config.seed)
    device = distributed.local_device()
    if device.type == "cpu":
        keep_freed_memory()
    quantize = config.lora is not None and config.lora.quantize_4bit
    loaded = load_model(config.model, quantize_4bit=quantize)
    lora = apply_lora(loaded.causal_lm, config.lora, config.seed) if config.lora else None
    backbone = Backbone(loaded.causal_lm, config.model.attention_kernel).to(device)
    if config.model.gradient_checkpointing:
        backbone.enable_gradient_checkpointing()
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.model.autocast):
        probe_attention(backbone)
    streams = build_streams(config, loaded.tokenizer)
    tokens, embeddings = _objectives(config)
    trainable = _make_trainable(config, loaded, backbone, tokens).to(device)
    backend = make_backend(trainable, config.optim, config.parallel)
    weights = {name: stream.objective.weight for name, stream in config.streams.items()}
    identity = _identity(config, loaded, trainable)
    resume_from = find_checkpoint(config.resume, run_dir / "checkpoints")
    if resume_from is not None:
        taken = check_identity(resume_from, identity)["step"]
        if taken > config.max_steps:
            raise CheckpointError(f"{resume_from} has taken {taken} steps, max_steps is {config.max_steps}. Raise max_steps.")
    training = Training(
        config=config,
        run_dir=run_dir,
        trainable=trainable,
        backend=backend,
        step=GradCacheStep(backend.forward, backend.backward, embeddings, weights),
        loader=_make_loader(config, streams),
        validator=_make_validator(config, loaded, trainable, embeddings, weights),
        reporter=Reporter(config.logging, run_dir, config.max_steps, asdict(config), console),
        identity=identity,
        resume_from=resume_from,
    )
    seed_everything(config.seed + 1 + distributed.rank())  # dropout differs between ranks, and from initialisation
    return Run(training, loaded, streams, lora)


def _objectives(config: RunConfig) -> tuple[dict[str, TokenObjective], dict[str, EmbeddingObjective]]:
    """Token objectives and embedding objectives, each by stream."""
    tokens: dict[str, TokenObjective] = {}
    embeddings: dict[str, EmbeddingObjective] = {}
    for name, stream in config.streams.items():
        objective: Any = build_objective(stream.objective)
        (tokens if objective.kind is ObjectiveKind.TOKEN else embeddings)[name] = objective
    return tokens, embeddings


def _make_projection(config: RunConfig, loaded: LoadedModel, hidden_size: int) -> Projection | None:
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


def _make_trainable(
    config: RunConfig, loaded: LoadedModel, backbone: Backbone, objectives: dict[str, TokenObjective]
) -> Trainable:
    projection = _make_projection(config, loaded, backbone.hidden_size)
    return Trainable(
        backbone,
        config.model.pooling,
        objectives,
        projection,
        torch.bfloat16 if config.model.autocast else None,
    )


def _make_loader(config: RunConfig, streams: dict[str, Stream]) -> StepLoader:
    return StepLoader(
        streams,
        token_budget=config.packing.token_budget,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
    )


def _make_validator(
    config: RunConfig,
    loaded: LoadedModel,
    trainable: Trainable,
    objectives: dict[str, EmbeddingObjective],
    weights: dict[str, float],
) -> Validator | None:
    streams = build_validation_streams(config, loaded.tokenizer)
    retrieval = build_retrieval(config, loaded.tokenizer)
    if not streams and retrieval is None:
        return None
    held_out_objectives = {name: objective for name, objective in objectives.items() if name in streams}
    return Validator(
        trainable,
        _fixed_batches(config, streams),
        held_out_objectives,
        weights,
        retrieval,
        config.packing.token_budget,
    )


def _fixed_batches(config: RunConfig, streams: dict[str, Stream]) -> Callable[[], Iterator[Batch]]:
    """The same held-out batches every time they are asked for."""
    if not streams:
        return lambda: iter(())
    loader = _make_loader(config, streams)
    one_epoch = min(max(1, stream.num_rows // stream.batch_size) for stream in streams.values())

    def batches() -> Iterator[Batch]:
        loader.reset()
        for _ in range(min(config.validation.num_batches, one_epoch)):
            yield loader.next_batch()

    return batches


def _identity(config: RunConfig, loaded: LoadedModel, trainable: Trainable) -> Identity:
    shapes = [(name, tuple(p.shape)) for name, p in trainable.named_parameters() if p.requires_grad]
    tokenizer = loaded.tokenizer.backend_tokenizer.to_str()
    return Identity(
        recipe=config.recipe,
        model=f"{loaded.provenance['family']} {loaded.provenance['fingerprint']}",
        tokenizer=blake2b(tokenizer.encode(), digest_size=16).hexdigest(),
        trained=blake2b(repr(shapes).encode(), digest_size=16).hexdigest(),
    )
