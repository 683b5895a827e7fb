"""Hashing and checking large files once per machine, where several ranks of a run need it.

At a start every rank must know the hash of every data file and that every cached table is intact. Eight ranks that each read
everything, behind one another's locks, wait minutes for what one of them knows already. So within `reading_once` the first rank
of a machine that gets to a file reads it, and leaves the result in the cache, with the name of this start and the file's
identity. Another start reads again: a stamp never vouches for a file longer than the start that wrote it.
"""

from __future__ import annotations

import json
import platform
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from unified_lm.core import distributed
from unified_lm.core.agreement import broadcast_object
from unified_lm.core.errors import DataError

_start: str | None = None  # name of the start under way; None: nobody to share with


@contextmanager
def reading_once() -> Iterator[None]:
    """Within it, ranks of a machine share what `once` finds. Collective; alone it changes nothing."""
    global _start
    before = _start
    _start = broadcast_object(secrets.token_hex(8)) if distributed.world_size() > 1 else None
    try:
        yield
    finally:
        _start = before


def once(stamp: Path, files: Sequence[Path], work: Callable[[], str]) -> str:
    """The result of reading files: from this process, or within `reading_once` from the first of this machine.

    Args:
        stamp: a path in the cache, for what this is about; stamps get names that begin with it.
        files: what is read. A file that has changed since is read again.
        work: reads them; if it raises, nothing is kept, and the next process reads for itself.

    Raises:
        DataError: the cache cannot be written.
        OSError: one of the files cannot be read.
    """
    if _start is None:
        return work()
    known = {"start": _start, "files": [identity(file) for file in files]}
    # per machine, because device and inode numbers mean nothing on another one
    place = stamp.with_name(f"{stamp.name}.{platform.node()}.read")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{place}.lock")
        lock.acquire()
    except OSError as error:
        raise _unwritable(place, error) from error
    try:
        if (found := _result(place, known)) is not None:
            return found
        result = work()
        building = place.with_name(f"{place.name}.new")  # the lock is held: what a killed process left here is written over
        try:
            building.write_text(json.dumps({**known, "result": result}), encoding="utf-8")
            building.replace(place)
        except OSError as error:
            building.unlink(missing_ok=True)
            raise _unwritable(place, error) from error
        return result
    finally:
        lock.release()


def _unwritable(place: Path, error: OSError) -> DataError:
    return DataError(f"cannot write the cache, {place}: {error.strerror or error}. Make room there, or set UNIFIED_LM_CACHE.")


def identity(file: Path) -> list[int]:
    """What changes when a file is written anew: device, inode, size and time."""
    state = file.stat()
    return [state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns]


def _result(place: Path, known: Mapping[str, object]) -> str | None:
    """The result of a stamp of this start; None without one. A stamp that cannot be read is none."""
    try:
        content = json.loads(place.read_text(encoding="utf-8"))
        result = content.pop("result")
    except (OSError, ValueError, KeyError, AttributeError):
        return None
    return result if content == known and isinstance(result, str) else None
