"""The loop: next batch, step, log, save, validate."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from unified_lm.batch import Batch
from unified_lm.checkpoint.state import Identity, RunState, load_rng, load_state, open_tensors, save_state
from unified_lm.checkpoint.store import CheckpointCopier, prune, remove_unfinished
from unified_lm.config.schema import RunConfig
from unified_lm.core import distributed
from unified_lm.core.agreement import failures, run_on_rank0
from unified_lm.core.errors import DataError, UserError
from unified_lm.core.random import RngState
from unified_lm.core.tracing import trace_span
from unified_lm.core.watchdog import finish_together, run_long_on_rank0
from unified_lm.engine.accounting.throughput import StepMeter
from unified_lm.engine.backends.backend import Backend
from unified_lm.engine.backends.buffers import load_buffers, trained_buffers
from unified_lm.engine.interruption import StopRequest, stop_message
from unified_lm.engine.metrics import Reporter, held_out_lines
from unified_lm.engine.schedule import learning_rate
from unified_lm.engine.skipping import SkippedSteps, finite, save_rows
from unified_lm.engine.step import GradCacheStep, StepLosses
from unified_lm.engine.training_module import TrainingModule
from unified_lm.engine.validation import Validator
from unified_lm.engine.validation_items import write_items


class Loader(Protocol):
    """Where batches come from."""

    def next_batch(self) -> Batch:
        """This rank's share of the next step."""

    @property
    def reads_along(self) -> bool:
        """Whether a draw may meet rows that cannot be used: they are read while training."""

    def reset(self) -> None:
        """Go back to the first step."""

    def state_dict(self) -> dict[str, Any]:
        """Cursors, as JSON values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to saved cursors."""


@dataclass
class TrainingState:
    """Everything `fit` works with; the composition root (`assembly.build`) makes it.

    Attributes:
        config: the resolved configuration.
        run_dir: the folder of the run.
        trainable: the module, on its device.
        backend: forward, backward and update.
        step: losses and gradients of a batch.
        loader: batches.
        validator: held-out measurements, or None.
        reporter: what the run says.
        meter: speed, use of the device, memory and balance of a step.
        identity: what checkpoints of this run belong to.
        decode: token ids -> text, for rows that are shown to the user.
        resume_from: the checkpoint to continue, or None.
    """

    config: RunConfig
    run_dir: Path
    trainable: TrainingModule
    backend: Backend
    step: GradCacheStep
    loader: Loader
    validator: Validator | None
    reporter: Reporter
    meter: StepMeter
    identity: Identity
    decode: Callable[[Sequence[int]], str]
    resume_from: Path | None = None


def fit(training: TrainingState, stop: StopRequest) -> bool:
    """Train to `max_steps`, from the start or from a checkpoint.

    SIGTERM or SIGUSR1, on any rank, ends it after the step under way, with a checkpoint. After the last step nothing is left to
    end: whoever has more to do asks `stop` whether a signal came meanwhile.

    Args:
        training: the run.
        stop: entered by the caller, who keeps it for what follows.

    Returns:
        Whether the run is finished; False when a signal stopped it before.

    Raises:
        ModelError: too many steps in a row without a finite loss and gradient.
        CheckpointError: a checkpoint could not be written or read.
    """
    config = training.config
    progress = _resume(training)
    with training.reporter, _Saver(training, progress) as saver:
        training.reporter.start_at(progress.step)
        if _validates_at(config, progress.step) and not progress.validated:
            _validate(training, progress.step)
        while progress.step < config.max_steps:
            values, stopped_by = _train_step(training, progress, stop, saver)
            last = progress.step == config.max_steps
            training.reporter.step(progress.step, values, last=last)
            # Saved first: whatever goes wrong while measuring, the steps are not lost. A resume measures what is missing.
            if last or stopped_by is not None or _due(progress.step, config.checkpoint.every):
                saver.save()
            if last or (_validates_at(config, progress.step) and stopped_by is None):
                _validate(training, progress.step)
            if stopped_by is not None and not last:
                training.reporter.say(stop_message(stopped_by, f"step {progress.step}, which is saved"))
                return False
    return True


@dataclass
class _Progress:
    """How far the run is.

    Attributes:
        step: optimizer steps taken, skipped ones included.
        skipped: those without an update.
        validated: whether held-out data has been measured since the last of these steps.
    """

    step: int
    skipped: SkippedSteps
    validated: bool = False


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _validates_at(config: RunConfig, step: int) -> bool:
    """Whether held-out data is measured after so many steps: before the first, after the last, and in between."""
    return step in (0, config.max_steps) or _due(step, config.validation.every)


def _next_batch(training: TrainingState, progress: _Progress, saver: _Saver) -> Batch:
    """The next batch. Where rows are read along, one that cannot be used costs no step: what is trained is saved first.

    Raises:
        DataError: a row or a file that cannot be used; on every rank, whichever met it.
    """
    loader = training.loader
    if not loader.reads_along:
        return loader.next_batch()
    batch, error = None, None
    try:
        batch = loader.next_batch()
    except UserError as failure:
        error = failure
    problem = failures(error)
    if problem is None:
        assert batch is not None
        return batch
    if saver.newest != progress.step > 0:
        saver.save()
    raise DataError(
        f"{problem}\nThe {progress.step} steps taken are saved. Mend the data, or leave such rows out with on_unusable=skip, "
        "and go on with resume=auto."
    ) from error


def _train_step(
    training: TrainingState, progress: _Progress, stop: StopRequest, saver: _Saver
) -> tuple[dict[str, float], str | None]:
    """Take one optimizer step; returns what it measured, and the signal that asks the run to stop."""
    config = training.config
    started = time.perf_counter()
    with trace_span("load a batch", waits=False):
        batch = _next_batch(training, progress, saver).to(distributed.local_device())
    loaded = time.perf_counter()
    training.trainable.train()
    rate = learning_rate(config.optim, progress.step, config.max_steps)
    progress.step += 1
    with trace_span(f"step {progress.step}"):
        losses = training.step(batch)
        with trace_span("update"):
            norm = training.backend.update(rate, config.optim.max_grad_norm)
        stopped_by = stop.agree()
    skipped = not math.isfinite(norm)
    progress.skipped.count(skipped=skipped)
    values = _measurements(losses, rate, norm) | {"skipped_steps": float(progress.skipped.total)}
    values |= training.meter(batch, time.perf_counter() - started, loaded - started)
    if skipped:
        _report_skipped(training, progress, batch, losses, norm)
    return (finite(values) if skipped else values), stopped_by


def _report_skipped(training: TrainingState, progress: _Progress, batch: Batch, losses: StepLosses, norm: float) -> None:
    forward = None if training.backend.equal_forwards else training.backend.forward
    rows = save_rows(training.run_dir, progress.step, batch, training.decode, forward)
    training.reporter.say(
        f"step {progress.step}: skipped, its loss or gradient is not finite (loss {losses.total}, gradient norm {norm}); "
        f"rows in {rows.name}"
    )
    progress.skipped.require_progress(progress.step, losses.by_stream, norm, rows)


def _measurements(losses: StepLosses, rate: float, norm: float) -> dict[str, float]:
    return {
        **{f"loss/{name}": value for name, value in losses.by_stream.items()},
        "loss": losses.total,
        **losses.metrics,
        "learning_rate": rate,
        "gradient_norm": norm,
    }


def _validate(training: TrainingState, step: int) -> None:
    """Measure held-out data; the first and the last time retrieval under the causal mask too."""
    if training.validator is None:
        return
    rng = RngState.capture()
    measured = training.validator(both_masks=step in (0, training.config.max_steps))
    rng.restore()  # a resume may come before or after a measurement, and must find the same state
    run_on_rank0(lambda: write_items(training.run_dir, step, measured.items))
    training.reporter.write(step, measured.values)
    shown = "  ".join(f"{name} {value:.3f}" for name, value in measured.values.items())
    training.reporter.say(f"step {step}: {shown}")


class _Saver:
    """Writes checkpoints, removes old ones and has them copied. Collective.

    Args:
        training: the run.
        progress: how far it is; read at each save.
    """

    def __init__(self, training: TrainingState, progress: _Progress) -> None:
        self.training = training
        self.progress = progress
        self.settings = training.config.checkpoint
        self.folder = training.run_dir / "checkpoints"
        # The step of the newest checkpoint, written or read.
        self.newest = None if training.resume_from is None else progress.step
        self._copier: CheckpointCopier | None = None
        if self.settings.copy_to is not None and distributed.is_rank0():
            self._copier = CheckpointCopier(Path(self.settings.copy_to), self.settings.keep_last, self.settings.keep_every)

    def __enter__(self) -> _Saver:
        run_on_rank0(self._remove_unfinished)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._copier is not None:
            self._say(self._copier.close())

    def save(self) -> None:
        """Write a checkpoint of the present state."""
        training = self.training
        state = RunState(
            step=self.progress.step,
            skipped=self.progress.skipped.total,
            skipped_in_a_row=self.progress.skipped.in_a_row,
            loader=training.loader.state_dict(),
            metrics_bytes=training.reporter.log.num_bytes,
            num_ranks=distributed.world_size(),
            backend=training.backend.name,
            identity=training.identity,
            settings=asdict(training.config),
        )
        with trace_span(f"checkpoint of step {state.step}"):
            tensors = chain(training.backend.optimizer_state(), trained_buffers(training.trainable))
            path = save_state(state, RngState.capture(), tensors, self.folder)
        run_long_on_rank0(lambda: self._settle(path), "remove old checkpoints")
        self.newest = state.step

    def _remove_unfinished(self) -> None:
        for folder in (self.folder, *([Path(self.settings.copy_to)] if self.settings.copy_to else [])):
            self._say(f"removed {path.name}, left by a run that was killed" for path in remove_unfinished(folder))

    def _settle(self, path: Path) -> None:
        """What follows a complete checkpoint."""
        protected: set[Path] = set()
        if self._copier is not None:
            self._say(self._copier.problems())
            self._copier.submit(path, self.training.reporter.log.path)
            protected = self._copier.busy
        prune(self.folder, self.settings.keep_last, self.settings.keep_every, protected)

    def _say(self, texts: Iterable[str]) -> None:
        for text in texts:
            self.training.reporter.say(text)


def _resume(training: TrainingState) -> _Progress:
    skipped = SkippedSteps(training.config.optim.max_skipped_steps)
    path = training.resume_from
    if path is None:
        training.reporter.log.cut(0)  # of a run that ended before its first checkpoint
        return _Progress(0, skipped)
    state = load_state(path, training.identity)
    with open_tensors(path) as read, trace_span("read the checkpoint"):
        training.backend.load_optimizer_state(read)
        load_buffers(training.trainable, read)
    finish_together("reading")
    training.loader.load_state_dict(state.loader)
    ranks = distributed.world_size()
    if state.num_ranks == ranks:
        load_rng(path, distributed.rank()).restore()
    training.reporter.log.cut(state.metrics_bytes, keep_step=state.step)
    training.reporter.say(f"resuming from {path.name}")
    if (state.num_ranks, state.backend) != (ranks, training.backend.name):
        training.reporter.say(
            f"it was written by {state.backend} on {state.num_ranks} processes, this is {training.backend.name} on {ranks}: "
            f"the order of the data continues{'' if state.num_ranks == ranks else ', dropout masks differ'}"
        )
    skipped.total, skipped.in_a_row = state.skipped, state.skipped_in_a_row
    measured = run_on_rank0(lambda: any(line["step"] == state.step for line in held_out_lines(training.run_dir)))
    return _Progress(state.step, skipped, validated=measured)
