"""What a killed process left beside a target goes away with the next write; what others may still need stays."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from unified_lm.core.files import replacing, write_directory, write_text
from unified_lm.core.outputs import FolderKind, write_folder, write_text_file
from unified_lm.core.temporary import BUILDING, OLD, beside, sweep


def dead_process() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def left_by(process: int, target: Path, role: str) -> Path:
    """Where another process of this host would have written."""
    return target.with_name(beside(target, role).name.replace(str(os.getpid()), str(process)))


def test_what_a_dead_process_left_is_removed_by_who_writes_the_same_target(tmp_path: Path) -> None:
    dead = dead_process()
    file, folder, array = tmp_path / "v.json", tmp_path / "export", tmp_path / "a.npy"
    left = [left_by(dead, target, BUILDING) for target in (file, folder, array)]
    left[0].write_text("half")
    left[1].mkdir()
    (left[1] / "model.safetensors").write_text("half")
    left[2].write_text("half")
    former = left_by(dead, folder, OLD)
    folder.mkdir()
    former.mkdir()
    write_text(tmp_path / "other.json", "{}")
    assert all(path.exists() for path in left), "nobody wrote these targets"
    write_text_file(file, "{}")
    write_directory(folder, lambda building: (building / "new").touch())
    with pytest.raises(ZeroDivisionError), replacing(array):
        raise ZeroDivisionError
    assert sorted(path.name for path in tmp_path.iterdir()) == [".unified_lm_written", "export", "other.json", "v.json"]


def test_a_former_target_takes_its_place_again_when_the_process_died_between_two_renames(tmp_path: Path) -> None:
    target = tmp_path / "export"
    former = left_by(dead_process(), target, OLD)
    former.mkdir()
    (former / "weights").write_text("days of training")
    sweep(target)
    assert (target / "weights").read_text() == "days of training"
    assert not former.exists()


def test_what_living_processes_other_hosts_and_users_have_stays(tmp_path: Path) -> None:
    target = tmp_path / "v.json"
    stay = [
        left_by(os.getppid(), target, BUILDING),
        tmp_path / ".v.json.elsewhere-1.building.json",
        tmp_path / ".v.json.notes",
        left_by(dead_process(), tmp_path / "w.json", BUILDING),
    ]
    for path in stay:
        path.write_text("mine")
    write_text_file(target, "{}")
    assert all(path.read_text() == "mine" for path in stay)


@pytest.mark.parametrize("name", ["x" * 255, "é" * 127, "a" * 200 + ".npy", "b." + "c" * 250])
def test_every_name_that_a_file_can_have_can_be_written(name: str, tmp_path: Path) -> None:
    write_text_file(tmp_path / name, "text")
    write_folder(tmp_path / "folder" / name, FolderKind("thing", "f"), lambda building: (building / "f").write_text("text"))
    assert (tmp_path / name).read_text() == (tmp_path / "folder" / name / "f").read_text() == "text"
    assert beside(tmp_path / name, BUILDING) != beside(tmp_path / (name[:-1] + "z"), BUILDING)


def test_a_failed_write_leaves_nothing_and_names_the_file(tmp_path: Path) -> None:
    def full(building: Path) -> None:
        """Write to a full disk, whose error names no file."""
        with open("/dev/full", "wb", buffering=0) as handle:
            building.touch()
            handle.write(b"x")

    with pytest.raises(OSError, match="No space left") as caught, replacing(tmp_path / "v.npy") as building:
        full(building)
    assert caught.value.filename == str(tmp_path / "v.npy")
    assert not list(tmp_path.iterdir())
