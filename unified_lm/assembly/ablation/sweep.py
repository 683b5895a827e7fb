"""Run the arms of an ablation one after another; what is finished is skipped, what was stopped or has failed goes on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.console import Console

from unified_lm.assembly.ablation.failures import Failures
from unified_lm.assembly.ablation.folder import begin, mark_finished
from unified_lm.assembly.build import RunResult
from unified_lm.assembly.job import Job, free_memory
from unified_lm.assembly.machine import settle_dtype
from unified_lm.assembly.stages import rank0_console
from unified_lm.config.schema import ArmConfig, RunConfig, SweepConfig
from unified_lm.core import distributed
from unified_lm.core.agreement import run_on_rank0
from unified_lm.engine.accounting.dry_run import print_sweep
from unified_lm.engine.interruption import stop_message


def arms(sweep: SweepConfig, console: Console | None = None) -> Iterator[Job]:
    """The arms to run, in order, until a signal stops one or comes at its end. One that fails does not keep the others back.

    Args:
        sweep: the ablation; a dry run is printed, and has no arm to run.
        console: where to say which arm runs; None takes stderr, on rank 0.

    Yields:
        A job per arm that is not finished. What becomes of its folder follows from how the job ends.

    Raises:
        CheckpointError: the folder holds an arm with other settings; nothing is run.
        UserError: arms have failed. All others are finished, unless the error is one of all arms (see `Failures`).
    """
    console = console or rank0_console()
    if sweep.arms[0].run.dry_run:
        print_sweep(_settled(sweep), Console(quiet=not distributed.is_rank0()))
        return
    begun = run_on_rank0(lambda: begin(sweep))
    failures = Failures(len(sweep.arms), any_finished=bool(begun.finished), console=console)
    said: set[str] = set()
    order = begun.order(sweep)
    for place, index in enumerate(order):
        arm = sweep.arms[index]
        console.rule(f"{index + 1} of {len(order)}: {arm.name}, seed {arm.run.seed}")
        if arm.run.run_dir in begun.finished:
            console.print("finished before", style="dim")
            continue
        run = _placed(arm, sweep)
        run = replace(run, notices=tuple(notice for notice in run.notices if notice not in said))
        said.update(run.notices)
        job = Job(run, on_failure=partial(failures.note, arm))
        yield job
        ended = job.outcome()
        if ended is not None:
            if ended.is_finished:
                run_on_rank0(partial(mark_finished, ended.run_dir, arm, keep=sweep.keep_checkpoints))
                failures.any_finished = True
            if _ends_here(ended, arm, place + 1 == len(order), console):
                failures.tell()
                return
        free_memory()
    failures.tell_and_raise()
    console.print(f"compare the arms: unified-lm compare {sweep.run_dir}", highlight=False, soft_wrap=True)


def _settled(sweep: SweepConfig) -> SweepConfig:
    """The ablation with what the machine decides, for an estimate."""
    arms = []
    for arm in sweep.arms:
        run, notices = settle_dtype(arm.run)
        arms.append(replace(arm, run=replace(run, notices=(*run.notices, *notices))))
    return replace(sweep, arms=tuple(arms))


def _placed(arm: ArmConfig, sweep: SweepConfig) -> RunConfig:
    """The arm's run with what only the whole ablation knows: where copies go, and the group at wandb."""
    run = arm.run
    if run.checkpoint.copy_to is not None:
        copies = Path(run.checkpoint.copy_to) / Path(run.run_dir).name
        run = replace(run, checkpoint=replace(run.checkpoint, copy_to=str(copies)))
    if run.logging.wandb_group is None:
        run = replace(run, logging=replace(run.logging, wandb_group=Path(sweep.run_dir).name))
    return run


def _ends_here(ended: RunResult, arm: ArmConfig, is_last: bool, console: Console) -> bool:
    """Whether a signal ends the ablation after this arm; says so where the arm itself was finished."""
    if not ended.is_finished:
        return True  # the run has said it
    if ended.stopped_by is None or is_last:
        return False
    after = f"arm {arm.name}, seed {arm.run.seed}, which is finished"
    console.print(stop_message(ended.stopped_by, after), highlight=False, soft_wrap=True)
    return True
