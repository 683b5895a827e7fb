"""Removal of lock files that a killed process leaves in torch's folder of compiled extensions.

`torch.utils.cpp_extension` marks a build, and every load of a finished one, with a lock file that only its creator removes.
DeepSpeed goes through it at every start, on the CPU too. If a process is killed at that moment, the next start waits forever.
The creator keeps the file open, so on Linux /proc shows whether it is still alive.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from filelock import FileLock
from torch.utils.cpp_extension import get_default_build_root

_LOCK = "lock"
_OLD_SECONDS = 600.0


def remove_stale_locks() -> list[Path]:
    """Remove the locks that no living process holds; returns their paths.

    Processes on other nodes are not visible. In a run on several nodes, which may share the folder, only a lock that is older
    than ten minutes counts as stale.
    """
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    if not root.is_dir() or not Path("/proc/self/fd").is_dir():
        return []
    world_size = os.environ.get("WORLD_SIZE", "1")
    several_nodes = os.environ.get("LOCAL_WORLD_SIZE", world_size) != world_size
    with FileLock(root / ".sweep.lock"):  # released by the kernel on exit, so it is never stale itself
        stale = [
            path
            for path in sorted(
                {*root.glob(f"*/{_LOCK}"), *root.glob(f"*/*/{_LOCK}")}
            )  # with and without the accelerator's name
            if not _is_held(path) and (not several_nodes or time.time() - path.stat().st_mtime > _OLD_SECONDS)
        ]
        for path in stale:
            path.unlink()
    return stale


def _is_held(path: Path) -> bool:
    """Whether any process on this machine whose /proc entry is readable has the file open."""
    target = str(path.resolve())
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if any(os.readlink(descriptor) == target for descriptor in (process / "fd").iterdir()):
                return True
        except OSError:  # the process has ended meanwhile, or belongs to another user
            continue
    return False
