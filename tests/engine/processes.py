"""Groups of training processes for tests: started from one that has imported everything, so that a start costs a second."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

NEEDS_DEEPSPEED = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["unified_lm.assembly", "unified_lm.cli.script"])


class Group:
    """The ranks of one run, each a process of its own.

    Args:
        arguments: of `train.py`.
        size: ranks.
        log: where the output of all ranks goes.
        prepare: called with the rank in every process before training starts; a function of a module.
    """

    def __init__(self, arguments: Sequence[str], size: int, log: Path, prepare: Callable[[int], None] | None = None) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.log = log
        self.processes = [
            _CONTEXT.Process(target=_train, args=(list(arguments), rank, size, port, str(log), prepare)) for rank in range(size)
        ]
        for process in self.processes:
            process.start()

    def kill(self) -> None:
        """SIGKILL every rank."""
        for process in self.processes:
            process.kill()
        self.wait()

    def signal(self, number: int, rank: int) -> None:
        """Send a signal to one rank."""
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def wait(self, seconds: float = 120) -> list[int | None]:
        """Wait for every rank; returns the exit codes. Ranks that are still there at the end of the time are killed."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        hung = [rank for rank, process in enumerate(self.processes) if process.exitcode is None]
        for process in self.processes:
            process.kill()
            process.join()
        assert not hung, f"ranks {hung} were still running after {seconds} s:\n{self.output()}"
        return [process.exitcode for process in self.processes]

    @property
    def running(self) -> bool:
        """Whether any rank still runs."""
        return any(process.exitcode is None for process in self.processes)

    def output(self) -> str:
        """What all ranks have printed."""
        return self.log.read_text() if self.log.exists() else ""


def _train(arguments: list[str], rank: int, size: int, port: int, log: str, prepare: Callable[[int], None] | None) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    import torch

    from unified_lm.cli.main import run_command
    from unified_lm.cli.script import train

    torch.set_num_threads(1)
    if prepare is not None:
        prepare(rank)
    code = run_command(lambda: train(arguments))
    sys.stderr.flush()
    sys.exit(code)
