"""The launchers: what they run, how they pass signals on, and that a Slurm job puts itself back into the queue."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch"])

# stands for torchrun: one child, which ends well on SIGUSR1 and SIGTERM, and whose exit code it passes on; SIGUSR1 kills it
AGENT = """
import signal, subprocess, sys
worker = "import signal, sys, time\\n" \\
    "[signal.signal(n, lambda *_: sys.exit({code})) for n in (signal.SIGUSR1, signal.SIGTERM)]\\n" \\
    "open({ready!r}, 'w').close()\\n" \\
    "time.sleep(60)"
sys.exit(subprocess.Popen([sys.executable, "-c", worker], start_new_session=True).wait())
"""
SRUN = """#!/usr/bin/env bash
# hands the command to one "node" and passes signals on, as srun does
while [[ "$1" == --* ]]; do shift; done
SLURM_NODEID=0 "$@" &
trap "kill -USR1 $!" USR1
wait $!; status=$?
while kill -0 $! 2>/dev/null; do wait $!; status=$?; done
exit $status
"""
SCONTROL = """#!/usr/bin/env bash
case "$1" in
    show) echo node0; echo node1 ;;
    requeue) echo "$2" >> "$REQUEUED" ;;
esac
"""

pytestmark = pytest.mark.skipif(not all(map(shutil.which, ("bash", "pkill"))), reason="needs bash and pkill")


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def environment(tmp_path: Path, exit_code: int = 0, **more: str) -> dict[str, str]:
    """PYTHON is the stand-in for torchrun; srun and scontrol are fakes."""
    agent = AGENT.format(code=exit_code, ready=str(tmp_path / "ready"))
    (tmp_path / "agent.py").write_text(agent)
    python = executable(tmp_path / "python", f'#!/usr/bin/env bash\necho "$@"\nexec {sys.executable} {tmp_path}/agent.py\n')
    executable(tmp_path / "bin" / "srun", SRUN)
    executable(tmp_path / "bin" / "scontrol", SCONTROL)
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "MASTER", "NPROC", "UNIFIED_LM"))
    }
    return {**kept, "PATH": path, "PYTHON": str(python), "REQUEUED": str(tmp_path / "requeued"), **more}


def slurm(tmp_path: Path, **more: str) -> dict[str, str]:
    job = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "unified_lm", "SLURM_JOB_NODELIST": "node[0-1]", "SLURM_NNODES": "2"}
    return environment(tmp_path, **job, UNIFIED_LM_HOME=str(LAUNCH.parent), **more)


def run(script: str, *arguments: str, env: dict[str, str], cwd: Path) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(LAUNCH / script), *arguments]
    return subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)


def signaled(script: str, *arguments: str, env: dict[str, str], tmp_path: Path, number: signal.Signals) -> tuple[int, str]:
    """Start a script, signal its process group once the worker runs (as Slurm does), and wait for its end."""
    command = ["bash", str(LAUNCH / script), *arguments]
    with open(tmp_path / "output", "w") as output:
        process = subprocess.Popen(command, env=env, cwd=tmp_path, stdout=output, stderr=output, start_new_session=True)
        deadline = time.monotonic() + 30
        while not (tmp_path / "ready").exists():
            assert process.poll() is None, (tmp_path / "output").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        if script == "slurm.sbatch":
            process.send_signal(number)  # --signal=B: reaches the batch script alone
        else:
            os.killpg(process.pid, number)
        return process.wait(timeout=30), (tmp_path / "output").read_text()


def test_scripts_pass_shellcheck():
    if shutil.which("shellcheck") is None:
        pytest.skip("needs shellcheck")
    result = subprocess.run(["shellcheck", "-x", *map(str, SCRIPTS)], cwd=LAUNCH.parent, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_one_node_starts_torchrun_with_the_arguments(tmp_path):
    env = environment(tmp_path, UNIFIED_LM_DRY="1", NPROC_PER_NODE="4", PYTHON="python")
    result = run("single_node.sh", "recipe=grit_smollm2", "data.path=/a b", env=env, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("python -m torch.distributed.run --standalone --nproc-per-node=4 ")
    assert result.stdout.rstrip().endswith("train.py recipe=grit_smollm2 data.path=/a\\ b")


def test_several_nodes_meet_at_one_address(tmp_path):
    env = environment(tmp_path, UNIFIED_LM_DRY="1", NNODES="2", MASTER_ADDR="node0", MASTER_PORT="1234")
    result = run("multi_node.sh", "recipe=grit_smollm2", env=env, cwd=tmp_path)
    for part in ("--nnodes=2", "--rdzv-backend=c10d", "--rdzv-endpoint=node0:1234", "--max-restarts=0"):
        assert part in result.stdout


@pytest.mark.parametrize(
    ("script", "arguments", "missing"),
    [
        ("single_node.sh", ["max_steps=3"], "no recipe"),
        ("multi_node.sh", ["recipe=a"], "NNODES is not set"),
        ("slurm.sbatch", ["recipe=a"], "not under Slurm"),
    ],
)
def test_what_is_missing_is_named(tmp_path, script, arguments, missing):
    result = run(script, *arguments, env=environment(tmp_path), cwd=tmp_path)
    assert result.returncode != 0
    assert missing in result.stderr


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
@pytest.mark.parametrize("exit_code", [0, 3])
def test_signals_reach_the_workers_and_their_exit_code_comes_back(tmp_path, number, exit_code):
    env = environment(tmp_path, exit_code)
    code, output = signaled("single_node.sh", "recipe=a", env=env, tmp_path=tmp_path, number=number)
    assert code == exit_code, output
    assert f"{number.name} received" in output


def test_the_stand_in_for_torchrun_dies_of_the_signal_itself(tmp_path):
    """The test above can fail: without the launcher the group's signal kills the agent."""
    env = environment(tmp_path)
    with open(tmp_path / "output", "w") as output:
        process = subprocess.Popen([env["PYTHON"]], env=env, stdout=output, stderr=output, start_new_session=True)
        while not (tmp_path / "ready").exists():
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGUSR1)
        assert process.wait(timeout=30) == -signal.SIGUSR1
    workers = subprocess.run(["pgrep", "-f", str(tmp_path / "ready")], capture_output=True, text=True).stdout.split()
    for worker in workers:
        os.kill(int(worker), signal.SIGTERM)


def test_a_preempted_job_saves_and_goes_back_into_the_queue(tmp_path):
    env = slurm(tmp_path)
    code, output = signaled("slurm.sbatch", "recipe=a", env=env, tmp_path=tmp_path, number=signal.SIGUSR1)
    assert code == 0, output
    assert (tmp_path / "requeued").read_text().split() == ["4711"]
    assert "back into the queue" in output


def test_a_job_that_ends_by_itself_is_not_requeued(tmp_path):
    env = slurm(tmp_path, UNIFIED_LM_DRY="1", PYTHON="python")
    result = run("slurm.sbatch", "recipe=a", env=env, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / "requeued").exists()
    for part in ("--nnodes=2", "--rdzv-endpoint=node0:14711", "--rdzv-id=4711"):
        assert part in result.stdout
    assert "run_dir=runs/unified_lm-4711 resume=auto" in result.stdout
    assert (tmp_path / "runs" / "unified_lm-4711" / "logs").is_dir()


def test_a_job_whose_workers_fail_after_the_signal_is_not_requeued(tmp_path):
    env = {**slurm(tmp_path), "PYTHON": environment(tmp_path, 3)["PYTHON"]}
    code, output = signaled("slurm.sbatch", "recipe=a", env=env, tmp_path=tmp_path, number=signal.SIGUSR1)
    assert code == 3, output
    assert not (tmp_path / "requeued").exists()
    assert "exit code 3" in output


def test_given_settings_of_a_job_are_kept(tmp_path):
    env = slurm(tmp_path, UNIFIED_LM_DRY="1")
    result = run("slurm.sbatch", "recipe=a", "run_dir=mine", "resume=none", env=env, cwd=tmp_path)
    assert result.stdout.rstrip().endswith("recipe=a run_dir=mine resume=none")
    assert (tmp_path / "mine" / "logs").is_dir()
