"""Arguments and help of commands, in one form for all of them."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from unified_lm.config.objectives import EMBEDDING_METHODS
from unified_lm.core.errors import DataError, UserError, did_you_mean
from unified_lm.core.outputs import note_inputs
from unified_lm.core.user_files import user_path

PROGRAM = "unified-lm"
HELP = ("-h", "--help")


@dataclass(frozen=True)
class Command:
    """A command: one line of help, and its function `(arguments) -> object` as "module:function"."""

    help: str
    target: str

    def load(self) -> Callable[[Sequence[str]], object]:
        """Import the function."""
        module, _, name = self.target.partition(":")
        function: Callable[[Sequence[str]], object] = getattr(import_module(module), name)
        return function


_OUTPUTS = frozenset({"out", "write", "report", "prompts", "cache"})
"""Options that name what a command writes. Any other argument that names a file or a folder is read."""


class _Parser(argparse.ArgumentParser):
    """A parser that expands `~` in paths and notes what the command reads, so that no output replaces it (`core.outputs`)."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.register("type", Path, _path)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """See `argparse`."""
        options = super().parse_args(args, namespace)
        given = [value for name, value in vars(options).items() if name not in _OUTPUTS]
        texts = [str(each) for value in given for each in (value if isinstance(value, list) else [value])]
        named = [part for text in texts for part in (text, text.partition("=")[2]) if part]  # also in NAME=FILE
        note_inputs(map(Path, named))
        return options


def command_parser(name: str, description: str, example: str, note: str = "") -> argparse.ArgumentParser:
    """Make a parser whose help ends with an example.

    Args:
        name: the words of the command after the name of the program.
        description: what the command does; line breaks are kept.
        example: arguments of a typical call.
        note: text between the options and the example.
    """
    epilog = f"example:\n  {PROGRAM} {name} {example}".rstrip()
    return _Parser(
        prog=f"{PROGRAM} {name}",
        description=description,
        epilog=f"{note}\n\n{epilog}" if note else epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def run_group(name: str, description: str, commands: Mapping[str, Command], example: str, argv: Sequence[str]) -> None:
    """Run a sub-command of a command, or print the list of them.

    Args:
        name: the command.
        description: what its sub-commands have in common.
        commands: name -> sub-command.
        example: arguments of a typical call.
        argv: the sub-command and its arguments.

    Raises:
        UserError: no sub-command, or an unknown one.
        SystemExit: 0, after help.
    """
    if argv and argv[0] in commands:
        commands[argv[0]].load()(argv[1:])
        return
    if argv and argv[0] in HELP:
        width = max(map(len, commands))
        listed = "\n".join(f"  {key:<{width}}  {command.help}" for key, command in commands.items())
        note = f"{PROGRAM} {name} COMMAND --help shows a command's arguments."
        parser = command_parser(name, f"{description}\n\ncommands:\n{listed}", example, note)
        parser.add_argument("command", metavar="COMMAND", help=f"{', '.join(commands)}; its own arguments follow")
        parser.parse_args(["--help"])
    hint = did_you_mean(argv[0], commands) if argv else f" Known: {', '.join(commands)}."
    raise UserError(f"{PROGRAM} {name}: {f'unknown command {argv[0]!r}' if argv else 'no command given'}.{hint}")


def add_device_options(parser: argparse._ActionsContainer, dtype: str | None = None) -> None:
    """Add --device and --dtype, which say where and how a model's weights are held in memory.

    Args:
        parser: takes the options.
        dtype: the default. None keeps the stored type, so that a measurement is the same on every machine.
    """
    parser.add_argument("--device", type=device, default=None, help="cpu, cuda...; the accelerator if there is one")
    parser.add_argument(
        "--dtype",
        default=dtype,
        help="float32, bfloat16..., or auto: the stored type, but float32 where the machine has no units for it "
        f"(default: {dtype or 'the stored type'})",
    )


def add_embedding_options(parser: argparse._ActionsContainer, *, methods: bool = True) -> None:
    """Add what `UnifiedLM.from_pretrained` takes in place of an export's own settings; `embedding_options` reads it.

    Args:
        parser: takes the options.
        methods: whether --method and --alpha are among them.
    """
    add = parser.add_argument
    add("--template", default=None, help="prompt template; needed for a model that is not an export")
    add("--pooling", default=None, help="mean, weighted_mean, last_token or cls, in place of the export's")
    add("--attention", default=None, help="bidirectional, bidirectional_keep_first or causal, in place of the export's")
    add("--max-tokens", type=positive, default=None, help="limit of a text with its prompt, in place of the export's")
    if not methods:
        return
    add("--method", choices=EMBEDDING_METHODS, default=None, help="hidden states, routing or both, in place of the export's")
    add("--alpha", type=from_zero, default=None, help="weight of the routing in method moee_sum, in place of the export's")


def embedding_options(options: argparse.Namespace) -> dict[str, Any]:
    """What `add_embedding_options` added, as keyword arguments."""
    names = ("template", "pooling", "attention", "max_tokens", "method", "alpha")
    return {name: getattr(options, name) for name in names if hasattr(options, name)}


def _path(text: str) -> Path:
    try:
        return user_path(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def device(text: str) -> str:
    """Parse the name of a device, for `argparse`: it is tried before any work.

    Raises:
        argparse.ArgumentTypeError: it cannot be used.
    """
    from unified_lm.core.distributed import find_device  # takes a second to import, which --help can do without

    try:
        return str(find_device(text))
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def read_stdin(*, line: bool = False) -> str:
    """The text of standard input: all of it, or its next line; a byte-order mark is no part of it.

    Raises:
        DataError: it is not UTF-8.
    """
    raw = sys.stdin.buffer.readline() if line else sys.stdin.buffer.read()
    try:
        return raw.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise DataError(f"standard input is not UTF-8 ({error.reason} at byte {error.start}).") from error


_DIGITS = 18
"""Longer whole numbers do not fit the 64 bits of a counter."""


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


def positive(text: str) -> int:
    """Parse a whole number above 0, for `argparse`.

    Raises:
        argparse.ArgumentTypeError: the text has another form.
    """
    number = whole(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{_short(text)} is not a whole number above 0")
    return number


def whole(text: str) -> int:
    """Parse a whole number from 0, for `argparse`.

    Raises:
        argparse.ArgumentTypeError: the text has another form.
    """
    if not (text.isascii() and text.isdecimal()):
        raise argparse.ArgumentTypeError(f"{_short(text)} is not a whole number from 0")
    if len(text) > _DIGITS:
        raise argparse.ArgumentTypeError(f"{_short(text)} is a number of {len(text)} digits; expected at most {_DIGITS}")
    return int(text)


def finite(text: str) -> float:
    """Parse a finite number, for `argparse`: neither nan nor infinite.

    Raises:
        argparse.ArgumentTypeError: the text has another form.
    """
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{_short(text)} is not a finite number")
    return number


def from_zero(text: str) -> float:
    """Parse a finite number of at least 0, for `argparse`.

    Raises:
        argparse.ArgumentTypeError: the text has another form.
    """
    number = finite(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{_short(text)} is below 0")
    return number
