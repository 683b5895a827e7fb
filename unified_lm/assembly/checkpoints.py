"""A run as it was at one of its checkpoints: to export what a signal stopped, or an earlier step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rich.console import Console

from unified_lm.assembly.build import identity_of, make_projection
from unified_lm.assembly.publish import Trained, check_export, data_records, make_manifest, write_export
from unified_lm.assembly.run_record import recorded_data
from unified_lm.assembly.trained_tokens import trained_tokens
from unified_lm.checkpoint.state import PREFIX, load_state, open_tensors
from unified_lm.checkpoint.store import find_checkpoint, list_checkpoints
from unified_lm.composition.convert import from_yaml
from unified_lm.config.schema import RunConfig
from unified_lm.core.errors import CheckpointError
from unified_lm.core.outputs import check_folder
from unified_lm.data.prompts.templates import get_template
from unified_lm.engine.backends.buffers import load_buffers
from unified_lm.engine.backends.optimizer import load_weights
from unified_lm.engine.training_module import TrainingModule
from unified_lm.export.adapter_folder import write_adapter
from unified_lm.export.manifest import ADAPTER, MERGED
from unified_lm.models.backbone import PADDED, Backbone
from unified_lm.models.frozen import freeze
from unified_lm.models.loading import load_model
from unified_lm.models.lora import apply_lora

CONFIG_FILE = "config.yaml"


def export_checkpoint(
    run_dir: Path, target: Path, console: Console, step: int | None = None, verify: str | None = None
) -> Path:
    """Export the weights of a checkpoint, merged and verified like those of a finished run. In one process, on the CPU.

    It needs what the run started from, and neither its data nor an optimizer.

    Args:
        run_dir: the folder of a run (of a stage, for a chain).
        target: the folder to write; an export that is there already is replaced, anything else is refused.
        console: for notices.
        step: optimizer steps taken; None takes the newest complete checkpoint.
        verify: "full", "sampled" or "off"; None does as the run's `export.verify` says.

    Returns:
        `target`.

    Raises:
        OutputError: `target` holds what this package did not write, or is a file or a link.
        CheckpointError: no such run or checkpoint, or it is torn, or of other starting weights.
        ConfigError: the run's configuration can no longer be read.
    """
    check_folder(target, MERGED)
    trained = load_trained(run_dir, console, step)
    if verify is not None:
        export = replace(trained.config.export, verify=verify)
        trained = replace(trained, config=replace(trained.config, export=export))
    check_export(trained)
    return write_export(replace(trained, keep=False), console, target)


def export_adapter(run_dir: Path, target: Path, console: Console, step: int | None = None) -> Path:
    """Export the adapter of a checkpoint without its base; see `export.adapter_folder`. In one process, on the CPU.

    Args:
        run_dir: the folder of a run with adapters (`lora`).
        target: the folder to write; see `export_checkpoint`.
        console: for notices.
        step: optimizer steps taken; None takes the newest complete checkpoint.

    Returns:
        `target`.

    Raises:
        OutputError, CheckpointError, ConfigError: see `export_checkpoint`; also where the run has no adapter, or started from
            weights that are nowhere on disk.
    """
    check_folder(target, ADAPTER)
    trained = load_trained(run_dir, console, step)
    provenance = trained.loaded.provenance
    if trained.config.lora is None:
        raise CheckpointError(f"{run_dir} trained every weight: there is no adapter to export. Leave --adapter out.")
    if provenance["location"] is None:
        raise CheckpointError(
            f"{run_dir} started from {provenance['name']}, whose weights are in no folder that the adapter could name as its "
            "base. Leave --adapter out."
        )
    manifest = make_manifest(trained)
    write_adapter(
        trained.backbone.causal_lm,
        trained.loaded.tokenizer,
        target,
        config=trained.config.lora,
        base=provenance["location"],
        base_revision=provenance["revision"],
        manifest=manifest,
        template=get_template(manifest.template),
        projection=trained.projection,
    )
    return target


def load_trained(run_dir: Path, console: Console, step: int | None = None) -> Trained:
    """The model and settings of a run, with the weights of one of its checkpoints, on the CPU; see `export_checkpoint`."""
    if not (run_dir / CONFIG_FILE).is_file():
        stages = sorted(str(path.parent) for path in run_dir.glob(f"*/{CONFIG_FILE}"))
        hint = f"It is a chain of runs: name one of {', '.join(stages)}." if stages else "Name the run_dir of a training run."
        raise CheckpointError(f"{run_dir} is not the folder of a run: it has no {CONFIG_FILE}. {hint}")
    path = _checkpoint(run_dir, step, console)
    config = from_yaml(run_dir / CONFIG_FILE)
    if not isinstance(config, RunConfig):
        raise CheckpointError(f"{run_dir / CONFIG_FILE} is of a chain; name the folder of one of its stages.")
    config = replace(
        config,
        run_dir=str(run_dir),
        max_steps=int(path.name.removeprefix(PREFIX)),
        export=replace(config.export, push_to_hub=None),
    )
    quantize = config.lora is not None and config.lora.quantize_4bit
    loaded = load_model(config.model, quantize_4bit=quantize, needs_head=config.needs_head)
    tokens = trained_tokens(config, loaded.tokenizer)
    lora = apply_lora(loaded.causal_lm, config.lora, config.seed, tokens) if config.lora else None
    if config.optim.frozen:
        freeze(loaded.causal_lm, config.optim.frozen)
    # No pack is run, so the kernel of training is not needed, which may want another device.
    backbone = Backbone(loaded.causal_lm, PADDED if config.model.attention_kernel == PADDED else "auto")
    projection = make_projection(config, loaded, backbone.hidden_size)
    trainable = TrainingModule(backbone, config.model.pooling, {}, projection)
    load_state(path, identity_of(config, loaded, trainable))
    with open_tensors(path) as read:
        load_weights(trainable.named_parameters(), read)
        load_buffers(trainable, read)
    data = recorded_data(run_dir)
    if data is None:
        console.print(f"note: {run_dir} has no run.json: the export will not say what it was trained on", highlight=False)
    return Trained(
        config=config,
        run_dir=run_dir,
        loaded=loaded,
        backbone=backbone,
        projection=projection,
        lora=lora,
        data=data_records(data or ()),
    )


def _checkpoint(run_dir: Path, step: int | None, console: Console) -> Path:
    folder = run_dir / "checkpoints"
    if step is None:
        found = find_checkpoint("auto", folder)
        for notice in found.notices:
            console.print(notice, highlight=False, soft_wrap=True)
        if found.path is None:
            raise CheckpointError(f"{run_dir} has no complete checkpoint. Set checkpoint.every, or let the run finish.")
        return found.path
    wanted = folder / f"{PREFIX}{step:08d}"
    if wanted not in list_checkpoints(folder):
        steps = ", ".join(str(int(path.name.removeprefix(PREFIX))) for path in list_checkpoints(folder)) or "none"
        raise CheckpointError(f"{run_dir} has no checkpoint of step {step}. It has: {steps}.")
    found = find_checkpoint(str(wanted), folder)
    assert found.path is not None
    return found.path
