"""A lock on a folder that lasts as long as the process that holds it."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from pathlib import Path

from unified_lm.core.errors import CheckpointError

LOCK_FILE = ".unified_lm.lock"
"""Name of the lock's file. It stays in the folder; only the operating system's lock on it counts, not that it is there."""

_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)

_held: dict[Path, int] = {}
"""Folder -> open descriptor of its lock file, of this process."""


def hold_folder(folder: Path) -> str | None:
    """Lock a folder until `release_folder`, or until this process ends in whatever way, SIGKILL included.

    The lock is the kernel's (`flock`), so it leaves nothing behind to be removed. Children that are started with exec do not
    inherit it. A process that holds a folder already may ask again.

    Args:
        folder: created if needed.

    Returns:
        None, or a notice where the file system has no locks and nothing is held.

    Raises:
        CheckpointError: another process holds it.
        OSError: the folder or the lock's file cannot be written.
    """
    folder = folder.resolve()
    if folder in _held:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
        os.close(descriptor)
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise CheckpointError(
                f"{folder} is in use by another process ({holder or 'unknown'}); nothing was changed. "
                "Wait for it or stop it, or choose another folder. The lock ends with that process."
            ) from error
        if error.errno in _UNSUPPORTED:
            return f"{folder}: its file system has no locks ({error.strerror}); take care that no other process writes there."
        raise
    os.ftruncate(descriptor, 0)
    os.pwrite(
        descriptor, f"process {os.getpid()} on {socket.gethostname()}, {time.strftime('%Y-%m-%d %H:%M:%S')}\n".encode(), 0
    )
    _held[folder] = descriptor
    return None


def release_folder(folder: Path) -> None:
    """Give up the lock on a folder, if this process holds it."""
    descriptor = _held.pop(folder.resolve(), None)
    if descriptor is not None:
        os.close(descriptor)
