"""What a configuration asks for, run after run: one run, the stages of a chain, or the arms of an ablation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from unified_lm.assembly.ablation.sweep import arms
from unified_lm.assembly.job import Job, free_memory
from unified_lm.assembly.machine import settle_backend, settle_dtype, settle_retained
from unified_lm.assembly.stages import default_run_dir, print_notices, rank0_console
from unified_lm.config.schema import ChainConfig, RunConfig, SweepConfig
from unified_lm.core import distributed
from unified_lm.core.agreement import broadcast_object, run_on_rank0
from unified_lm.core.errors import OutputError, about
from unified_lm.core.folder_lock import hold_folder, release_folder
from unified_lm.core.watchdog import watching
from unified_lm.engine.accounting.dry_run import print_dry_run
from unified_lm.engine.interruption import stop_message


@contextmanager
def training_session(config: RunConfig | ChainConfig | SweepConfig) -> Iterator[Session]:
    """Join the processes that torchrun started, if it did, and watch that none hangs while the block runs.

    Args:
        config: what `composition.compose` returns.

    Yields:
        The session; `for job in session.jobs()` goes through its runs.
    """
    minutes = _first_run(config).parallel.timeout_minutes
    distributed.initialize(minutes)
    with watching(minutes):
        session = Session(config)
        try:
            yield session
        finally:
            session.close()
    # Not after an error: leaving the group may wait for ranks that have not yet learned of the failure (`core.failures`).
    distributed.shutdown()


class Session:
    """The runs that a configuration asks for, one after another. Made by `training_session`.

    Args:
        config: one run, a chain or an ablation.

    Attributes:
        config: as given.
        run_dir: the folder of the run (of the last stage that ran, for a chain; of all the runs, for an ablation).
    """

    def __init__(self, config: RunConfig | ChainConfig | SweepConfig) -> None:
        self.config = config
        self.run_dir = Path(config.run_dir)
        self._folder: Path | None = None

    def close(self) -> None:
        """Give up the folder of a chain."""
        if self._folder is not None:
            release_folder(self._folder)

    def jobs(self) -> Iterator[Job]:
        """Each run to do: go through the block `with job:` before asking for the next one.

        A chain's next stage starts from the export of the one before. An ablation leaves out what is finished, and goes on
        after an arm that fails; `ablation.sweep` says how. A signal that stops a run, or comes at its end, is the end here too.
        A dry run is printed, and there is nothing to do.

        Raises:
            CheckpointError: the folder of an ablation holds an arm with other settings.
            UserError: after the last arm of an ablation, where some have failed.
        """
        if isinstance(self.config, SweepConfig):
            yield from arms(self.config)
        elif isinstance(self.config, ChainConfig):
            yield from self._stages(self.config)
        elif self.config.dry_run:
            _show(self.config)
        else:
            job = Job(self.config)
            yield job
            self._note_end(job)

    def _stages(self, chain: ChainConfig) -> Iterator[Job]:
        """The stages in order. With `resume=auto` a finished one takes no further step; it is only exported again."""
        run_dir = Path(broadcast_object(chain.run_dir or default_run_dir(chain.recipe)))
        if not chain.stages[0].dry_run:
            run_on_rank0(lambda: self._occupy(run_dir))
        previous: Path | None = None
        for index, stage in enumerate(chain.stages):
            config = _placed(stage, run_dir / f"{index + 1}-{stage.recipe}", previous)
            previous = Path(config.run_dir)
            name = f"stage {index + 1} of {len(chain.stages)} ({stage.recipe})"
            if config.dry_run:
                with about(name):
                    _show(config)
                self.run_dir = previous
                continue
            job = Job(config, stage=name)
            yield job
            if not self._note_end(job):
                return
            assert job.result is not None
            if job.result.stopped_by is not None and index + 1 < len(chain.stages):
                told = stop_message(job.result.stopped_by, f"{name}, which is finished")
                rank0_console().print(told, highlight=False, soft_wrap=True)
                return
            free_memory()

    def _occupy(self, run_dir: Path) -> None:
        """Lock the folder of a chain: a second one in it would replace the export that a stage of the first starts from."""
        if run_dir.exists() and not run_dir.is_dir():
            raise OutputError(f"run_dir {run_dir} is a file; nothing was changed. Name a folder.")
        self._folder = run_dir
        if notice := hold_folder(run_dir):
            rank0_console().print(f"note: {notice}", highlight=False, soft_wrap=True)

    def _note_end(self, job: Job) -> bool:
        """Note where the last run was; returns whether it is finished."""
        ended = job.outcome()
        assert ended is not None, "outside an ablation a failure ends the session"
        self.run_dir = ended.run_dir
        return ended.is_finished


def _first_run(config: RunConfig | ChainConfig | SweepConfig) -> RunConfig:
    if isinstance(config, ChainConfig):
        return config.stages[0]
    return config.arms[0].run if isinstance(config, SweepConfig) else config


def _placed(stage: RunConfig, folder: Path, previous: Path | None) -> RunConfig:
    """A stage with what only the whole chain knows: its folder, where copies go, the group at wandb, what it starts from."""
    config = replace(stage, run_dir=str(folder))
    if stage.checkpoint.copy_to is not None:
        copies = str(Path(stage.checkpoint.copy_to) / folder.name)
        config = replace(config, checkpoint=replace(stage.checkpoint, copy_to=copies))
    if stage.logging.wandb_group is None:
        config = replace(config, logging=replace(stage.logging, wandb_group=folder.parent.name))
    if previous is not None:
        config = replace(config, model=replace(config.model, init_from=str(previous)))
    return config


def _show(config: RunConfig) -> None:
    """Print what a run would do."""
    settled, notices = settle_dtype(config)
    settled, chosen = settle_backend(settled)
    settled, kept = settle_retained(settled)
    print_notices(replace(settled, notices=(*settled.notices, *notices, *chosen, *kept)), rank0_console())
    print_dry_run(settled, Console(quiet=not distributed.is_rank0()))
