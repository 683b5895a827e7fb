"""Run a recipe, a chain of them or an ablation: compose, assemble, fit, export."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from unified_lm.assembly.ablation.sweep import run_sweep
from unified_lm.assembly.build import Run, build_run
from unified_lm.assembly.publish import check_export, export_run
from unified_lm.assembly.references import score_references
from unified_lm.assembly.run_record import write_record
from unified_lm.assembly.run_result import RunResult
from unified_lm.checkpoint.store import find_checkpoint, list_checkpoints
from unified_lm.composition.compose import compose, to_yaml
from unified_lm.config.schema import ChainConfig, RunConfig, SweepConfig
from unified_lm.core import distributed
from unified_lm.core.agreement import broadcast_object, run_on_rank0
from unified_lm.core.errors import CheckpointError, UserError
from unified_lm.core.files import write_text
from unified_lm.core.watchdog import run_long_on_rank0, watching
from unified_lm.engine.accounting.dry_run import print_dry_run
from unified_lm.engine.fit import fit
from unified_lm.engine.interruption import StopRequest, stop_message
from unified_lm.engine.wandb_run import check_wandb


def train(argv: Sequence[str]) -> Path:
    """Compose a recipe from `key=value` arguments and run it: what `train.py` and `unified-lm train` call.

    A run that a signal stops (see `engine.fit`) returns like one that is finished; its export is not written.

    Returns:
        The folder of the run (of the last stage that ran, for a chain; of all the runs, for an ablation).
    """
    config = compose(argv)
    minutes = _first_run(config).parallel.timeout_minutes
    distributed.initialize(minutes)
    with watching(minutes):
        run_dir = _run(config)
    # Not after an error: leaving the group may wait for the others, and they must first hear why (`core.failures`).
    distributed.shutdown()
    return run_dir


def _first_run(config: RunConfig | ChainConfig | SweepConfig) -> RunConfig:
    if isinstance(config, ChainConfig):
        return config.stages[0]
    return config.arms[0].run if isinstance(config, SweepConfig) else config


def _run(config: RunConfig | ChainConfig | SweepConfig) -> Path:
    if isinstance(config, ChainConfig):
        return run_chain(config)
    return run_sweep(config, _run_stage) if isinstance(config, SweepConfig) else run_stage(config)


def run_chain(chain: ChainConfig) -> Path:
    """Run the stages in order, each from the merged result of the one before, until a signal stops one or comes at its end.

    With `resume=auto` a finished stage takes no further step; it is only exported again.
    """
    console = _console()
    run_dir = Path(broadcast_object(chain.run_dir or f"runs/{chain.recipe}-{time.strftime('%Y%m%d-%H%M%S')}"))
    previous: Path | None = None
    for index, stage in enumerate(chain.stages):
        name = f"{index + 1}-{stage.recipe}"
        config = replace(stage, run_dir=str(run_dir / name))
        if stage.checkpoint.copy_to is not None:
            config = replace(config, checkpoint=replace(stage.checkpoint, copy_to=str(Path(stage.checkpoint.copy_to) / name)))
        if stage.logging.wandb_group is None:
            config = replace(config, logging=replace(stage.logging, wandb_group=run_dir.name))
        if previous is not None:
            config = replace(config, model=replace(config.model, init_from=str(previous)))
        ended = _run_stage(config)
        previous = ended.run_dir
        if not ended.is_finished:
            break
        if ended.stopped_by is not None and index + 1 < len(chain.stages):
            after = f"stage {index + 1} of {len(chain.stages)} ({stage.recipe}), which is finished"
            console.print(stop_message(ended.stopped_by, after), highlight=False, soft_wrap=True)
            break
    assert previous is not None, "a chain has stages"
    return previous


def run_stage(config: RunConfig) -> Path:
    """Run one recipe to its export, or print what it would do; returns the folder of the run.

    Raises:
        CheckpointError: `run_dir` already holds a run and nothing was said about resuming it.
    """
    return _run_stage(config).run_dir


def _console() -> Console:
    """Messages go to stderr, from one rank."""
    return Console(stderr=True, quiet=not distributed.is_rank0())


def _run_stage(config: RunConfig) -> RunResult:
    console = _console()
    for notice in config.notices:
        console.print(f"note: {notice}", highlight=False, soft_wrap=True)
    if config.dry_run:
        print_dry_run(config, Console(quiet=not distributed.is_rank0()))
        return RunResult(Path(config.run_dir), is_finished=True)
    config = replace(
        config, run_dir=broadcast_object(config.run_dir or f"runs/{config.recipe}-{time.strftime('%Y%m%d-%H%M%S')}")
    )
    run_dir = Path(config.run_dir)
    run_on_rank0(lambda: _refuse_to_overwrite(config, run_dir))
    run_on_rank0(lambda: check_wandb(config.logging))
    run = build_run(config, run_dir, console)
    _report(run, console)
    if config.export.enabled:
        check_export(run)
    score_references(run)
    if distributed.is_rank0():
        write_text(run_dir / "config.yaml", to_yaml(config))
    run_on_rank0(lambda: write_record(run))
    try:
        ended = _fit_and_export(run, console)
    except Exception as error:
        # An ablation goes on after it, and needs the memory. But ranks that fail alone must not wait for the others here.
        if isinstance(error, UserError) or distributed.world_size() == 1:
            run.training.backend.close()
        raise
    run.training.backend.close()
    return ended


def _fit_and_export(run: Run, console: Console) -> RunResult:
    """Train and export; a signal that comes before the export keeps it from being written, as it ends the steps before."""
    config, run_dir = run.training.config, run.training.run_dir
    with StopRequest() as stop:
        if not fit(run.training, stop):
            return RunResult(run_dir, is_finished=False, stopped_by=stop.agree())
        if config.export.enabled:
            if (signal_name := stop.agree()) is not None:
                after = f"step {config.max_steps}, the last one, which is saved; the export is not written"
                console.print(stop_message(signal_name, after), highlight=False, soft_wrap=True)
                return RunResult(run_dir, is_finished=False, stopped_by=signal_name)
            with run.training.backend.gathered():
                run_long_on_rank0(lambda: export_run(run, console), "export")
        return RunResult(run_dir, is_finished=True, stopped_by=stop.agree())


def _refuse_to_overwrite(config: RunConfig, run_dir: Path) -> None:
    """Raise when a folder holds a run that this one would write over.

    Raises:
        CheckpointError: `run_dir` holds a run that is not the one to resume, or checkpoints newer than the one to resume.
    """
    metrics = run_dir / "metrics.jsonl"
    own = list_checkpoints(run_dir / "checkpoints")
    used = bool(own) or (metrics.exists() and metrics.stat().st_size > 0)
    if config.resume == "auto":
        return
    _refuse_to_mix_copies(config)
    if not used:
        return
    chosen = find_checkpoint(config.resume, run_dir / "checkpoints").path
    inside = [path.resolve() for path in own]
    if chosen is None or chosen.resolve() not in inside:
        raise CheckpointError(
            f"run_dir {run_dir} already holds a run; nothing was changed. "
            "Continue it with resume=auto, or choose another run_dir."
        )
    newer = inside[inside.index(chosen.resolve()) + 1 :]
    if newer:
        raise CheckpointError(
            f"run_dir {run_dir} has checkpoints newer than {chosen.name} ({', '.join(path.name for path in newer)}); "
            "nothing was changed. Resume into another run_dir, or remove them first."
        )


def _refuse_to_mix_copies(config: RunConfig) -> None:
    """Raise when a new run would put its copies among those of another, where either would remove the other's.

    Raises:
        CheckpointError: `checkpoint.copy_to` holds checkpoints.
    """
    copies = config.checkpoint.copy_to
    if config.resume == "none" and copies and list_checkpoints(Path(copies)):
        raise CheckpointError(
            f"checkpoint.copy_to {copies} already holds checkpoints of a run; nothing was changed. "
            "Continue it with resume=auto, or choose another folder."
        )


def _report(run: Run, console: Console) -> None:
    """Say what became of every source's rows, and what loading and adapting changed."""
    for notice in (*run.loaded.provenance["notices"], *(run.lora.notices if run.lora else ())):
        console.print(f"note: {notice}", highlight=False, soft_wrap=True)
    for name, stream in run.streams.items():
        stats = stream.stats
        for source, rows in stats.rows.items():
            cut = f", {stats.truncated[source]:,} texts cut to their limit" if stats.truncated[source] else ""
            console.print(f"{name}: {source}, {rows:,} rows{cut}", highlight=False, soft_wrap=True)
        for reason, count in stats.rejected.items():
            console.print(f"{name}: {count:,} left out: {reason}", highlight=False, soft_wrap=True)
