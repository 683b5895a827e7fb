"""A run as it was at one of its checkpoints: to export what a signal stopped, or an earlier step."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from unified_lm.assembly.build import Run, assemble_run
from unified_lm.assembly.publish import check_export, write_export
from unified_lm.checkpoint.state import PREFIX, open_tensors
from unified_lm.checkpoint.store import find_checkpoint, list_checkpoints
from unified_lm.composition.convert import from_yaml
from unified_lm.config.schema import RunConfig
from unified_lm.core.errors import CheckpointError
from unified_lm.core.outputs import check_folder

CONFIG_FILE = "config.yaml"


def export_checkpoint(run_dir: Path, target: Path, console: Console, step: int | None = None) -> Path:
    """Export the weights of a checkpoint, merged and verified like those of a finished run. In one process.

    Args:
        run_dir: the folder of a run (of a stage, for a chain).
        target: the folder to write; an export that is there already is replaced, anything else is refused.
        console: for notices.
        step: optimizer steps taken; None takes the newest complete checkpoint.

    Returns:
        `target`.

    Raises:
        OutputError: `target` holds what this package did not write, or is a file or a link.
        CheckpointError: no such run or checkpoint, or it is torn.
        ConfigError: the run's configuration or data can no longer be read.
    """
    check_folder(target)
    run = load_run(run_dir, console, step)
    check_export(run)
    return write_export(run, console, target)


def load_run(run_dir: Path, console: Console, step: int | None = None) -> Run:
    """The model, data and settings of a run, with the weights of one of its checkpoints; see `export_checkpoint`."""
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
        resume="none",
        max_steps=int(path.name.removeprefix(PREFIX)),
        parallel=replace(config.parallel, backend="auto"),
        logging=replace(config.logging, wandb="disabled", progress=False),
        export=replace(config.export, push_to_hub=None),
    )
    with tempfile.TemporaryDirectory() as empty:  # assembling a run opens its metrics file
        run = assemble_run(config, Path(empty), console)
    run.training.run_dir = run_dir
    with open_tensors(path) as read:
        run.training.backend.load_optimizer_state(read)
    return run


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
