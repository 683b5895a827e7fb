"""The lock on a folder: one process holds it, and it ends with that process."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from unified_lm.core.errors import CheckpointError
from unified_lm.core.folder_lock import LOCK_FILE, hold_folder, release_folder

HOLD = """
import sys, time
from pathlib import Path
from unified_lm.core.folder_lock import hold_folder
hold_folder(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    """Another process that holds the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_another_process_is_refused_until_the_holder_is_killed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = holder(folder)
    try:
        with pytest.raises(CheckpointError, match=f"in use by another process .process {process.pid} on "):
            hold_folder(folder)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (folder / LOCK_FILE).is_file(), "the file stays, and means nothing by itself"
    assert hold_folder(folder) is None
    release_folder(folder)


def test_a_process_may_ask_again_and_give_it_up(tmp_path: Path) -> None:
    assert hold_folder(tmp_path) is None
    assert hold_folder(tmp_path / "sub" / "..") is None
    release_folder(tmp_path)
    process = holder(tmp_path)
    process.kill()
    process.wait()


def test_a_file_system_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", flock)
    assert "has no locks" in (hold_folder(tmp_path) or "")
