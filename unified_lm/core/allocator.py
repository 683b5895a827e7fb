"""Settings of the C allocator for training on a CPU."""

from __future__ import annotations

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
_TRIM_THRESHOLD = (1 << 31) - 1  # bytes: the largest value of mallopt's int
_MMAP_THRESHOLD = 32 << 20  # bytes: the largest value that glibc accepts on 64-bit machines


def keep_freed_memory() -> bool:
    """Keep freed memory in the process for the next step instead of returning it to the operating system.

    A training step on a CPU allocates and frees the same gigabytes of activations every time. By default glibc returns them at
    the end of the step, and the next step takes a page fault for every page (7 to 10 % of a step, docs/log.md). Does nothing
    outside Linux with glibc.

    Returns:
        Whether the allocator took the settings.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD)) and bool(mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD))
