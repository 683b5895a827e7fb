"""Every command by its whole name: those of groups (`data mine`, `experts page`) one by one."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import pytest

from unified_lm.cli.arguments import Command
from unified_lm.cli.main import COMMANDS


def groups() -> dict[str, dict[str, Command]]:
    """Name of a group -> its commands: a group is a command whose module has a table of commands."""
    modules = {name: sys.modules[command.load().__module__] for name, command in COMMANDS.items()}
    return {name: dict(module.COMMANDS) for name, module in modules.items() if hasattr(module, "COMMANDS")}


def commands() -> dict[str, Command]:
    """Whole name -> command."""
    found = groups()
    nested = {f"{group} {name}": command for group, inner in found.items() for name, command in inner.items()}
    return {name: command for name, command in COMMANDS.items() if name not in found} | nested


class _Parsed(Exception):
    pass


def parser_of(command: Command, monkeypatch: pytest.MonkeyPatch) -> argparse.ArgumentParser:
    """The parser that a command makes; the command goes no further."""
    made: list[argparse.ArgumentParser] = []

    def parse(self: argparse.ArgumentParser, *_: Any) -> None:
        made.append(self)
        raise _Parsed

    for name in ("parse_args", "parse_known_args"):
        monkeypatch.setattr(argparse.ArgumentParser, name, parse)
    with pytest.raises(_Parsed):
        command.load()(["--help"])
    monkeypatch.undo()
    return made[0]
