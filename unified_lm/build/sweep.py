"""Run the arms of an ablation one after another; what is finished is skipped, what was stopped goes on."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from unified_lm.config.convert import from_yaml
from unified_lm.config.flat import flatten
from unified_lm.config.locate import RESOLVED_NAME
from unified_lm.config.schema import ArmConfig, RunConfig, SweepConfig
from unified_lm.core import distributed
from unified_lm.core.agreement import on_main
from unified_lm.core.errors import CheckpointError
from unified_lm.core.files import write_json
from unified_lm.engine.dry_run import print_sweep
from unified_lm.evaluation.compare import SWEEP_FILE

FINISHED = "finished.json"
"""Written into an arm's folder when its last step is taken and measured."""

_FREE = ("run_dir", "resume", "dry_run", "description", "notices", "logging", "checkpoint", "parallel.timeout_minutes")
"""What may differ between a started arm and what is asked for now: it changes no number."""


def run_sweep(sweep: SweepConfig, run_one: Callable[[RunConfig], tuple[Path, bool]], console: Console | None = None) -> Path:
    """Run the arms in order, until one is stopped by a signal.

    Args:
        sweep: the ablation.
        run_one: runs one configuration; returns its folder and whether it is finished.
        console: where to say which arm runs; None takes stderr, on rank 0.

    Returns:
        The folder of the ablation.

    Raises:
        CheckpointError: the folder holds an arm with other settings; nothing is run.
    """
    run_dir = Path(sweep.run_dir)
    console = console or Console(stderr=True, quiet=not distributed.is_main())
    if sweep.arms[0].run.dry_run:
        print_sweep(sweep, Console(quiet=not distributed.is_main()))
        return run_dir
    finished = on_main(lambda: _begin(sweep))
    said: set[str] = set()
    for number, arm in enumerate(sweep.arms, start=1):
        console.rule(f"{number} of {len(sweep.arms)}: {arm.name}, seed {arm.run.seed}")
        if arm.run.run_dir in finished:
            console.print("finished before", style="dim")
            continue
        run = _placed(arm, sweep)
        folder, is_finished = run_one(replace(run, notices=tuple(notice for notice in run.notices if notice not in said)))
        said.update(run.notices)
        if not is_finished:
            return run_dir
        on_main(partial(_finish, folder, arm, keep=sweep.keep_checkpoints))
        _free_memory()
    console.print(f"compare the arms: unified-lm compare {run_dir}", highlight=False, soft_wrap=True)
    return run_dir


def _placed(arm: ArmConfig, sweep: SweepConfig) -> RunConfig:
    """The arm's run with what only the whole ablation knows: where copies go, and the group at wandb."""
    run = arm.run
    if run.checkpoint.copy_to is not None:
        copies = Path(run.checkpoint.copy_to) / Path(run.run_dir).name
        run = replace(run, checkpoint=replace(run.checkpoint, copy_to=str(copies)))
    if run.logging.wandb_group is None:
        run = replace(run, logging=replace(run.logging, wandb_group=Path(sweep.run_dir).name))
    return run


def _begin(sweep: SweepConfig) -> set[str]:
    """Write down the order of the arms; returns the folders of finished ones.

    Raises:
        CheckpointError: an arm was started with other settings; all of them are named.
    """
    problems = [problem for arm in sweep.arms if (problem := _difference(arm)) is not None]
    if problems:
        raise CheckpointError(
            "\n".join([f"{sweep.run_dir} holds runs with other settings; nothing was changed.", *problems])
            + "\nUndo the change, remove the folders of these runs, or choose another run_dir."
        )
    write_json(Path(sweep.run_dir) / SWEEP_FILE, {"recipe": sweep.recipe, "base": sweep.base, "arms": list(sweep.arm_names)})
    return {arm.run.run_dir for arm in sweep.arms if (Path(arm.run.run_dir) / FINISHED).is_file()}


def _difference(arm: ArmConfig) -> str | None:
    """How an arm differs from what its folder holds; None where it does not, or is not started."""
    file = Path(arm.run.run_dir) / RESOLVED_NAME
    if not file.is_file():
        return None
    before, now = (flatten(config) for config in (from_yaml(file), arm.run))
    changed = [key for key in {**before, **now} if before.get(key) != now.get(key) and not _is_free(key)]
    if not changed:
        return None
    listed = ", ".join(f"{key} was {_show(before.get(key))}, is {_show(now.get(key))}" for key in changed[:8])
    more = f", and {len(changed) - 8} more" if len(changed) > 8 else ""
    return f"  {file.parent.name}: {listed}{more}"


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in _FREE)


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def _finish(folder: Path, arm: ArmConfig, *, keep: bool) -> None:
    """Mark an arm as finished; its checkpoints, several times the model, have then served."""
    write_json(folder / FINISHED, {"arm": arm.name, "seed": arm.run.seed, "steps": arm.run.max_steps})
    if not keep:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def _free_memory() -> None:
    """Let go of the finished arm's model before the next one is loaded."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
