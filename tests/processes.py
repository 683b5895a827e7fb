"""Groups of processes for tests: forked from one that has imported everything, so that a start costs a fraction of a second.

Importing torch, transformers, DeepSpeed and sentence-transformers takes ten seconds of a core, most small runs take one.
"""

from __future__ import annotations

import gc
import importlib.util
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing

from unified_lm.core import distributed

NEEDS_DEEPSPEED = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "unified_lm.assembly",
        "unified_lm.cli.main",
        "unified_lm.cli.script",
        "sentence_transformers",
        "deepspeed.runtime.zero.muon.muon_optimizer",  # DeepSpeed's engine imports it, and three seconds' worth of others
    ]
)


def any_slow(request: pytest.FixtureRequest) -> bool:
    """Whether slow tests of a fixture's module are to run, so that it has to prepare what only they need."""
    return any(item.path == request.path and item.get_closest_marker("slow") for item in request.session.items)


def run_on_ranks(job: Callable[[], Any], size: int, folder: Path, *, minutes: float = 2.0) -> list[Any]:
    """Run a job on every rank of a process group of its own.

    Args:
        job: a function of a module; what it returns must be something that `torch.save` takes.
        size: ranks.
        folder: where the ranks leave their results.
        minutes: the timeout of the process group.

    Returns:
        What each rank returned.
    """
    torch.multiprocessing.start_processes(
        _run_job, args=(size, _free_port(), str(folder), job, minutes), nprocs=size, start_method="forkserver"
    )
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in range(size)]


def _run_job(rank: int, size: int, port: int, folder: str, job: Callable[[], Any], minutes: float) -> None:
    _join(rank, size, port)
    distributed.initialize(timeout_minutes=minutes)
    torch.save(job(), Path(folder) / f"rank-{rank}.pt")
    distributed.shutdown()


class Child:
    """A function in a process of its own, forked from one in which nothing of the test has run; what it prints can be read.

    Args:
        function: a function of a module.
        arguments: of the function.
    """

    def __init__(self, function: Callable[..., None], *arguments: Any) -> None:
        reading, writing = CONTEXT.Pipe(duplex=False)
        self.process = CONTEXT.Process(target=_print_into, args=(writing, function, arguments))
        self.process.start()
        writing.close()
        self.stdout = os.fdopen(os.dup(reading.fileno()))
        reading.close()

    def kill(self) -> None:
        """SIGKILL, and wait."""
        self.process.kill()
        self.process.join()

    def wait(self, seconds: float = 120) -> int | None:
        """Wait for the end; returns the exit code, or None after that time."""
        self.process.join(seconds)
        return self.process.exitcode


def _print_into(writing: Any, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.dup2(writing.fileno(), 1)
    writing.close()
    torch.set_num_threads(1)
    function(*arguments)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _join(rank: int, size: int, port: int) -> None:
    gc.freeze()  # what was imported before the fork is not garbage; DeepSpeed collects several times per engine
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    os.environ["LOCAL_SIZE"] = str(size)  # without it DeepSpeed starts numactl for every bucket of gradients
    torch.set_num_threads(1)


class Group:
    """The ranks of one run, each a process of its own.

    Args:
        arguments: of `train.py`.
        size: ranks.
        log: where the output of all ranks goes.
        prepare: called with the rank in every process before training starts; a function of a module.
        agent_store: whether the store outlives the ranks, as torchrun's agent has it. Otherwise rank 0 hosts it.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        size: int,
        log: Path,
        prepare: Callable[[int], None] | None = None,
        agent_store: bool = False,
    ) -> None:
        port = _free_port()
        self.log = log
        if agent_store:
            self.store = torch.distributed.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        self.processes = [
            CONTEXT.Process(target=_train, args=(list(arguments), rank, size, port, str(log), prepare, agent_store))
            for rank in range(size)
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


def _train(
    arguments: list[str],
    rank: int,
    size: int,
    port: int,
    log: str,
    prepare: Callable[[int], None] | None,
    agent_store: bool,
) -> None:
    _join(rank, size, port)
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = str(agent_store)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    from unified_lm.cli.main import run_command
    from unified_lm.cli.script import train

    def command() -> None:
        if prepare is not None:
            prepare(rank)
        train(arguments)

    code = run_command(command)
    sys.stderr.flush()
    sys.exit(code)
