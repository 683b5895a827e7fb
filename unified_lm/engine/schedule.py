"""Learning rate as a pure function of the step, so that nothing needs saving to resume."""

from __future__ import annotations

import math

from unified_lm.config.schedules import SCHEDULES
from unified_lm.config.schema import OptimConfig


def num_warmup_steps(config: OptimConfig, total_steps: int) -> int:
    """Warmup in steps: `warmup_steps`, or `warmup_ratio` of the steps really taken, rounded up."""
    return config.warmup_steps or math.ceil(config.warmup_ratio * total_steps)


def learning_rate(config: OptimConfig, step: int, total_steps: int) -> float:
    """The learning rate of one step.

    It grows linearly over the warmup (the first step already moves the weights: `1 / warmup` of the peak), then decays
    over the remaining steps, or over `horizon_steps`, to `final_ratio` of the peak.

    Args:
        config: peak, warmup, shape and horizon.
        step: optimizer steps taken before this one, from 0.
        total_steps: optimizer steps of the run.
    """
    warmup = num_warmup_steps(config, total_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    horizon = config.horizon_steps or total_steps
    progress = min(1.0, (step - warmup) / max(1, horizon - warmup))
    shape = SCHEDULES[config.schedule].shape(progress)
    return config.learning_rate * (config.final_ratio + (1.0 - config.final_ratio) * shape)
