"""A worker ends with the torchrun agent that started it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def follow_agent() -> None:
    """Ask the kernel for SIGTERM when torchrun's agent dies. Without an agent, or not on Linux, nothing happens.

    Workers run in sessions of their own, so nothing else tells them: they would train on, unseen, while the run is started
    again in the same folder. SIGTERM lets them save first (`engine.interruption`).
    """
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
