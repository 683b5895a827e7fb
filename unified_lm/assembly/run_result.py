"""How a run ended: what a chain and an ablation must know of it before they go on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunResult:
    """The end of a run.

    Attributes:
        run_dir: its folder.
        is_finished: whether its last step is taken and its export written, where it has one.
        stopped_by: the name of the signal that asked to stop, also where it came too late to leave anything of this run
            undone; None without one.
    """

    run_dir: Path
    is_finished: bool
    stopped_by: str | None = None
