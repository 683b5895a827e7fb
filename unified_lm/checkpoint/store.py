"""The checkpoints of a run: finding the one to resume, removing old ones, and copying them to a second location.

A folder under its final name that matches its index is complete. Anything else that a killed run left is either skipped with a
reason (an incomplete folder), or removed (a folder that was being written or removed).
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from unified_lm.checkpoint.state import LATEST, PREFIX, STATE, torn
from unified_lm.core.errors import CheckpointError
from unified_lm.core.files import write_directory, write_text
from unified_lm.core.temporary import BUILDING, OLD

_METRICS = "metrics.jsonl"
_UNFINISHED = re.compile(rf"\.{PREFIX}[0-9]+\.(.*\.)?({BUILDING}|{OLD}|removing)")
"""Names of folders that are being written, replaced or removed."""


@dataclass(frozen=True)
class Found:
    """The result of a search for a checkpoint.

    Attributes:
        path: the checkpoint to resume, or None.
        notices: messages for the user: folders that were skipped, with the reason, or the use of a copy.
    """

    path: Path | None
    notices: tuple[str, ...] = ()


def list_checkpoints(folder: Path) -> list[Path]:
    """Folders under `folder` that are named like checkpoints, oldest first. `state.torn` says whether one is complete."""
    return sorted(path for path in folder.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit() and path.is_dir())


def is_ours(path: Path) -> bool:
    """Whether a folder that is named like a checkpoint is one: it has an index, which comes first into view with the folder."""
    return (path / STATE).is_file() and not path.is_symlink()


def find_checkpoint(resume: str, folder: Path, copies: Path | None = None) -> Found:
    """Find the checkpoint that `resume` names.

    Args:
        resume: "none", "auto" (the newest complete one under `folder`, or else under `copies`, if there is any), or the path of
            a checkpoint, of a run, or of a folder of checkpoints.
        folder: contains this run's checkpoints.
        copies: contains the copies of them.

    Raises:
        CheckpointError: the path has no complete checkpoint.
    """
    if resume == "none":
        return Found(None)
    if resume == "auto":
        found = _newest_complete(folder)
        if found.path is not None or copies is None:
            return found
        copied = _newest_complete(copies)
        notice = () if copied.path is None else (f"no checkpoint in {folder}; using the copy {copied.path}",)
        return Found(copied.path, (*found.notices, *copied.notices, *notice))
    return _named(resume)


def _named(resume: str) -> Found:
    path = Path(resume)
    if path.name.startswith(PREFIX):
        reason = torn(path)
        if reason is None:
            return Found(path)
        raise CheckpointError(f"resume={resume} is not a complete checkpoint: {reason}. Resume from another one.")
    for folder in (path / "checkpoints", path):
        found = _newest_complete(folder)
        if found.path is not None:
            return found
    raise CheckpointError(
        f"resume={resume} is not a checkpoint: expected a folder named {PREFIX}..., or a run with checkpoints/. "
        "Use resume=auto to continue from the newest checkpoint of run_dir."
    )


def _newest_complete(folder: Path) -> Found:
    notices: list[str] = []
    # By name and completeness, not by the pointer: a run killed between renaming and writing it has an outdated pointer.
    for path in reversed(list_checkpoints(folder)):
        reason = torn(path)
        if reason is None:
            return Found(path, tuple(notices))
        notices.append(f"checkpoint {path} is torn and skipped: {reason}")
    return Found(None, tuple(notices))


def remove_unfinished(folder: Path) -> list[Path]:
    """Remove the folders that a killed run was writing or removing; returns their paths.

    Raises:
        CheckpointError: a folder could not be removed.
    """
    unfinished = sorted(path for path in folder.glob(f".{PREFIX}*") if _UNFINISHED.fullmatch(path.name))
    for path in unfinished:
        _remove(path)
    return unfinished


def prune(folder: Path, keep_last: int, keep_every: int, protected: Collection[Path] = ()) -> None:
    """Remove all but the newest checkpoints.

    Args:
        folder: contains the checkpoints.
        keep_last: how many of the newest to keep.
        keep_every: also keep those whose step is a multiple of this; 0: none.
        protected: checkpoints that must not be removed now.

    Raises:
        CheckpointError: a folder could not be removed.
    """
    for old in list_checkpoints(folder)[: -max(1, keep_last)]:
        step = int(old.name.removeprefix(PREFIX))
        if is_ours(old) and old not in protected and not (keep_every and step % keep_every == 0):
            # Renamed first, so that an interrupted removal leaves no folder that looks like a checkpoint.
            _remove(old.rename(old.with_name(f".{old.name}.removing")))


def remove_checkpoints(folder: Path) -> None:
    """Remove all checkpoints of a folder, and the folder if nothing else is in it.

    Raises:
        CheckpointError: a folder could not be removed.
    """
    if not folder.is_dir():
        return
    for path in filter(is_ours, list_checkpoints(folder)):
        _remove(path)
    (folder / LATEST).unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()


def _remove(path: Path) -> None:
    try:
        shutil.rmtree(path)
    except OSError as error:
        raise CheckpointError(f"could not remove {path}: {error}. No checkpoint is lost.") from error


def restore_metrics(checkpoint: Path, run_dir: Path) -> None:
    """Restore the metrics of a lost run folder from a copy of its checkpoint; does nothing if the run has metrics.

    Those of a folder without checkpoints are of a start that was killed before its first one, and are replaced.
    """
    saved = checkpoint / _METRICS
    if saved.is_file() and not ((run_dir / _METRICS).exists() and list_checkpoints(run_dir / "checkpoints")):
        write_text(run_dir / _METRICS, saved.read_text(encoding="utf-8"))


@dataclass
class CheckpointCopier:
    """Copies checkpoints to a second location, one after another, while training continues. Use it on one rank.

    A copy that has not started when a newer checkpoint is submitted is skipped, because only the newest is needed.

    Attributes:
        target: the second location.
        keep_last: number of copies to keep.
        keep_every: copies whose step is a multiple of this are kept too; 0: none.
    """

    target: Path
    keep_last: int
    keep_every: int
    # One thread: copies of a slow disk must not overtake each other.
    _pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="copy"))
    _running: dict[Path, Future[None]] = field(default_factory=dict)

    def submit(self, checkpoint: Path, metrics: Path) -> None:
        """Queue a copy of a complete checkpoint, with the run's current metrics."""
        for future in self._running.values():
            future.cancel()
        # Read now: when the copy starts, the file may already have lines of later steps.
        content = metrics.read_bytes() if metrics.exists() else b""
        self._running[checkpoint] = self._pool.submit(self._copy, checkpoint, content)

    @property
    def busy(self) -> set[Path]:
        """Checkpoints that must not be removed yet."""
        return {path for path, future in self._running.items() if not future.done()}

    def problems(self) -> list[str]:
        """Warnings for copies that failed since the last call; a failed copy does not end the run."""
        done = {path: future for path, future in self._running.items() if future.done()}
        texts = []
        for path, future in done.items():
            del self._running[path]
            error = None if future.cancelled() else future.exception()
            if error is not None:
                texts.append(f"warning: {path.name} was not copied to {self.target}: {error}")
        return texts

    def close(self) -> list[str]:
        """Wait for running copies; returns their warnings."""
        self._pool.shutdown(wait=True)
        return self.problems()

    def _copy(self, checkpoint: Path, metrics: bytes) -> None:
        def fill(building: Path) -> None:
            """Copy the checkpoint's files and the metrics that belong to it into `building`."""
            for path in checkpoint.iterdir():
                shutil.copyfile(path, building / path.name)
            (building / _METRICS).write_bytes(metrics)

        copy = self.target / checkpoint.name
        if copy.is_symlink() or (copy.exists() and not is_ours(copy)):
            raise CheckpointError(f"{copy} exists and is not a checkpoint; it is left as it is.")
        write_directory(copy, fill)
        write_text(self.target / LATEST, f"{checkpoint.name}\n")
        prune(self.target, self.keep_last, self.keep_every)
