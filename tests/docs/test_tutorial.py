"""The tutorial, followed to the letter in an empty directory.

Every bash block runs in order. As the tutorial's own note says, a tiny random model takes the place of the real one:
`model=tiny_random data=files` is added wherever a command names the recipe without them. A block after the comment
`<!-- test: fails -->` ends with exit code 2 and the error that the next block shows.
"""

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests import command_server
from tests.docs.pages import DOCS, ROOT, Block, blocks

PAGE = DOCS / "tutorial.md"
TINY = "model=tiny_random data=files"


def with_tiny_model(code: str) -> str:
    """The commands of a block, with the tiny model where they name the recipe without it."""
    assert TINY in PAGE.read_text(encoding="utf-8"), "the tutorial no longer says what this test replaces"
    return re.sub(rf"recipe=shop\.yaml(?! {TINY})", f"recipe=shop.yaml {TINY}", code)


def run(code: str, folder: Path, bin_dir: Path) -> subprocess.CompletedProcess[str]:
    env = os.environ | {
        "PATH": f"{bin_dir}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "COLUMNS": "200",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = ["bash", "-euo", "pipefail", "-c", with_tiny_model(code)]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)


def check(block: Block, shown: str, result: subprocess.CompletedProcess[str]) -> None:
    """A block ends as the tutorial foresees: with success, or with exactly the error that it shows."""
    output = f"{block.place}\n{result.stdout}\n{result.stderr}"
    if block.directive == "test: fails":
        assert result.returncode == 2, output
        assert shown in result.stderr, output
    else:
        assert result.returncode == 0, output


def test_tutorial(tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    every = blocks(PAGE)
    commands = [index for index, block in enumerate(every) if block.language == "bash"]
    assert len(commands) > 8
    assert sum(every[index].directive == "test: fails" for index in commands) == 2
    with command_server.commands(tmp_path / "bin") as bin_dir:
        for index in commands:
            shown = every[index + 1].code if index + 1 < len(every) else ""
            check(every[index], shown, run(every[index].code, folder, bin_dir))
    assert (folder / "runs" / "shop" / "export" / "modules.json").is_file()
    assert (folder / "runs" / "inspect" / "attention_mask.png").is_file()


def test_a_wrong_ending_is_found() -> None:
    fails = next(block for block in blocks(PAGE) if block.directive == "test: fails")
    succeeds = next(block for block in blocks(PAGE) if block.language == "bash" and not block.directive)
    done = subprocess.CompletedProcess([], 0, "", "")
    failed = subprocess.CompletedProcess([], 2, "", "error: another one")
    check(succeeds, "", done)
    for block, result in ((fails, done), (fails, failed), (succeeds, failed)):
        with pytest.raises(AssertionError):
            check(block, "error: the one shown", result)


def test_rehearsal_commands_are_left_alone() -> None:
    given = f"unified-lm train recipe=shop.yaml {TINY} max_steps=3"
    assert with_tiny_model(given) == given
    assert with_tiny_model("unified-lm inspect recipe=shop.yaml") == f"unified-lm inspect recipe=shop.yaml {TINY}"
