"""The help of every command: all arguments explained, defaults told, and an example that the command really takes."""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.all_commands import groups
from unified_lm.cli.main import COMMANDS, main
from unified_lm.composition.compose import compose

GROUPS = groups()
WORDS = [
    *([name] for name in COMMANDS),
    *([name, nested] for name, commands in GROUPS.items() for nested in commands),
]
OF_SETTINGS = ("train", "inspect", "demo", "recipes")


def parser_and_help(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[argparse.ArgumentParser, str]:
    """What `unified-lm WORDS --help` prints, and the parser that printed it."""
    shown: list[argparse.ArgumentParser] = []
    show = argparse.ArgumentParser.print_help

    def remember(parser: argparse.ArgumentParser, *rest: object) -> None:
        shown.append(parser)
        show(parser)

    monkeypatch.setattr(argparse.ArgumentParser, "print_help", remember)
    assert main([*words, "--help"]) == 0
    assert len(shown) == 1
    return shown[0], capsys.readouterr().out


@pytest.mark.parametrize("words", WORDS, ids=" ".join)
def test_help(words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "500")
    parser, text = parser_and_help(words, monkeypatch, capsys)
    name = " ".join(["unified-lm", *words])
    assert text.startswith(f"usage: {name}")
    for action in parser._actions:
        assert action.help, f"{name}: {action.dest} has no help"
        if action.option_strings and action.default not in (None, False, "", [], argparse.SUPPRESS):
            values = action.default if isinstance(action.default, list) else [action.default]
            told = action.help % {"default": action.default}
            missing = [value for value in values if str(value) not in told and told.count("both") == 0]
            assert not missing, f"{name} {action.dest}: the default {missing} is not told in '{told}'"
    example = text.split("example:\n")[1].strip()
    assert example.startswith(name)
    arguments = shlex.split(example)[1 + len(words) :]
    if words in ([group] for group in GROUPS):
        assert arguments[0] in GROUPS[words[0]]
    elif words[0] not in OF_SETTINGS:
        parser.parse_args(arguments)
    elif words[0] in ("train", "inspect"):
        compose([argument for argument in arguments if not argument.startswith("out=")])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["analyze", "future", "--help"], "--positions"),
        (["analyze", "layers", "embedded", "-h"], "--positions"),
        (["train", "recipe=grit_smollm2", "--help"], "dry_run=true"),
        (["eval", "words", "runs/a", "--help"], "--subtoken"),
    ],
)
def test_help_is_given_after_other_arguments(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    assert expected in capsys.readouterr().out


def test_train_py_has_the_help_of_the_command() -> None:
    script = Path(__file__).resolve().parents[2] / "train.py"
    done = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "recipe=NAME" in done.stdout
    assert "example:" in done.stdout


@pytest.mark.parametrize("group", GROUPS)
def test_a_group_lists_its_commands_and_refuses_others(group: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([group, "-h"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown and command.help in shown for name, command in GROUPS[group].items())
    assert main([group]) == 2
    assert f"unified-lm {group}: no command given. Known: {', '.join(GROUPS[group])}." in capsys.readouterr().err
    assert main([group, "nothing"]) == 2
    assert f"unified-lm {group}: unknown command 'nothing'" in capsys.readouterr().err


def test_wrong_arguments_show_the_usage_and_end_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--out"]) == 2
    assert "usage: unified-lm compare" in capsys.readouterr().err
