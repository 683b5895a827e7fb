"""The C allocator, told what training does with it."""

from __future__ import annotations

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
_KEPT = (1 << 31) - 1  # bytes: the most that mallopt's int takes
_LARGEST_ON_HEAP = 32 << 20  # bytes: the most that glibc accepts on 64-bit machines


def keep_freed_memory() -> bool:
    """Have the process keep freed memory for its next step instead of giving it back to the operating system.

    A training step on a CPU allocates and frees the same gigabytes of activations every time; by default glibc returns them
    at the end of the step and the next step faults every page in again (7 to 10 % of a step, docs/log.md). Does nothing
    outside Linux with glibc.

    Returns:
        Whether the allocator took the settings.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST_ON_HEAP)) and bool(mallopt(_M_TRIM_THRESHOLD, _KEPT))
