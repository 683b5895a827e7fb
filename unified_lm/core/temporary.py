"""What is written beside its target until it is complete: its name, and the removal of what a killed process left."""

from __future__ import annotations

import os
import re
import shutil
import socket
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path

BUILDING = "building"
"""What will take its target's place."""
OLD = "old"
"""The former target, for the moment between two renames."""

_LONGEST_NAME = 100
_LONGEST_ENDING = 16


def beside(target: Path, role: str) -> Path:
    """The path of this process's temporary sibling of a target: ``.NAME.HOST-PID.ROLE.EXTENSION``.

    Args:
        target: the file or folder to write.
        role: `BUILDING` or `OLD`.
    """
    ending = target.suffix if len(target.suffix) <= _LONGEST_ENDING else ""
    return target.with_name(f"{_stem(target)}{os.getpid()}.{role}{ending}")


def _stem(target: Path) -> str:
    """What the names of a target's siblings begin with on this host; a name near the limit of file systems is cut."""
    name = target.name
    if len(name.encode("utf-8", "surrogateescape")) > _LONGEST_NAME:
        digest = blake2b(name.encode("utf-8", "surrogateescape"), digest_size=4).hexdigest()
        name = f"{name[: _LONGEST_NAME // 4]}-{digest}"
    return f".{name}.{socket.gethostname()[:40]}-"


def sweep(target: Path) -> None:
    """Remove the temporary siblings of a target that dead processes of this host left.

    A process that was killed between moving a former target aside and moving the new one in left no target: then the former one
    is moved back. Siblings of other hosts stay, since nobody here knows whether their processes live.
    """
    left = re.compile(re.escape(_stem(target)) + rf"(\d+)\.({BUILDING}|{OLD})(\.[^.]*)?")
    for path in list(target.parent.iterdir()):
        match = left.fullmatch(path.name)
        if match is None or _is_alive(int(match[1])):
            continue
        with suppress(FileNotFoundError):  # another process sweeps the same
            if match[2] == OLD and not os.path.lexists(target):
                path.rename(target)
            elif path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # another user's; or no number that this package wrote
        return True
    return True
