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
from unified_lm.core.agreement import run_on_rank0
from unified_lm.core.errors import DataError
from unified_lm.core.typed import read_typed, show, unusable_text
from unified_lm.core.user_files import naming, parse_json
from unified_lm.engine.wandb_run import WandbRun


class MetricsLog:
    """Appends one JSON object a line to `metrics.jsonl`; only rank 0 writes.

    Args:
        path: the file; what it holds already is kept.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle = None
        if distributed.is_rank0():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._handle = open(path, "a", encoding="utf-8")  # noqa: SIM115 - lives as long as the run

    def cut(self, num_bytes: int, keep_step: int | None = None) -> None:
        """Cut the file to a length: on resume, the lines of steps that will be taken again go away.

        Args:
            num_bytes: what stays.
            keep_step: complete lines of this step that follow stay too: what was measured on the state of a checkpoint after it
                was written.
        """
        if self._handle is None:
            return
        with open(self.path, "rb") as file:
            file.seek(num_bytes)
            for line in file:
                if keep_step is None or not line.endswith(b"\n") or not line.startswith(b'{"step": %d,' % keep_step):
                    break
                num_bytes += len(line)
        os.truncate(self.path, min(num_bytes, self.num_bytes))

    def write(self, values: dict[str, Any]) -> None:
        """Append one line and hand it to the operating system."""
        if self._handle is not None:
            with naming(self.path):
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
        facts: further entries of wandb's config (ranks, device, peak).
    """

    def __init__(
        self,
        config: LoggingConfig,
        run_dir: Path,
        total_steps: int,
        settings: dict[str, Any],
        console: Console | None = None,
        facts: dict[str, Any] | None = None,
    ) -> None:
        self.config = config
        self.log = MetricsLog(run_dir / "metrics.jsonl")
        self.console = console or Console(stderr=True)
        self._run_dir = run_dir
        self._settings = settings
        self._facts = facts
        self._wandb: WandbRun | None = None
        self._progress = Progress(
            TextColumn("[bold]training"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not (config.progress and distributed.is_rank0()),
        )
        self._task = self._progress.add_task("train", total=total_steps, note="")

    def __enter__(self) -> Reporter:
        if self.config.wandb != "disabled":
            run_on_rank0(self._start_wandb)
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()
        self.log.close()
        if self._wandb is not None:
            self._wandb.finish(failed=error is not None)

    def _start_wandb(self) -> None:
        self._wandb = WandbRun(self.config, self._run_dir, self._settings, self._facts)

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
        note = f"{losses}  {values.get('tokens_per_second', 0):,.0f} tokens/s (no padding)"
        self._progress.update(self._task, completed=step, note=note)
        if last or step % self.config.every == 0:
            self.write(step, values)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Append numbers to metrics.jsonl, and to wandb where it runs."""
        self.log.write({"step": step, **values})
        if self._wandb is not None:
            self._wandb.log(step, values)

    def say(self, text: str) -> None:
        """Print a line above the progress bar, on rank 0."""
        if distributed.is_rank0():
            self._progress.console.print(text, highlight=False, soft_wrap=True)


MEASURED = (
    *("loss", "learning_rate", "gradient_norm", "tokens", "samples", "step_seconds", "tokens_per_second", "mfu"),
    *("model_teraflops_per_second", "memory_peak_gib", "imbalance_compute"),
)
"""Values of a step that are read again; so are those with a "/" in their name."""

_LEAST = {
    **dict.fromkeys(("tokens", "samples", "tokens_per_second", "mfu", "model_teraflops_per_second", "memory_peak_gib"), 0.0),
    "step_seconds": 1e-9,
}
_MOST = 1e18
"""Bounds of what is summed, multiplied and divided by."""


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, oldest first.

    A killed run may leave a torn last line, and a machine that loses power a stretch of zero bytes: both are left out.

    Raises:
        DataError: another line is no JSON object with the number of a step and numbers.
    """
    path = run_dir / "metrics.jsonl"
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    lines = text.split("\n")[:-1]
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip("\0 "):
            continue
        try:
            values = parse_json(line.lstrip("\0"))
        except ValueError as error:
            raise DataError(f"{path}, line {number} is not JSON ({error}). Remove the line to read the others.") from error
        problems: list[str] = []
        found.append(_line(values, problems))
        if problems:
            raise DataError(f"{path}, line {number}: {' '.join(problems)} Remove the line to read the others.")
    return found


def _line(values: Any, problems: list[str]) -> dict[str, Any]:
    """A line with its measurements as floats (JSON has whole numbers of any size); `problems` takes what is wrong with it."""
    if not isinstance(values, dict):
        problems.append(f"got {show(values)}, expected an object.")
        return {}
    line = dict(values)
    step = read_typed(int, values.get("step"), "step", problems)
    if isinstance(step, int) and step < (least := 1 if "step_seconds" in values else 0):
        problems.append(f"step: got {step}, expected {least} or more.")
    for name, value in values.items():
        if fault := unusable_text(name):
            problems.append(f"the name {name!r:.60} {fault}.")
        if name in MEASURED or "/" in name:
            number = line[name] = read_typed(float, value, name, problems)
            if name in _LEAST and isinstance(number, float) and not _LEAST[name] <= number <= _MOST:
                problems.append(f"{name}: got {show(value)}, expected a number from {_LEAST[name]:g} to {_MOST:g}.")
    return line


def held_out_lines(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's held-out measurements, oldest first; of a step that was measured twice the later one."""
    lines = [line for line in read_metrics(run_dir) if any(name.startswith(("heldout/", "retrieval/")) for name in line)]
    by_step = {line["step"]: line for line in lines}
    return [by_step[step] for step in sorted(by_step)]


def held_out(run_dir: Path, step: int | None = None) -> tuple[dict[str, float], dict[str, float]]:
    """Held-out measurements before a run's first step and after `step`, or after its last; empty where there are none."""
    measured = held_out_lines(run_dir)
    if step is not None and measured:
        measured = [measured[0], *(line for line in measured[1:] if line["step"] == step)]
    if len(measured) < 2 or measured[0]["step"] != 0:  # continued from the checkpoint of another run
        return {}, {}
    before, after = ({name: value for name, value in line.items() if name != "step"} for line in (measured[0], measured[-1]))
    return before, after
