"""One run of a session, between its configuration and what follows from how it ended."""

from __future__ import annotations

import gc
from collections.abc import Callable
from types import TracebackType

import torch

from unified_lm.assembly.build import Run, RunResult
from unified_lm.assembly.run_folder import leave
from unified_lm.config.schema import RunConfig
from unified_lm.core import distributed
from unified_lm.core.errors import UserError, begin_with


class Job:
    """A run to build, fit and export inside `with job:`.

    The end of the block closes the run's backend and releases the run, so that the next one has the memory: keep the run in
    `job.run` alone. Every error leaves the block, unless `on_failure` takes it.

    Args:
        config: the run, with its folder and what it starts from.
        on_failure: takes an error of the block, which then ends as if there had been none; it may raise. It is called from the
            handler of the error, on every rank that has one.
        stage: what a user error of the block begins with; "" where there is one run alone.

    Attributes:
        config: as given.
        result: how the run ended, once it has; None where it failed.
    """

    def __init__(self, config: RunConfig, on_failure: Callable[[Exception], None] | None = None, stage: str = "") -> None:
        self.config = config
        self.result: RunResult | None = None
        self._on_failure = on_failure
        self._stage = stage
        self._run: Run | None = None
        self._is_over = False

    @property
    def run(self) -> Run:
        """The run, from its assignment to the end of the block.

        Once it is assigned, a signal no longer ends the process: it asks the run to stop, also between fit and export.
        """
        if self._run is None:
            raise RuntimeError("a job has no run yet, or no longer: inside `with job:` assign job.run = build_run(job.config)")
        return self._run

    @run.setter
    def run(self, run: Run) -> None:
        run.stop.__enter__()
        self._run = run

    def __enter__(self) -> Job:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        self._is_over = True
        if self._stage and isinstance(error, UserError):
            begin_with(error, self._stage)
        try:
            self._close(error)
        except Exception as failure:
            if not self._takes(failure):
                raise
            return True
        finally:
            if self.config.run_dir:
                leave(self.config)
        if error is not None:
            return isinstance(error, Exception) and self._takes(error)
        if self.result is None:
            raise RuntimeError("a job ended without a result: inside `with job:` call fit_run, and export_run where it is True")
        return False

    def outcome(self) -> RunResult | None:
        """How the job ended, for whoever gave it out; None where it failed and `on_failure` took the error.

        Raises:
            RuntimeError: nobody has gone through its block.
        """
        if not self._is_over:
            raise RuntimeError("a job was passed over: put build_run, fit_run and export_run inside `with job:`")
        return self.result

    def _close(self, error: BaseException | None) -> None:
        run, self._run = self._run, None
        if run is None:
            return
        run.stop.__exit__(None, None, None)
        # An ablation goes on after an error, and needs the memory. But ranks that fail alone must not wait for the others here.
        alike = isinstance(error, UserError) or (isinstance(error, Exception) and distributed.world_size() == 1)
        if error is None or alike:
            run.training.backend.close()
        self.result = run.result if error is None else None

    def _takes(self, error: Exception) -> bool:
        if self._on_failure is None:
            return False
        self._on_failure(error)
        return True


def free_memory() -> None:
    """Let go of a run's model before the next one is loaded."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
