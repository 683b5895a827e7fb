"""A worker gets SIGTERM when the agent that started it is killed; without an agent it is left alone."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from unified_lm.core.distributed import local_device
from unified_lm.core.errors import UserError

# the agent starts a worker in a session of its own, as torchrun does, and waits to be killed
AGENT = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", sys.argv[1], sys.argv[2]], start_new_session=True)
time.sleep(60)
"""
WORKER = """
import pathlib, signal, sys, time
from unified_lm.core.distributed import terminate_with_agent
folder = pathlib.Path(sys.argv[1])
signal.signal(signal.SIGTERM, lambda *_: ((folder / "stopped").touch(), sys.exit(0)))
terminate_with_agent()
(folder / "ready").touch()
time.sleep(10)
(folder / "outlived").touch()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's own signal, Linux only")
@pytest.mark.parametrize("launched", [True, False])
def test_a_worker_follows_its_agent(tmp_path, launched):
    env = {name: value for name, value in os.environ.items() if name != "TORCHELASTIC_RUN_ID"}
    worker = WORKER if launched else WORKER.replace("time.sleep(10)", "time.sleep(1)")
    agent = subprocess.Popen(
        [sys.executable, "-c", AGENT, worker, str(tmp_path)], env={**env, "TORCHELASTIC_RUN_ID": "a"} if launched else env
    )
    wait_for(tmp_path / "ready")
    agent.kill()
    agent.wait()
    wait_for(tmp_path / ("stopped" if launched else "outlived"))
    assert not (tmp_path / ("outlived" if launched else "stopped")).exists()


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert local_device() == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match=r"number 3 of its machine \(LOCAL_RANK=2\), which shows it 2 GPUs.*--nproc-per-node 2"):
        local_device()


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, path.name
        time.sleep(0.02)
