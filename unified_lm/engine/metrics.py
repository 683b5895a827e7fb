"""What a run reports: metrics.jsonl always, a progress bar on rank 0, wandb when asked."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from unified_lm.config.schema import LoggingConfig
from unified_lm.core import distributed
from unified_lm.core.errors import ConfigError


class MetricsLog:
    """Appends one JSON object a line to `metrics.jsonl`; only rank 0 writes.

    Args:
        path: the file; what it holds already is kept.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle = None
        if distributed.is_main():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._handle = open(path, "a", encoding="utf-8")  # noqa: SIM115 - lives as long as the run

    def cut(self, num_bytes: int) -> None:
        """Cut the file to a length: on resume, the lines of steps that will be taken again go away."""
        if self._handle is not None:
            os.truncate(self.path, min(num_bytes, self.num_bytes))

    def write(self, values: dict[str, Any]) -> None:
        """Append one line and hand it to the operating system."""
        if self._handle is not None:
            self._handle.write(json.dumps(values) + "\n")
            self._handle.flush()

    @property
    def num_bytes(self) -> int:
        """The present length of the file."""
        return self.path.stat().st_size if self.path.exists() else 0

    def close(self) -> None:
        """Close the file."""
        if self._handle is not None:
            self._handle.close()


class Reporter:
    """One place for everything a run says while it trains. Use as a context manager.

    Args:
        config: what to report.
        run_dir: the folder of the run.
        total_steps: optimizer steps of the run.
        settings: the resolved configuration, for wandb.
        console: where the progress bar goes.
    """

    def __init__(
        self,
        config: LoggingConfig,
        run_dir: Path,
        total_steps: int,
        settings: dict[str, Any],
        console: Console | None = None,
    ) -> None:
        self.config = config
        self.log = MetricsLog(run_dir / "metrics.jsonl")
        self.console = console or Console(stderr=True)
        self._wandb = _start_wandb(config, run_dir, settings)
        self._progress = Progress(
            TextColumn("[bold]training"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not (config.progress and distributed.is_main()),
        )
        self._task = self._progress.add_task("train", total=total_steps, note="")

    def __enter__(self) -> Reporter:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()
        self.log.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if error is None else 1)

    def start_at(self, step: int) -> None:
        """Begin the bar at a step that an earlier process reached."""
        self._progress.reset(self._task, completed=step)

    def step(self, step: int, values: dict[str, Any], *, last: bool = False) -> None:
        """Report one optimizer step.

        Args:
            step: optimizer steps taken, this one included.
            values: numbers by name; "loss/STREAM" and "tokens_per_second" are shown in the bar.
            last: whether the run ends here; its last step is always written.
        """
        losses = " ".join(f"{key[5:]} {value:.3f}" for key, value in values.items() if key.startswith("loss/"))
        note = f"{losses}  {values.get('tokens_per_second', 0):,.0f} tok/s"
        self._progress.update(self._task, completed=step, note=note)
        if last or step % self.config.every == 0:
            self.write(step, values)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Append numbers to metrics.jsonl, and to wandb where it runs."""
        self.log.write({"step": step, **values})
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def say(self, text: str) -> None:
        """Print a line above the progress bar, on rank 0."""
        if distributed.is_main():
            self._progress.console.print(text, highlight=False, soft_wrap=True)


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, oldest first; a torn last line is left out."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def held_out(run_dir: Path) -> tuple[dict[str, float], dict[str, float]]:
    """What a run measured on held-out data before its first and after its last step (empty where it did not)."""
    measured = [line for line in read_metrics(run_dir) if any(name.startswith(("heldout/", "retrieval/")) for name in line)]
    if not measured or measured[0]["step"] != 0:  # continued from the checkpoint of another run
        return {}, {}
    before, after = ({name: value for name, value in line.items() if name != "step"} for line in (measured[0], measured[-1]))
    return before, after


def _start_wandb(config: LoggingConfig, run_dir: Path, settings: dict[str, Any]) -> Any:
    """A wandb run, or None when it is disabled or this is not rank 0."""
    if config.wandb == "disabled" or not distributed.is_main():
        return None
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(
            f"logging.wandb={config.wandb} needs wandb. Install it with `pip install 'unified_lm[wandb]'`, "
            "or use logging.wandb=disabled (metrics.jsonl is always written)."
        ) from error
    return wandb.init(project=config.wandb_project, name=run_dir.name, dir=str(run_dir), mode=config.wandb, config=settings)
