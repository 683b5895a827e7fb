"""Locks that a killed process leaves in torch's folder of compiled extensions, where the next start would wait for ever.

`torch.utils.cpp_extension` marks a build (and every load of a finished one) by a file that only its maker removes; DeepSpeed
goes through it at every start, on the CPU too. A process killed in that moment never removes it. Its maker keeps the file open,
so Linux knows whether it still lives.
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
    """Remove the locks that no living process holds; returns them.

    Processes of other nodes cannot be seen. In a run of several nodes, which may share the folder, only a lock that is older
    than ten minutes is taken for stale.
    """
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    if not root.is_dir() or not Path("/proc/self/fd").is_dir():
        return []
    world_size = os.environ.get("WORLD_SIZE", "1")
    several_nodes = os.environ.get("LOCAL_WORLD_SIZE", world_size) != world_size
    with FileLock(root / ".sweep.lock"):  # the kernel releases it: while it is held, nobody else judges
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
    """Whether a process of this machine that we may look into has the file open."""
    target = str(path.resolve())
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if any(os.readlink(descriptor) == target for descriptor in (process / "fd").iterdir()):
                return True
        except OSError:  # it has ended meanwhile, or belongs to someone else
            continue
    return False
