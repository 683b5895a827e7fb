"""The loop: next batch, step, log, validate, save."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from unified_lm.batch import Batch
from unified_lm.checkpoint.state import Identity, RunState, load_state, save_state
from unified_lm.config.schema import RunConfig
from unified_lm.core import distributed
from unified_lm.core.errors import ModelError
from unified_lm.core.random import RngState
from unified_lm.engine.backend import Backend
from unified_lm.engine.metrics import Reporter
from unified_lm.engine.schedule import learning_rate
from unified_lm.engine.step import GradCacheStep, StepLosses
from unified_lm.engine.trainable import Trainable
from unified_lm.engine.validation import Validator


class Loader(Protocol):
    """Where batches come from."""

    def next_batch(self) -> Batch:
        """This rank's share of the next step."""

    def state_dict(self) -> dict[str, Any]:
        """Cursors, as JSON values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to saved cursors."""


@dataclass
class Training:
    """Everything `fit` works with; the composition root (`build`) makes it.

    Attributes:
        config: the resolved configuration.
        run_dir: the folder of the run.
        trainable: the module, on its device.
        backend: forward, backward and update.
        step: losses and gradients of a batch.
        loader: batches.
        validator: held-out measurements, or None.
        reporter: what the run says.
        identity: what checkpoints of this run belong to.
        resume_from: the checkpoint to continue, or None.
    """

    config: RunConfig
    run_dir: Path
    trainable: Trainable
    backend: Backend
    step: GradCacheStep
    loader: Loader
    validator: Validator | None
    reporter: Reporter
    identity: Identity
    resume_from: Path | None = None


def fit(training: Training) -> None:
    """Train to `max_steps`, from the start or from a checkpoint."""
    config = training.config
    steps_taken = _resume(training)
    with training.reporter:
        training.reporter.start_at(steps_taken)
        if steps_taken == 0:
            _validate(training, 0, both_masks=True)
        while steps_taken < config.max_steps:
            values = _train_step(training, steps_taken)
            steps_taken += 1
            last = steps_taken == config.max_steps
            training.reporter.step(steps_taken, values, last=last)
            if last or _due(steps_taken, config.validation.every):
                _validate(training, steps_taken, both_masks=last)
            if last or _due(steps_taken, config.checkpoint.every):
                _save(training, steps_taken)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _train_step(training: Training, steps_taken: int) -> dict[str, float]:
    """Take one optimizer step and return what it measured."""
    config = training.config
    started = time.perf_counter()
    batch = training.loader.next_batch().to(distributed.local_device())
    loaded = time.perf_counter()
    training.trainable.train()
    losses = training.step(batch)
    rate = learning_rate(config.optim, steps_taken, config.max_steps)
    norm = training.backend.update(rate, config.optim.max_grad_norm)
    _require_finite(losses, norm, steps_taken + 1)
    seconds = time.perf_counter() - started
    return _measurements(batch, losses, rate, norm, seconds, loaded - started)


def _require_finite(losses: StepLosses, norm: float, step: int) -> None:
    if math.isfinite(losses.total) and math.isfinite(norm):
        return
    parts = ", ".join(f"{name} {value}" for name, value in losses.by_stream.items())
    raise ModelError(
        f"step {step}: the loss or its gradient is not finite (losses: {parts}; gradient norm {norm}). The weights in memory "
        "are spoilt, the checkpoints are not. Lower optim.learning_rate, or look at the rows of this step, and resume=auto."
    )


def _measurements(
    batch: Batch, losses: StepLosses, rate: float, norm: float, seconds: float, data_seconds: float
) -> dict[str, float]:
    totals = torch.tensor([batch.num_tokens, batch.num_samples, len(batch.packs), batch.num_truncated], dtype=torch.float64)
    tokens, samples, packs, truncated = distributed.all_reduce_sum(totals.to(distributed.local_device())).tolist()
    return {
        **{f"loss/{name}": value for name, value in losses.by_stream.items()},
        "loss": losses.total,
        **losses.metrics,
        "learning_rate": rate,
        "gradient_norm": norm,
        "tokens": tokens,
        "samples": samples,
        "packs": packs,
        "truncated": truncated,
        "tokens_per_second": tokens / seconds,
        "samples_per_second": samples / seconds,
        "data_seconds": data_seconds,
        "step_seconds": seconds,
    }


def _validate(training: Training, step: int, *, both_masks: bool) -> None:
    """Measure held-out data; the first and the last time retrieval under the causal mask too."""
    if training.validator is None:
        return
    values = training.validator(both_masks=both_masks)
    training.reporter.write(step, values)
    shown = "  ".join(f"{name} {value:.3f}" for name, value in values.items())
    training.reporter.say(f"step {step}: {shown}")


def _save(training: Training, steps_taken: int) -> None:
    """Write a checkpoint. Every rank holds the same weights, so rank 0 writes; the others wait for it."""
    rng = tuple(distributed.all_gather_objects(RngState.capture()))
    if distributed.is_main():
        state = RunState(
            step=steps_taken,
            optimizer=training.backend.optimizer.state_dict(),
            loader=training.loader.state_dict(),
            rng=rng,
            metrics_bytes=training.reporter.log.num_bytes,
            identity=training.identity,
        )
        save_state(state, training.run_dir / "checkpoints", training.config.checkpoint.keep_last)
    distributed.barrier()


def _resume(training: Training) -> int:
    if training.resume_from is None:
        training.reporter.log.cut(0)  # of a run that ended before its first checkpoint
        return 0
    state = load_state(training.resume_from, training.identity)
    training.backend.optimizer.load_state_dict(state.optimizer)
    training.loader.load_state_dict(state.loader)
    if len(state.rng) == distributed.world_size():
        state.rng[distributed.rank()].restore()
    else:
        training.reporter.say(f"checkpoint of {len(state.rng)} ranks: the order of the data continues, dropout draws anew")
    training.reporter.log.cut(state.metrics_bytes)
    training.reporter.say(f"resuming from {training.resume_from.name}")
    return state.step
