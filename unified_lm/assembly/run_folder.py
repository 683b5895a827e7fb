"""The folder of a run: whose it is, and that one process at a time writes to it."""

from __future__ import annotations

import filecmp
import re
from pathlib import Path

from unified_lm.assembly.run_record import FILE_NAME as RECORD
from unified_lm.checkpoint.state import LATEST, saved_metrics, saved_settings, torn
from unified_lm.checkpoint.store import find_checkpoint, is_ours, list_checkpoints
from unified_lm.composition.locate import RESOLVED_NAME
from unified_lm.config.schema import RunConfig
from unified_lm.core.errors import CheckpointError, OutputError
from unified_lm.core.folder_lock import LOCK_FILE, hold_folder, release_folder
from unified_lm.core.outputs import check_folder
from unified_lm.core.user_files import parse_json
from unified_lm.engine.validation_items import FOLDER as ITEMS
from unified_lm.engine.wandb_run import RUN_FILE
from unified_lm.export.manifest import MERGED

EXPORT = "export"
"""The folder inside a run's folder that its export is written to."""

_METRICS, _CHECKPOINTS = "metrics.jsonl", "checkpoints"
_WRITTEN = (RESOLVED_NAME, RECORD, _METRICS, _CHECKPOINTS, ITEMS, RUN_FILE, EXPORT)
"""What a run writes into its folder."""


def occupy(config: RunConfig, run_dir: Path) -> str | None:
    """Check that a run may write to its folder and to that of its copies, and lock both for this process. Call it on one rank.

    Returns:
        A notice where the file system has no locks.

    Raises:
        OutputError: the run would write over what is not of a run, or cannot write there.
        CheckpointError: another process writes there, or the folder holds a run that is not the one to go on with.
    """
    _refuse(config, run_dir)
    folders = _folders(config, run_dir)
    notices = [notice for folder in folders if (notice := hold_folder(folder))]
    _refuse(config, run_dir)  # again: until the locks were held, another process may have run here
    return " ".join(notices) or None


def leave(config: RunConfig) -> None:
    """Give up the locks of `occupy`."""
    for folder in _folders(config, Path(config.run_dir)):
        release_folder(folder)


def _folders(config: RunConfig, run_dir: Path) -> list[Path]:
    copies = config.checkpoint.copy_to
    return [run_dir, *([Path(copies)] if copies else [])]


def _refuse(config: RunConfig, run_dir: Path) -> None:
    refuse_foreign(run_dir, config.checkpoint.copy_to)
    if config.checkpoint.copy_to:
        _refuse_foreign_copies(Path(config.checkpoint.copy_to))
    if config.export.enabled:
        starts = [Path(name) for name in (config.model.init_from, config.model.name, config.model.tokenizer) if name]
        check_folder(run_dir / EXPORT, MERGED, [*starts, *(start / EXPORT for start in starts)])
    _refuse_to_overwrite(config, run_dir)
    _refuse_to_mix_copies(config, run_dir)


def refuse_foreign(run_dir: Path, copies: str | None = None) -> None:
    """Raise where files of the user's have the names of those that a run writes, in a folder that is not a run's.

    Args:
        run_dir: the folder.
        copies: where copies of its checkpoints are, or None.

    Raises:
        OutputError: there are some, or `run_dir` is a file.
    """
    if run_dir.exists() and not run_dir.is_dir():
        raise OutputError(f"run_dir {run_dir} is a file; nothing was changed. Name a folder.")
    if run_dir.is_symlink() and not run_dir.exists():
        raise OutputError(f"run_dir {run_dir} is a link to a folder that is not there; nothing was changed.")
    if _is_of_run(run_dir):
        return
    found = [name for name in _WRITTEN if _is_taken(run_dir / name)]
    if (run_dir / LOCK_FILE).is_file() and found == [_METRICS] and _is_of_a_start(run_dir / _METRICS, copies):
        return  # a start that was killed before it wrote its record
    if found:
        raise OutputError(
            f"run_dir {run_dir} is not the folder of a run, and holds {', '.join(found)}, which a run would write over; "
            "nothing was changed. Choose another run_dir."
        )


def _is_of_run(run_dir: Path) -> bool:
    """Whether a run of this package has written here before; that one has only locked the folder does not say so."""
    if any(map(is_ours, list_checkpoints(run_dir / _CHECKPOINTS))):
        return True
    if not (run_dir / RECORD).is_file():
        return False
    try:
        record = parse_json((run_dir / RECORD).read_bytes())
    except ValueError:
        return False
    return isinstance(record, dict) and {"recipe", "starts"} <= set(record)


def _is_of_a_start(metrics: Path, copies: str | None) -> bool:
    """Whether a start made a file of metrics before it wrote its record: an empty one, or that of a copy to go on from."""
    if metrics.is_symlink() or not metrics.is_file():
        return False
    saved = [copy / _METRICS for copy in list_checkpoints(Path(copies)) if is_ours(copy)] if copies else []
    same = (path.is_file() and filecmp.cmp(path, metrics, shallow=False) for path in saved)
    return metrics.stat().st_size == 0 or any(same)


def _is_taken(path: Path) -> bool:
    return path.exists() or path.is_symlink()


def _refuse_foreign_copies(copies: Path) -> None:
    """Raise where a file of the user's has the name of the pointer to the newest copy.

    Raises:
        OutputError: there is one, or `copies` is a file.
    """
    if copies.exists() and not copies.is_dir():
        raise OutputError(f"checkpoint.copy_to {copies} is a file; nothing was changed. Name a folder.")
    latest = copies / LATEST
    if _is_taken(latest) and (latest.is_symlink() or not latest.is_file() or not _names_checkpoint(latest)):
        raise OutputError(
            f"{latest} is not of this package, and copies of checkpoints would write over it; nothing was changed. "
            "Choose another checkpoint.copy_to."
        )


def _names_checkpoint(pointer: Path) -> bool:
    return bool(re.fullmatch(rb"step-[0-9]+\n?", pointer.read_bytes()[:100]))


def _refuse_to_overwrite(config: RunConfig, run_dir: Path) -> None:
    """Raise when a folder holds a run that this one would write over.

    Raises:
        CheckpointError: `run_dir` holds a run that is not the one to resume, or checkpoints newer than the one to resume.
    """
    metrics = run_dir / _METRICS
    own = list_checkpoints(run_dir / _CHECKPOINTS)
    used = bool(own) or (metrics.exists() and metrics.stat().st_size > 0)
    if config.resume == "auto" or not used:
        return
    chosen = find_checkpoint(config.resume, run_dir / _CHECKPOINTS).path
    inside = [path.resolve() for path in own]
    if chosen is None or chosen.resolve() not in inside:
        raise CheckpointError(
            f"run_dir {run_dir} already holds a run; nothing was changed. "
            "Continue it with resume=auto, or choose another run_dir."
        )
    newer = inside[inside.index(chosen.resolve()) + 1 :]
    if newer:
        raise CheckpointError(
            f"run_dir {run_dir} has checkpoints newer than {chosen.name} ({', '.join(path.name for path in newer)}); "
            "nothing was changed. Resume into another run_dir, or remove them first."
        )


def _refuse_to_mix_copies(config: RunConfig, run_dir: Path) -> None:
    """Raise when a run would put its copies among those of another, where either would remove the other's.

    Raises:
        CheckpointError: `checkpoint.copy_to` holds checkpoints, and the run is a new one or certainly not theirs.
    """
    folder, own = config.checkpoint.copy_to, list_checkpoints(run_dir / _CHECKPOINTS)
    copies = list_checkpoints(Path(folder)) if folder else []
    if not copies:
        return
    if config.resume == "none":
        raise CheckpointError(
            f"checkpoint.copy_to {folder} already holds checkpoints of a run; nothing was changed. "
            "Continue it with resume=auto, or choose another folder."
        )
    here = _first_step(run_dir / _METRICS, saved_metrics(own[-1])) if own and torn(own[-1]) is None else None
    other = [copy for copy in copies if own and torn(copy) is None and _is_of_another_run(copy, config, here)]
    if config.resume != "auto":
        chosen = find_checkpoint(config.resume, run_dir / _CHECKPOINTS).path
        if chosen is None or chosen.resolve() not in (path.resolve() for path in (*own, *copies)):
            other = copies  # the run branches off from a third place
    if other:
        raise CheckpointError(
            f"checkpoint.copy_to {folder} already holds checkpoints of another run ({', '.join(copy.name for copy in other)}), "
            "which copies of this one would replace; nothing was changed. Choose another folder; or, to go on from these, "
            "resume=auto and a run_dir without checkpoints."
        )


def _is_of_another_run(copy: Path, config: RunConfig, here: bytes | None) -> bool:
    """Whether a complete copy is certainly not of a run that has checkpoints, wherever that was when the copy was made.

    A run may go on in another place, from its copies alone; what stays is its metrics, of which a copy holds those until then.

    Args:
        copy: the copy.
        config: the run.
        here: `_first_step` of the run.
    """
    there = _first_step(copy / _METRICS, saved_metrics(copy))
    if here and there:
        return here != there
    return (saved_settings(copy) or {}).get("recipe", config.recipe) != config.recipe


def _first_step(metrics: Path, num_bytes: int) -> bytes | None:
    """What a file of metrics says of the first step, the time that it took included: no two runs have the same line.

    Only of its first bytes: a start that was killed may have left lines behind them, which a resume cuts off.
    """
    if not metrics.is_file():
        return None
    with open(metrics, "rb") as file:
        lines = file.read(num_bytes).splitlines(keepends=True)
    return next((line for line in lines if b'"step_seconds"' in line and line.endswith(b"\n")), None)
