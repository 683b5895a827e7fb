"""Two nodes rehearsed as two torchrun agents on loopback: one dies, the other reports it and ends, the restart resumes."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

psutil = pytest.importorskip("psutil")

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
STEPS = 8
COMMON = [
    "recipe=grit_smollm2",
    "model=tiny_random",
    "model.attention_dropout=0.1",
    f"max_steps={STEPS}",
    "checkpoint.every=2",
    "validation.num_batches=1",
    "~validation.retrieval",
    "export.enabled=false",
    "logging.progress=false",
    "parallel.timeout_minutes=0.5",
]
START_LIMIT = 120  # seconds until a run has taken its first steps, on a busy machine
EXIT_LIMIT = 60  # seconds from the death of a node until the other one has ended: the timeout of a collective, and some


class Node:
    """One torchrun agent with its worker, through launch/multi_node.sh."""

    def __init__(self, port: int, arguments: list[str], output: Path) -> None:
        env = {
            **os.environ,
            "PYTHON": sys.executable,
            "NNODES": "2",
            "NPROC_PER_NODE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "RUN_ID": f"rehearsal-{port}",
            "OMP_NUM_THREADS": "1",
        }
        self.output = output
        with open(output, "w") as file:
            command = ["bash", str(LAUNCH / "multi_node.sh"), *arguments]
            self.process = subprocess.Popen(command, env=env, stdout=file, stderr=file, start_new_session=True)

    def family(self) -> list[psutil.Process]:
        """The script, its agent and its worker."""
        try:
            script = psutil.Process(self.process.pid)
            return [script, *script.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def freeze(self) -> None:
        """SIGSTOP to all of it, as a cut network cable would: nothing is closed, nothing answers."""
        for member in self.family():
            member.suspend()

    def kill(self) -> None:
        """SIGKILL to all of it at once, as a power cut would."""
        self.freeze()  # or the agent would still end its worker in an orderly way, and say so
        for member in self.family():
            member.kill()
        self.process.wait(timeout=10)

    def text(self) -> str:
        return self.output.read_text(errors="replace")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def nodes(tmp_path) -> Iterator:
    """Starts a pair of nodes; what is left of them at the end is killed."""
    started: list[Node] = []

    def start(arguments: list[str]) -> list[Node]:
        port = free_port()
        pair = [Node(port, arguments, tmp_path / f"output-{len(started)}-{rank}") for rank in range(2)]
        started.extend(pair)
        return pair

    yield start
    for node in started:
        for member in node.family():
            member.kill()


def steps_taken(run_dir: Path) -> int:
    metrics = run_dir / "metrics.jsonl"
    return metrics.read_text().count('"step_seconds"') if metrics.exists() else 0


def wait_for(condition, limit: float, pair: list[Node]) -> None:
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline, [node.text()[-3000:] for node in pair]
        assert all(node.process.poll() is None for node in pair), [node.text()[-3000:] for node in pair]
        time.sleep(0.01)


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    folder = run_dir / "checkpoints" / f"step-{STEPS:08d}"
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("optimizer*.safetensors")):
        tensors |= load_file(file)
    assert tensors
    return tensors


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "zero2"])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_dead_node_is_reported_and_the_restart_ends_with_the_same_parameters(nodes, tmp_path, parallel, victim):
    if parallel != "ddp":
        pytest.importorskip("deepspeed")
    arguments = [*COMMON, f"parallel={parallel}"]
    whole = nodes([*arguments, f"run_dir={tmp_path}/whole"])
    assert [node.process.wait(timeout=START_LIMIT) for node in whole] == [0, 0], [node.text()[-3000:] for node in whole]

    run_dir = tmp_path / "run"
    pair = nodes([*arguments, f"run_dir={run_dir}"])
    wait_for(lambda: steps_taken(run_dir) >= 3, START_LIMIT, pair)
    pair[victim].kill()
    survivor = pair[1 - victim]
    killed = time.monotonic()
    code = survivor.process.wait(timeout=EXIT_LIMIT)
    seconds = time.monotonic() - killed
    assert code != 0
    assert any(word in survivor.text() for word in ("Connection closed by peer", "Connection reset", "rank", "Broken pipe"))
    print(f"{parallel}: node {victim} killed; the other one ended after {seconds:.1f} s with exit code {code}")
    assert not (run_dir / "checkpoints" / f"step-{STEPS:08d}").exists(), "killed before the end"

    again = nodes([*arguments, f"run_dir={run_dir}", "resume=auto"])
    assert [node.process.wait(timeout=START_LIMIT) for node in again] == [0, 0], [node.text()[-3000:] for node in again]
    assert any("resuming from step-" in node.text() for node in again)
    expected, resumed = weights(tmp_path / "whole"), weights(run_dir)
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(expected[name], resumed[name]) for name in expected), "bit for bit, dropout included"


@pytest.mark.slow
def test_a_silent_node_is_named_and_the_other_one_ends_within_its_timeout(nodes, tmp_path):
    run_dir = tmp_path / "run"
    timeout = 12
    arguments = [*COMMON, "max_steps=2000", f"parallel.timeout_minutes={timeout / 60}", f"run_dir={run_dir}"]
    pair = nodes(arguments)
    wait_for(lambda: steps_taken(run_dir) >= 3, START_LIMIT, pair)
    pair[1].freeze()
    wait_for(lambda: "Giving up (parallel.timeout_minutes)" in pair[0].text(), EXIT_LIMIT, pair[:1])
    assert re.search(r"Rank \d of 2 has waited .* Missing: rank \d has not been heard from", pair[0].text())
    # the worker has ended; its agent waits for the frozen one, which may hold the rendezvous, until its reads time out
    assert pair[0].process.wait(timeout=3 * EXIT_LIMIT) != 0


@pytest.mark.slow
def test_a_worker_does_not_outlive_its_agent(nodes, tmp_path):
    run_dir = tmp_path / "run"
    pair = nodes([*COMMON, "max_steps=2000", "checkpoint.every=0", f"run_dir={run_dir}"])
    wait_for(lambda: steps_taken(run_dir) >= 3, START_LIMIT, pair)
    _, agent, worker = pair[1].family()
    agent.kill()
    assert pair[1].process.wait(timeout=EXIT_LIMIT) == 128 + signal.SIGKILL
    _, alive = psutil.wait_procs([worker, pair[0].family()[-1]], timeout=EXIT_LIMIT)
    assert not alive  # the other agent now waits five minutes for the one that is gone (torchrun's exit barrier), and ends
    assert "stopped by SIGTERM" in pair[0].text() + pair[1].text()
    assert len(list((run_dir / "checkpoints").glob("step-*"))) == 1


@pytest.mark.slow
def test_a_signal_to_one_node_stops_both_with_a_checkpoint(nodes, tmp_path):
    run_dir = tmp_path / "run"
    arguments = [*COMMON, "max_steps=2000", "checkpoint.every=0", f"run_dir={run_dir}"]
    pair = nodes(arguments)
    wait_for(lambda: steps_taken(run_dir) >= 3, START_LIMIT, pair)
    os.kill(pair[1].process.pid, signal.SIGUSR1)
    assert [node.process.wait(timeout=EXIT_LIMIT) for node in pair] == [0, 0], [node.text()[-3000:] for node in pair]
    (checkpoint,) = (run_dir / "checkpoints").glob("step-*")
    assert int(checkpoint.name.removeprefix("step-")) >= steps_taken(run_dir) - 1 >= 2
    assert any("stopped by SIGUSR1" in node.text() for node in pair)


if shutil.which("bash") is None or shutil.which("pkill") is None:
    pytestmark = pytest.mark.skip(reason="needs bash and pkill")
