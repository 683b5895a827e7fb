"""The folder of an ablation: which of its runs are finished, have failed, or were started with other settings."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unified_lm.assembly.run_folder import refuse_foreign
from unified_lm.checkpoint.store import list_checkpoints, remove_checkpoints
from unified_lm.composition.convert import from_yaml
from unified_lm.composition.flat import flatten
from unified_lm.composition.locate import RESOLVED_NAME
from unified_lm.config.continuation import Change, change_of
from unified_lm.config.schema import ArmConfig, SweepConfig
from unified_lm.core.errors import CheckpointError, OutputError
from unified_lm.core.files import write_json
from unified_lm.core.user_files import parse_json
from unified_lm.models.precision import AUTO
from unified_lm.reporting.compare import SWEEP_FILE

FINISHED = "finished.json"
"""Written into an arm's folder when its last step is taken and measured."""
FAILED = "failed.json"
"""Written into an arm's folder when it fails, with the reason; removed when it finishes."""


@dataclass(frozen=True)
class Begun:
    """The state of an ablation's folder when it is run again.

    Attributes:
        finished: folders of runs that are finished.
        failed: folders of runs that failed, and have not finished since.
    """

    finished: frozenset[str]
    failed: frozenset[str]

    def order(self, sweep: SweepConfig) -> list[int]:
        """The numbers of the runs in the order to run them: finished ones, the recipe's order, and what failed before last.

        A run that fails may take the whole process with it (several ranks, memory): the others must still get their turn.
        """

        def rank(index: int) -> int:
            folder = sweep.arms[index].run.run_dir
            return 0 if folder in self.finished else 2 if folder in self.failed else 1

        return sorted(range(len(sweep.arms)), key=rank)


def begin(sweep: SweepConfig) -> Begun:
    """Write down the order of the arms, and look what is there.

    Raises:
        CheckpointError: an arm was started with other settings; all of them are named.
    """
    problems = [problem for arm in sweep.arms if (problem := _difference(arm)) is not None]
    if problems:
        raise CheckpointError(
            "\n".join([f"{sweep.run_dir} holds runs with other settings; nothing was changed.", *problems])
            + "\nUndo the change, remove the folders of these runs, or choose another run_dir."
        )
    _refuse_foreign(Path(sweep.run_dir) / SWEEP_FILE, {"recipe", "base", "arms"})
    for arm in sweep.arms:
        for name in (FINISHED, FAILED):
            _refuse_foreign(Path(arm.run.run_dir) / name, {"arm", "seed"})
    write_json(Path(sweep.run_dir) / SWEEP_FILE, {"recipe": sweep.recipe, "base": sweep.base, "arms": list(sweep.arm_names)})
    folders = [arm.run.run_dir for arm in sweep.arms]
    finished = frozenset(folder for folder in folders if (Path(folder) / FINISHED).is_file())
    failed = frozenset(folder for folder in folders if (Path(folder) / FAILED).is_file())
    return Begun(finished, failed - finished)


def _refuse_foreign(file: Path, keys: set[str]) -> None:
    """Raise where a file that lists the arms, or says how one ended, would replace one of the user's.

    Raises:
        OutputError: it would, or its folder is a file.
    """
    if (folder := file.parent).exists() and not folder.is_dir():
        raise OutputError(f"run_dir {folder} is a file; nothing was changed. Name a folder.")
    if not file.exists() and not file.is_symlink():
        return
    try:
        content = parse_json(file.read_bytes())
    except (OSError, ValueError):
        content = None
    if file.is_symlink() or not isinstance(content, dict) or not keys <= set(content):
        raise OutputError(f"{file} is not of an ablation of unified_lm; nothing was changed. Choose another run_dir.")


def mark_finished(folder: Path, arm: ArmConfig, *, keep: bool) -> None:
    """Mark an arm as finished, and remove its checkpoints (several times the size of the model) unless they are kept."""
    write_json(folder / FINISHED, {"arm": arm.name, "seed": arm.run.seed, "steps": arm.run.max_steps})
    (folder / FAILED).unlink(missing_ok=True)
    if not keep:
        remove_checkpoints(folder / "checkpoints")


def mark_failed(arm: ArmConfig, reason: str) -> None:
    """Write into an arm's folder why it failed; where the folder is not a run's, which is why then, it is left alone."""
    try:
        refuse_foreign(Path(arm.run.run_dir), arm.run.checkpoint.copy_to)
    except OutputError:
        return
    write_json(Path(arm.run.run_dir) / FAILED, {"arm": arm.name, "seed": arm.run.seed, "reason": reason})


def _difference(arm: ArmConfig) -> str | None:
    """How an arm differs from what its folder holds; None where it does not, or holds no step that could go on."""
    folder = Path(arm.run.run_dir)
    file = folder / RESOLVED_NAME
    if not file.is_file() or ((folder / FAILED).is_file() and not list_checkpoints(folder / "checkpoints")):
        return None
    before, now = (flatten(config) for config in (from_yaml(file), arm.run))
    changed = [
        key
        for key in {**before, **now}
        # the machine decided an "auto" when the arm started, and it keeps that
        if now.get(key) not in (before.get(key), AUTO) and change_of(key) is not Change.FREE
    ]
    if not changed:
        return None
    listed = ", ".join(f"{key} was {_show(before.get(key))}, is {_show(now.get(key))}" for key in changed[:8])
    more = f", and {len(changed) - 8} more" if len(changed) > 8 else ""
    return f"  {file.parent.name}: {listed}{more}"


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
