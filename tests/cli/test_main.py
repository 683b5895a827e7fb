"""The command line: frozen, quick to start, and a user's mistake is one message and exit code 2."""

import errno
import os
import re
import subprocess
import sys
from functools import partial

import pytest
from safetensors import SafetensorError

from unified_lm.cli.main import COMMANDS, main, run_command, usage
from unified_lm.core.errors import DataError


def test_the_public_commands() -> None:
    assert set(COMMANDS) >= {"train", "inspect", "recipes", "demo"}
    assert all(name in usage() for name in COMMANDS)
    assert all(command.help for command in COMMANDS.values())


def test_the_commands_lead_somewhere() -> None:
    from importlib.util import find_spec

    for command in COMMANDS.values():
        assert find_spec(command.target.partition(":")[0]) is not None, command.target


def test_the_british_spelling_of_analyze_still_works_and_is_not_advertised(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["analyse", "future", "--help"]) == 0
    assert "usage: unified-lm analyze" in capsys.readouterr().out
    assert "analyse" not in usage()
    assert main(["analyzer"]) == 2  # only that spelling, not anything that begins alike


def test_help_is_instant_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; from unified_lm.cli.main import main; code = main(['--help']); "
        "heavy = [n for n in ('torch', 'transformers', 'hydra', 'rich') if n in sys.modules]; sys.exit(code or bool(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "usage: unified-lm COMMAND" in done.stdout


@pytest.mark.parametrize(
    "launcher", [["-m", "unified_lm"], ["-c", "import unified_lm.cli.main as m; raise SystemExit(m.main())"]]
)
def test_a_mistake_is_a_message_and_exit_code_2(launcher: list[str]) -> None:
    done = subprocess.run([sys.executable, *launcher, "trian"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: unknown command 'trian'. Did you mean 'train'?\n"
    assert done.stdout == ""


def test_run_command_maps_outcomes_to_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(error: BaseException) -> None:
        raise error

    assert run_command(lambda: None) == 0
    assert run_command(lambda: fail(DataError("rows.jsonl, line 3: ..."))) == 2
    assert capsys.readouterr().err == "error: rows.jsonl, line 3: ...\n"
    assert run_command(lambda: fail(KeyboardInterrupt())) == 130
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: fail(ZeroDivisionError()))


PRINTING = [["recipes"], ["--help"], ["--version"], ["plot", "--help"]]


def print_to(stdout: int, arguments: list[str], unbuffered: str = "") -> tuple[int, str]:
    """Exit code and standard error of a command whose standard output is a file descriptor."""
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    command = [sys.executable, "-m", "unified_lm", *arguments]
    done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False, env=environment)
    return done.returncode, done.stderr


@pytest.mark.parametrize("arguments", PRINTING, ids=" ".join)
def test_a_reader_that_has_gone_is_no_error(arguments: list[str]) -> None:
    """`unified-lm recipes | head -1`, whose pipe is closed before all is printed."""
    reading, writing = os.pipe()
    os.close(reading)
    assert print_to(writing, arguments) == (141, "")
    os.close(writing)


@pytest.mark.parametrize("arguments", PRINTING[1:], ids=" ".join)
def test_output_to_a_full_disk_is_one_message(arguments: list[str]) -> None:
    with open("/dev/full", "w") as full:
        code, told = print_to(full.fileno(), arguments)
    assert (code, told.count("\n")) == (2, 1)
    assert told.startswith("error: standard output: No space left on device. ")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_is_not_held_back_has_messages_too(unbuffered: str) -> None:
    """More than the buffer takes, or none: then it may not be known that it was the output."""
    reading, writing = os.pipe()
    os.close(reading)
    assert print_to(writing, ["recipes"], unbuffered) == (141, "")
    os.close(writing)
    with open("/dev/full", "w") as full:
        code, told = print_to(full.fileno(), ["recipes"], unbuffered)
    assert (code, told.count("\n")) == (2, 1)
    assert re.match("error: (standard output|the operating system refused): No space left on device", told)


def test_a_command_needs_no_standard_output() -> None:
    done = subprocess.run(
        ["sh", "-c", 'exec "$0" -m unified_lm --version >&-', sys.executable], stderr=subprocess.PIPE, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_what_the_operating_system_refuses_without_a_path_is_a_message(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(error: Exception) -> None:
        raise error

    for error in (
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
    ):
        assert run_command(partial(fail, error)) == 2
        assert capsys.readouterr().err.startswith("error: the operating system refused: No space left on device. ")
    with pytest.raises(OSError, match="a library's own words"):
        run_command(lambda: fail(OSError("a library's own words")))


def test_no_command_shows_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert main(["--version"]) == 0
    assert main(["train", "--help"]) == 0
    assert "recipe=NAME" in capsys.readouterr().out


def test_recipes_lists_names_descriptions_and_groups(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    text = capsys.readouterr().out
    for expected in ("grit_smollm2", "llm2vec_mntp", "tiny_random", "lora=", "wikitext103"):
        assert expected in text
    assert main(["recipes", "x"]) == 2
    assert "takes no arguments" in capsys.readouterr().err


def test_inspect_composes_before_it_shows(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "recipe=nothing"]) == 2
    assert "unknown recipe 'nothing'" in capsys.readouterr().err
    assert main(["inspect", "recipe=llm2vec"]) == 2
    assert "choose one of its stages" in capsys.readouterr().err
