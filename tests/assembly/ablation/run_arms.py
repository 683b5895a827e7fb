"""Goes through an ablation as `train.py` does, with something that stands for training."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console

from unified_lm.assembly.ablation.sweep import arms
from unified_lm.assembly.build import RunResult
from unified_lm.config.schema import RunConfig, SweepConfig


def run_sweep(sweep: SweepConfig, run_one: Callable[[RunConfig], RunResult], console: Console | None = None) -> None:
    """Call `run_one` for every arm that is to run, and let what it returns or raises be how the arm ended."""
    for job in arms(sweep, console):
        with job:
            job.result = run_one(job.config)
