"""Atomic, durable writes of files and folders, and the cache folder."""

from __future__ import annotations

import json
import os
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unified_lm.core.errors import CheckpointError
from unified_lm.core.temporary import BUILDING, OLD, beside, sweep
from unified_lm.core.user_files import naming, refusal, user_path

if TYPE_CHECKING:
    import numpy as np


_MARK = b"unified_lm crc32"
_READ_BYTES = 1 << 22


def cache_dir(*parts: str) -> Path:
    """The folder for files that can be regenerated: ``$UNIFIED_LM_CACHE`` or ``~/.cache/unified_lm``, plus `parts`."""
    root = os.environ.get("UNIFIED_LM_CACHE")
    return user_path(root or "~/.cache/unified_lm").joinpath(*parts)


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk (fsync).

    Raises:
        OSError: the disk reported an error.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _folders_above(path: Path) -> Iterator[None]:
    """Make the folders that a path lies in; an error inside removes those of them that are still empty."""
    made = [folder for folder in path.parents if not os.path.exists(folder)]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()
        raise


def write_directory(target: Path, fill: Callable[[Path], None]) -> None:
    """Fill a temporary sibling folder, flush it to disk, then rename it to `target`.

    After a crash or on a full disk `target` is unchanged, and an exception removes the half-written sibling. An existing
    `target` is replaced only once the new one is complete.

    Args:
        target: the folder to create or replace.
        fill: writes the content into the folder that it receives.

    Raises:
        CheckpointError: the operating system refused to write (disk full, no permission).
    """
    building = beside(target, BUILDING)
    with _folders_above(target):
        sweep(target)
        shutil.rmtree(building, ignore_errors=True)
        try:
            building.mkdir()
            fill(building)
            commit_directory(building, target)
        except Exception as error:
            if (refused := refusal(error)) is None:
                raise
            said = refused.strerror or str(refused)
            raise CheckpointError(f"could not write {target}: {said}. What was there before is untouched.") from error
        finally:
            shutil.rmtree(building, ignore_errors=True)


def commit_directory(building: Path, target: Path, flush: Callable[[Path], None] = sync) -> None:
    """Flush a filled folder to disk, then rename it to `target`; a previous `target` is removed afterwards.

    Args:
        building: the folder.
        target: its place.
        flush: `sync`, or what calls it.

    Raises:
        OSError: the disk reported an error; `target` is unchanged.
    """
    # Content before name: after a power failure a renamed folder whose files were not flushed could hold empty files.
    for path in (*building.rglob("*"), building):
        flush(path)
    _replace_directory(building, target)


def _replace_directory(new: Path, target: Path) -> None:
    # A folder cannot be renamed over a folder that is not empty, so the old one is moved aside first.
    old = beside(target, OLD)
    if target.exists():
        target.rename(old)
    try:
        new.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    sync(target.parent)  # the rename itself is an entry of the parent folder
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def replacing(path: Path, before_rename: Callable[[Path], None] = lambda _: None, *, durable: bool = True) -> Iterator[Path]:
    """A temporary sibling to write, with the same extension: renamed to `path` once the block has ended, durable.

    Args:
        path: the file.
        before_rename: called with the complete sibling; what it raises leaves `path` as it was.
        durable: False for one of many files: the caller flushes them together, and removes what killed processes left. Until
            then a power failure may leave `path` with any content.

    Raises:
        OSError: the disk reported an error, which names `path`; what was there before is untouched and no partial file remains.
    """
    building = beside(path, BUILDING)
    with _folders_above(path):
        try:
            with naming(path, building):
                if durable:
                    sweep(path)
                yield building
                if durable:
                    sync(building)
                before_rename(building)
                building.replace(path)
        finally:
            building.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a small text file in UTF-8 atomically (temporary sibling, fsync, rename)."""
    with replacing(path) as building:
        building.write_bytes(text.encode())


def checksum(path: Path, num_bytes: int | None = None) -> int:
    """CRC-32 of a file, or of its first bytes. It finds flipped and lost bytes, at about a gigabyte per second."""
    value, left = 0, path.stat().st_size if num_bytes is None else num_bytes
    with open(path, "rb") as handle:
        while left > 0 and (block := handle.read(min(left, _READ_BYTES))):
            value = zlib.crc32(block, value)
            left -= len(block)
    return value


def read_array(path: Path) -> np.ndarray | None:
    """Memory-map an array of `write_array`; None if there is none, or, with a warning, if the file is damaged.

    Raises:
        OSError: the file cannot be read.
    """
    import numpy as np

    if not path.is_file():
        return None
    size = path.stat().st_size - len(_MARK) - 4
    with open(path, "rb") as handle:
        handle.seek(max(size, 0))
        end = handle.read()
    if size > 0 and end == _MARK + checksum(path, size).to_bytes(4, "little"):
        try:
            values: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
            return values
        except ValueError as error:  # the checksum is right, but not of a file that this numpy reads
            problem = str(error)
    else:
        problem = "its content does not have its checksum"
    warnings.warn(f"{path} is damaged ({problem}); it is computed again", stacklevel=2)
    return None


def write_array(path: Path, values: np.ndarray) -> None:
    """Write a .npy file with a checksum atomically (temporary sibling, fsync, rename); its folder must exist.

    The checksum stands behind the array, where readers of .npy files do not look. `read_array` compares it.

    Raises:
        OSError: the disk reported an error; no partial file remains.
    """
    import numpy as np  # here, because `unified-lm --help` imports this module and should not wait for numpy

    with replacing(path) as building, open(building, "wb") as handle:
        np.save(handle, values)
        handle.flush()
        handle.write(_MARK + checksum(building).to_bytes(4, "little"))


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically, indented, with a final newline."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
