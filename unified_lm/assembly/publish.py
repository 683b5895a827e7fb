"""From a trained run to an export that stock tools load."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rich.console import Console

from unified_lm.assembly.build import Run
from unified_lm.assembly.run_folder import EXPORT
from unified_lm.assembly.run_record import data_entries
from unified_lm.config.schema import RunConfig, StreamConfig
from unified_lm.config.streams import EMBED, GENERATE, MODES
from unified_lm.core import distributed
from unified_lm.core.errors import ConfigError
from unified_lm.data.prompts.templates import Template, get_template
from unified_lm.engine.metrics import held_out
from unified_lm.export.directory import check_tokenizer, export_model, sentence_transformers_obstacle
from unified_lm.export.hub_upload import push_to_hub
from unified_lm.export.manifest import ATTENTIONS, AdapterRecord, DataRecord, Manifest, StageRecord
from unified_lm.export.merge import Gather, ModelParts, no_gathering
from unified_lm.models import families
from unified_lm.models.backbone import Backbone
from unified_lm.models.loading import LoadedModel
from unified_lm.models.lora import LoraReport
from unified_lm.models.pooling import Projection
from unified_lm.models.probe import stock_attention_sees_future

_EMBEDDING_FIELDS = ("instruction_prompt", "bare_prompt", "literal_bos", "embedding_end", "joined", "pools_prompt")
"""Fields of a template that decide how texts are embedded."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Trained:
    """What an export is made of: of a run in memory, or of a checkpoint (`assembly.checkpoints`).

    Attributes:
        config: of the run; `max_steps` is the step of the weights.
        run_dir: its folder.
        loaded: model and tokenizer, with where they came from.
        backbone: the trained model.
        projection: its head on pooled vectors, whole, or None.
        lora: what adapters were applied, or None.
        data: one record per source.
        gathered: makes parts of the model whole on rank 0.
        keep: whether the model keeps its weights; without, they are given up as they are written.
    """

    config: RunConfig
    run_dir: Path
    loaded: LoadedModel
    backbone: Backbone
    projection: Projection | None
    lora: LoraReport | None
    data: tuple[DataRecord, ...]
    gathered: Gather = no_gathering
    keep: bool = True

    @classmethod
    def of(cls, run: Run) -> Trained:
        """The result of a run as it is now. Collective."""
        training = run.training
        projection = training.trainable.projection
        if projection is not None:
            with training.backend.gathered(projection):
                if distributed.is_rank0():  # elsewhere it has no values, and hooks that cannot be copied
                    projection = copy.deepcopy(projection)
        return cls(
            config=training.config,
            run_dir=training.run_dir,
            loaded=run.loaded,
            backbone=training.trainable.backbone,
            projection=projection,
            lora=run.lora,
            data=data_records(data_entries(run)),
            gathered=training.backend.gathered,
        )

    def parts(self) -> ModelParts:
        """The model's parts: what an export goes through on rank 0, and the other ranks with it."""
        return ModelParts(self.backbone.causal_lm, self.gathered, keep=self.keep)


def data_records(entries: Iterable[Mapping[str, Any]]) -> tuple[DataRecord, ...]:
    """What a manifest says of the entries of a run's record."""
    return tuple(
        DataRecord(stream=entry["stream"], name=entry["source"], fingerprint=entry["fingerprint"], num_rows=entry["rows"])
        for entry in entries
    )


def check_export(trained: Trained) -> None:
    """Raise before training what would stop the export after it.

    Collective.

    Raises:
        CheckpointError: the tokenizer is not read again as it is.
        ConfigError: stock tools cannot express what the recipe asks for.
    """
    manifest = make_manifest(trained)
    _check_kept_vectors(trained, manifest)
    _check_stock_attention(trained, manifest)
    check_tokenizer(trained.backbone.causal_lm, trained.loaded.tokenizer, get_template(manifest.template), manifest)
    if not manifest.can_embed:
        return
    _check_kept_prompts(trained, manifest)
    obstacle = sentence_transformers_obstacle(manifest, get_template(manifest.template), trained.loaded.tokenizer)
    if obstacle and manifest.stock_tools_embed:  # else no files of sentence-transformers are written
        raise ConfigError(
            f"the result could not be exported for sentence-transformers: {obstacle} "
            "Change the recipe, or set export.enabled=false."
        )


def _check_stock_attention(trained: Trained, manifest: Manifest) -> None:
    """Raise where stock tools would not follow the `is_causal` of the export: it would be refused after training."""
    backbone = trained.backbone
    needs = {
        "generate": (manifest.can_generate, True),
        f"embed with {manifest.attention} attention": (
            manifest.can_embed and manifest.stock_tools_embed,
            manifest.attention == "causal",
        ),
    }
    for use, (needed, causal) in needs.items():
        if needed and stock_attention_sees_future(backbone, causal=causal) == causal:
            flag = "use_bidirectional_attention"
            own = getattr(families.text_config(backbone.causal_lm), flag, None)
            why = (
                f"the configuration of {trained.loaded.provenance['name']} has {flag}={own}" if own else "the family ignores it"
            )
            raise ConfigError(
                f"the export could not {use}: transformers' own attention does not follow is_causal={str(causal).lower()}, "
                f"since {why}. Start from another model, leave that mode out of export.modes, or set export.enabled=false."
            )


def _check_kept_vectors(trained: Trained, manifest: Manifest) -> None:
    """Raise where a run that only adjusts answers would export other vectors than those of the model that it starts from."""
    earlier: dict[str, Any] = trained.loaded.provenance.get("manifest") or {}
    if not _only_adjusts(trained.config) or not manifest.can_embed or EMBED not in earlier.get("modes", ()):
        return
    start = trained.config.model.init_from
    if earlier.get("standardizer"):
        raise ConfigError(
            f"{start} standardizes its vectors, and an export of training does not: it would embed otherwise than the model "
            "that it adjusts. Start from the export that the standardized one was made of, or set export.modes=[generate]."
        )
    if manifest.method != "hs" and trained.config.validation.retrieval is not None:
        raise ConfigError(
            f"validation.retrieval: {start} embeds with method {manifest.method}, and held-out retrieval of a run without "
            "pairs compares hidden states. Set validation.retrieval=null."
        )


def _check_kept_prompts(trained: Trained, manifest: Manifest) -> None:
    """Raise where preferences are written in another template than the one that the model they start from embeds with."""
    earlier: dict[str, Any] = trained.loaded.provenance.get("manifest") or {}
    if not _only_adjusts(trained.config) or EMBED not in earlier.get("modes", ()):
        return
    # Fields that templates got later are absent from older manifests, which had what is now their default.
    template, recorded = asdict(get_template(manifest.template)), earlier.get("template_fields") or {}
    kept = {**{item.name: item.default for item in fields(Template)}, **recorded} if recorded else template
    if any(kept[name] != template[name] for name in _EMBEDDING_FIELDS):
        raise ConfigError(
            f"{trained.config.model.init_from} embeds with template '{earlier.get('template')}', but the preferences have "
            f"template '{manifest.template}': the export would embed with prompts that were never trained. Give the streams "
            "the model's template, or set export.modes=[generate] or export.enabled=false."
        )


def write_export(trained: Trained, console: Console, target: Path | None = None) -> Path:
    """Merge, verify and write `target` (`run_dir/export`), and upload it where the recipe asks for that.

    Call it on rank 0, while the other ranks go through `trained.parts()`.

    Returns:
        The folder of the export.
    """
    parts = trained.parts()
    try:
        return _write_export(trained, parts, console, target or trained.run_dir / EXPORT)
    finally:
        parts.finish()  # after an error too: the other ranks wait in them


def _write_export(trained: Trained, parts: ModelParts, console: Console, target: Path) -> Path:
    config = trained.config
    console.print(f"exporting to {target}", highlight=False, soft_wrap=True)
    manifest = make_manifest(trained)
    export_model(
        trained.backbone.causal_lm,
        trained.loaded.tokenizer,
        target,
        manifest=manifest,
        template=get_template(manifest.template),
        projection=trained.projection,
        own_config=trained.loaded.provenance["own_config"],
        verify=config.export.verify,
        parts=parts,
    )
    if config.export.push_to_hub:
        url = push_to_hub(target, config.export.push_to_hub, private=config.export.private)
        console.print(f"uploaded to {url}", highlight=False)
    return target


def make_manifest(trained: Trained) -> Manifest:
    """What the export records about its training; the stages of what it started from come first."""
    config = trained.config
    provenance = trained.loaded.provenance
    earlier: dict[str, Any] = provenance.get("manifest") or {}
    embedding = _embedding_stream(config)
    template = (_generating_stream(config) or embedding or next(iter(config.streams.values()))).template
    before, after = held_out(trained.run_dir, config.max_steps)
    kept = earlier if _only_adjusts(config) else {}  # what embeds is then trained nowhere, and stays what it was
    method, alpha = config.vectors
    return Manifest(
        recipe=config.recipe,
        base_model=earlier.get("base_model") or provenance["name"],
        family=provenance["family"],
        template=template,
        template_fields={},
        attention=kept.get("attention") or _attention(embedding),
        modes=config.export.modes or tuple(mode for mode in MODES if mode in (*kept.get("modes", ()), *_modes(config))),
        pooling=kept.get("pooling", config.model.pooling),
        normalize=kept.get("normalize", config.model.normalize),
        method=kept.get("method", method),
        alpha=kept.get("alpha", alpha),
        instructions=kept.get("instructions") or _instructions(embedding),
        max_tokens=kept.get("max_tokens", _max_tokens(config)),
        dtype=config.export.dtype,
        base_revision=earlier.get("base_revision") or provenance.get("revision") or "",
        stages=(*_earlier_stages(earlier), _stage(trained)),
        data=trained.data,
        metrics={name: {"before": before[name], "after": after[name]} for name in after if name in before},
    )


def _embedding_stream(config: RunConfig) -> StreamConfig | None:
    """The stream that says how texts are embedded."""
    found = [stream for stream in config.streams.values() if EMBED in stream.modes]
    return min(found, key=lambda stream: stream.embedding_precedence, default=None)


def _generating_stream(config: RunConfig) -> StreamConfig | None:
    return next((stream for stream in config.streams.values() if GENERATE in stream.modes), None)


def _modes(config: RunConfig) -> tuple[str, ...]:
    """What streams have trained."""
    trained = {mode for stream in config.streams.values() for mode in stream.modes}
    return tuple(mode for mode in MODES if mode in trained)


def _only_adjusts(config: RunConfig) -> bool:
    """Whether a run only adjusts what a finished model prefers to say."""
    return all(stream.adjusts_only for stream in config.streams.values())


def _attention(embedding: StreamConfig | None) -> str:
    return embedding.attention if embedding is not None and embedding.attention in ATTENTIONS else "bidirectional"


def _max_tokens(config: RunConfig) -> int:
    stream = _embedding_stream(config)
    return max(s.longest_sample for s in config.streams.values()) if stream is None else stream.longest_sample


def _instructions(stream: StreamConfig | None) -> dict[str, str]:
    """The first source's own instructions: what a user gets without naming one."""
    if stream is None or not stream.sources:
        return {}
    source = stream.sources[0]
    named = {"query": source.instruction, "document": source.document_instruction}
    return {name: text for name, text in named.items() if text}


def _stage(trained: Trained) -> StageRecord:
    config = trained.config
    adapter = None
    if config.lora is not None and trained.lora is not None:
        adapter = AdapterRecord(
            r=config.lora.r,
            alpha=config.lora.alpha,
            target_modules=tuple(sorted({name.rpartition(".")[2] for name in trained.lora.targets})),
            dropout=config.lora.dropout,
            tokens=trained.lora.tokens,
        )
    settings = {
        "learning_rate": config.optim.learning_rate,
        "schedule": config.optim.schedule,
        "seed": config.seed,
        "streams": {
            name: {"format": s.format, "attention": s.attention, "batch_size": s.batch_size, "objective": asdict(s.objective)}
            for name, s in config.streams.items()
        },
    }
    return StageRecord(
        recipe=config.recipe, steps=config.max_steps, run_id=trained.run_dir.name, adapter=adapter, settings=settings
    )


def _earlier_stages(manifest: dict[str, Any]) -> tuple[StageRecord, ...]:
    return tuple(
        StageRecord(**{**stage, "adapter": AdapterRecord(**stage["adapter"]) if stage.get("adapter") else None})
        for stage in manifest.get("stages", ())
    )
