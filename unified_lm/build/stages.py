"""Run a recipe, or a chain of them: compose, assemble, fit, export."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from unified_lm.build.assemble import Run, build_run
from unified_lm.build.publish import check_export, export_run
from unified_lm.checkpoint.state import find_checkpoint, list_checkpoints
from unified_lm.config.compose import compose, to_yaml
from unified_lm.config.schema import ChainConfig, RunConfig
from unified_lm.core import distributed
from unified_lm.core.errors import CheckpointError
from unified_lm.core.files import write_text
from unified_lm.engine.dry_run import print_dry_run
from unified_lm.engine.fit import fit


def train(argv: Sequence[str]) -> Path:
    """Compose a recipe from `key=value` arguments and run it: what `train.py` and `unified-lm train` call.

    Returns:
        The folder of the run (of the last stage, for a chain).
    """
    config = compose(argv)
    first = config.stages[0] if isinstance(config, ChainConfig) else config
    distributed.initialise(first.parallel.timeout_minutes)
    try:
        return run_chain(config) if isinstance(config, ChainConfig) else run_stage(config)
    finally:
        distributed.shutdown()


def run_chain(chain: ChainConfig) -> Path:
    """Run the stages in order, each from the merged result of the one before.

    With `resume=auto` a finished stage takes no further step; it is only exported again.
    """
    run_dir = Path(_agree(chain.run_dir or f"runs/{chain.recipe}-{time.strftime('%Y%m%d-%H%M%S')}"))
    previous: Path | None = None
    for index, stage in enumerate(chain.stages):
        config = replace(stage, run_dir=str(run_dir / f"{index + 1}-{stage.recipe}"))
        if previous is not None:
            config = replace(config, model=replace(config.model, init_from=str(previous)))
        previous = run_stage(config)
    assert previous is not None, "a chain has stages"
    return previous


def run_stage(config: RunConfig) -> Path:
    """Run one recipe to its export, or print what it would do.

    Raises:
        CheckpointError: `run_dir` already holds a run and nothing was said about resuming it.
    """
    console = Console(stderr=True, quiet=not distributed.is_main())
    for notice in config.notices:
        console.print(f"note: {notice}", highlight=False, soft_wrap=True)
    if config.dry_run:
        print_dry_run(config, Console(quiet=not distributed.is_main()))
        return Path(config.run_dir)
    config = replace(config, run_dir=_agree(config.run_dir or f"runs/{config.recipe}-{time.strftime('%Y%m%d-%H%M%S')}"))
    run_dir = Path(config.run_dir)
    _refuse_to_overwrite(config, run_dir)
    run = build_run(config, run_dir, console)
    _report(run, console)
    if config.export.enabled:
        check_export(run)
    if distributed.is_main():
        write_text(run_dir / "config.yaml", to_yaml(config))
    fit(run.training)
    if config.export.enabled and distributed.is_main():
        export_run(run, console)
    distributed.barrier()
    return run_dir


def _refuse_to_overwrite(config: RunConfig, run_dir: Path) -> None:
    """Raise when a folder holds a run that this one would write over.

    Raises:
        CheckpointError: `run_dir` holds a run that is not the one to resume, or checkpoints newer than the one to resume.
    """
    metrics = run_dir / "metrics.jsonl"
    own = list_checkpoints(run_dir / "checkpoints")
    used = bool(own) or (metrics.exists() and metrics.stat().st_size > 0)
    if not used or config.resume == "auto":
        return
    chosen = find_checkpoint(config.resume, run_dir / "checkpoints")
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


def _agree(value: str) -> str:
    """Rank 0's value on every rank (clocks differ)."""
    if distributed.world_size() == 1:
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]
