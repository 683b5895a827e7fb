"""From a trained run to an export that stock tools load."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from unified_lm.assembly.build import Run
from unified_lm.assembly.run_folder import EXPORT
from unified_lm.config.schema import RunConfig, StreamConfig
from unified_lm.config.streams import EMBED, GENERATE, MODES
from unified_lm.core.errors import ConfigError
from unified_lm.data.prompts.templates import get_template
from unified_lm.engine.metrics import held_out
from unified_lm.export.directory import check_tokenizer, export_model, sentence_transformers_obstacle
from unified_lm.export.hub_upload import push_to_hub
from unified_lm.export.manifest import AdapterRecord, DataRecord, Manifest, StageRecord
from unified_lm.export.merge import merge_lora
from unified_lm.models import families
from unified_lm.models.probe import stock_attention_sees_future


def check_export(run: Run) -> None:
    """Raise before training what would stop the export after it.

    Collective.

    Raises:
        CheckpointError: the tokenizer is not read again as it is.
        ConfigError: stock tools cannot express what the recipe asks for.
    """
    manifest = make_manifest(run)
    _check_stock_attention(run, manifest)
    check_tokenizer(run.training.trainable.backbone.causal_lm, run.loaded.tokenizer, get_template(manifest.template), manifest)
    if not manifest.can_embed:
        return
    _check_kept_prompts(run, manifest)
    obstacle = sentence_transformers_obstacle(manifest, get_template(manifest.template), run.loaded.tokenizer)
    if obstacle:
        raise ConfigError(
            f"the result could not be exported for sentence-transformers: {obstacle} "
            "Change the recipe, or set export.enabled=false."
        )


def _check_stock_attention(run: Run, manifest: Manifest) -> None:
    """Raise where stock tools would not follow the `is_causal` of the export: it would be refused after training."""
    backbone = run.training.trainable.backbone
    needs = {
        "generate": (manifest.can_generate, True),
        f"embed with {manifest.attention} attention": (manifest.can_embed, manifest.attention == "causal"),
    }
    for use, (needed, causal) in needs.items():
        if needed and stock_attention_sees_future(backbone, causal=causal) == causal:
            flag = "use_bidirectional_attention"
            own = getattr(families.text_config(backbone.causal_lm), flag, None)
            why = f"the configuration of {run.loaded.provenance['name']} has {flag}={own}" if own else "the family ignores it"
            raise ConfigError(
                f"the export could not {use}: transformers' own attention does not follow is_causal={str(causal).lower()}, "
                f"since {why}. Start from another model, leave that mode out of export.modes, or set export.enabled=false."
            )


def _check_kept_prompts(run: Run, manifest: Manifest) -> None:
    """Raise where preferences are written in another template than the one that the model they start from embeds with."""
    earlier: dict[str, Any] = run.loaded.provenance.get("manifest") or {}
    if not _only_adjusts(run.training.config) or EMBED not in earlier.get("modes", ()):
        return
    template, kept = asdict(get_template(manifest.template)), earlier.get("template_fields") or {}
    if any(kept.get(name, template[name]) != template[name] for name in ("instruction_prompt", "bare_prompt", "literal_bos")):
        raise ConfigError(
            f"{run.training.config.model.init_from} embeds with template '{earlier.get('template')}', but the preferences have "
            f"template '{manifest.template}': the export would embed with prompts that were never trained. Give the streams "
            "the model's template, or set export.modes=[generate] or export.enabled=false."
        )


def write_export(run: Run, console: Console, target: Path | None = None) -> Path:
    """Merge, verify and write `target` (`run_dir/export`), and upload it where the recipe asks for that.

    Call it on one rank.

    Returns:
        The folder of the export.
    """
    training = run.training
    config = training.config
    target = target or training.run_dir / EXPORT
    console.print(f"exporting to {target}", highlight=False, soft_wrap=True)
    manifest = make_manifest(run)
    causal_lm = training.trainable.backbone.causal_lm
    with training.trainable.backbone.stock_attention():
        plain = merge_lora(causal_lm)
    export_model(
        plain,
        run.loaded.tokenizer,
        target,
        manifest=manifest,
        template=get_template(manifest.template),
        projection=training.trainable.projection,
        own_config=run.loaded.provenance["own_config"],
    )
    if config.export.push_to_hub:
        url = push_to_hub(target, config.export.push_to_hub, private=config.export.private)
        console.print(f"uploaded to {url}", highlight=False)
    return target


def make_manifest(run: Run) -> Manifest:
    """What the export records about its training; the stages of what it started from come first."""
    config = run.training.config
    provenance = run.loaded.provenance
    earlier: dict[str, Any] = provenance.get("manifest") or {}
    embedding = _embedding_stream(config)
    template = (_generating_stream(config) or embedding or next(iter(config.streams.values()))).template
    before, after = held_out(run.training.run_dir, config.max_steps)
    kept = earlier if _only_adjusts(config) else {}  # what embeds is then trained nowhere, and stays what it was
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
        instructions=kept.get("instructions") or _instructions(embedding),
        max_tokens=kept.get("max_tokens", _max_tokens(config)),
        dtype=config.export.dtype,
        base_revision=earlier.get("base_revision") or provenance.get("revision") or "",
        stages=(*_earlier_stages(earlier), _stage(run)),
        data=_data(run),
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
    return "causal" if embedding is not None and embedding.attention == "causal" else "bidirectional"


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


def _stage(run: Run) -> StageRecord:
    config = run.training.config
    adapter = None
    if config.lora is not None and run.lora is not None:
        adapter = AdapterRecord(
            r=config.lora.r,
            alpha=config.lora.alpha,
            target_modules=tuple(sorted({name.rpartition(".")[2] for name in run.lora.targets})),
            dropout=config.lora.dropout,
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
        recipe=config.recipe, steps=config.max_steps, run_id=run.training.run_dir.name, adapter=adapter, settings=settings
    )


def _earlier_stages(manifest: dict[str, Any]) -> tuple[StageRecord, ...]:
    return tuple(
        StageRecord(**{**stage, "adapter": AdapterRecord(**stage["adapter"]) if stage.get("adapter") else None})
        for stage in manifest.get("stages", ())
    )


def _data(run: Run) -> tuple[DataRecord, ...]:
    return tuple(
        DataRecord(stream=name, name=label, fingerprint=source.fingerprint, num_rows=len(table))
        for name, stream in run.streams.items()
        for label, source, table in zip(stream.source_names, stream.sources, stream.tables, strict=True)
    )
