"""The `unified-lm` command, also `python -m unified_lm`. Heavy modules are imported only by the commands that need them."""

from __future__ import annotations

import os
import select
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial

from unified_lm.cli.arguments import HELP, Command
from unified_lm.core import failures
from unified_lm.core.errors import UserError, did_you_mean
from unified_lm.core.outputs import note_inputs
from unified_lm.core.typed import unusable_text
from unified_lm.core.user_files import explain_os_error, refusal

USER_ERROR = 2
_INTERRUPTED = 130
_CLOSED_PIPE = 141
"""What shells give for a program that a closed pipe ended."""
TRACEBACK = "UNIFIED_LM_TRACEBACK"
"""Environment variable: if set, the traceback behind a message is printed as well."""


COMMANDS: Mapping[str, Command] = {
    "train": Command(
        "train a recipe: recipe=NAME key=value ... (dry_run=true: only show what it would do)", "unified_lm.cli.commands:train"
    ),
    "export": Command(
        "export a checkpoint of a run, finished or not: RUN [--step N] [--out DIR] [--for ENGINE]",
        "unified_lm.cli.commands:export",
    ),
    "inspect": Command(
        "show a recipe's real samples, packs and masks: recipe=NAME [out=DIR] ...", "unified_lm.cli.commands:inspect"
    ),
    "recipes": Command("list the recipes and what can be chosen", "unified_lm.cli.commands:recipes"),
    "encode": Command(
        "embed the lines of a file: MODEL TEXTS.txt --out VECTORS.npy [--instruction ...]", "unified_lm.cli.use:encode"
    ),
    "embed": Command(
        "embed a corpus, resumable, with many processes: FILES --model DIR --out VECTORS", "unified_lm.cli.embed:embed"
    ),
    "search": Command(
        "find the lines of a file most similar to a query: MODEL QUERY TEXTS.txt [-k 5]", "unified_lm.cli.use:search"
    ),
    "generate": Command("answer a message: MODEL MESSAGE [--temperature 0.7]", "unified_lm.cli.use:generate"),
    "eval": Command(
        "evaluate a model: mteb (its tasks, or your files), words (tagging), perplexity, lm (lm-eval): mteb MODEL ...",
        "unified_lm.cli.evaluate:evaluate",
    ),
    "analyze": Command(
        "measure and plot properties of a model's vectors: future|layers|anisotropy|uniformity|norms|standardize|all MODEL...",
        "unified_lm.cli.analyze:analyze",
    ),
    "standardize": Command(
        "write a copy of an export whose vectors are standardized: EXPORT --corpus FILE|pydocs --out DIR",
        "unified_lm.cli.analyze:standardize",
    ),
    "upcycle": Command(
        "make a sparse mixture of experts of a dense model: MODEL --out DIR [--experts 8 --noise 0.02]",
        "unified_lm.cli.upcycle:upcycle",
    ),
    "experts": Command(
        "read and edit the experts of a MONET model: routing|domains|edit MODEL ...", "unified_lm.cli.experts:experts"
    ),
    "plot": Command(
        "draw loss, learning rate, speed and validation of runs as PNG and HTML: RUN... [--out DIR]", "unified_lm.cli.plot:plot"
    ),
    "compare": Command(
        "compare the held-out results of runs, by the differences in their settings: RUN... | ABLATION [--out DIR]",
        "unified_lm.cli.compare:compare",
    ),
    "report": Command(
        "write results, curves, evaluations, data and cost of a run as one HTML page: RUN [--out FILE]",
        "unified_lm.cli.report:report",
    ),
    "index": Command(
        "read documents with a model, to search and to answer from: FILES --model DIR --out INDEX",
        "unified_lm.cli.retrieve:index",
    ),
    "ask": Command('answer a question from an index: INDEX "question"', "unified_lm.cli.retrieve:ask"),
    "chat": Command("talk with the documents of an index: INDEX", "unified_lm.cli.retrieve:chat"),
    "data": Command(
        "mine hard negatives, find overlap with evaluation sets, prepare published data: mine|overlap|prepare ...",
        "unified_lm.cli.data:data",
    ),
    "demo": Command("train the embedded model, then search and answer with it (offline, CPU)", "unified_lm.cli.commands:demo"),
}
_ALIASES = {"analyse": "analyze"}
"""Undocumented second names of commands; existing scripts call `analyze` by its British spelling."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a sub-command.

    Args:
        argv: the arguments without the name of the program; None reads those of the process.

    Returns:
        The exit code: 0 on success, 2 after a user error (with one message on stderr), 130 after an interrupt, 141 where nobody
        reads what is printed any more (`... | head -1`).
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    for number, argument in enumerate(arguments, start=1):
        if fault := unusable_text(argument):
            return run_command(partial(_refuse_text, number, fault))
    if not arguments or arguments[0] in (*HELP, "help"):
        return run_command(lambda: print(usage())) or (0 if arguments else USER_ERROR)
    if arguments[0] in ("-V", "--version"):
        return run_command(_print_version)
    name, rest = _ALIASES.get(arguments[0], arguments[0]), arguments[1:]
    if name not in COMMANDS:
        return run_command(lambda: _refuse(name))
    return run_command(lambda: COMMANDS[name].load()(rest))


def run_command(command: Callable[[], object]) -> int:
    """Call a command; an error that a user can fix becomes a message on stderr and exit code 2, without a traceback.

    Under torchrun the message appears once, regardless of the number of failing ranks (`core.failures`).
    """
    failures.quieten_libraries()
    try:
        code = _exit_code(command)
        if sys.stdout is not None and not sys.stdout.closed:
            sys.stdout.flush()  # at the end of the process nobody could say why it failed
        return code
    except UserError as error:
        _print_traceback()
        failures.report(str(error))
        return USER_ERROR
    except KeyboardInterrupt:
        if failures.is_main_process():
            print("interrupted", file=sys.stderr)
        return _INTERRUPTED
    except Exception as error:
        if (found := refusal(error)) is not None and found.errno is not None:
            return _refused(found)
        if failures.is_consequence(error):
            return USER_ERROR
        raise
    finally:
        note_inputs(())
        _takes_output()


def _exit_code(command: Callable[[], object]) -> int:
    try:
        command()
    except SystemExit as ended:
        if isinstance(ended.__context__, BrokenPipeError):  # what rich makes of it
            return _CLOSED_PIPE
        if not isinstance(ended.code, int):
            raise
        return ended.code  # argparse's: 0 after help, 2 after wrong arguments
    return 0


def _refused(error: OSError) -> int:
    """Say what the operating system refused; nothing where the reader of what is printed has gone."""
    if isinstance(error, BrokenPipeError) and _reader_is_gone():
        return _CLOSED_PIPE
    _print_traceback()
    if error.filename is None and not _takes_output():
        error.filename = "standard output"
    said = explain_os_error(error)
    failures.report(f"{said}" if error.filename is not None else f"{said} {TRACEBACK}=1 shows where.")
    return USER_ERROR


def _reader_is_gone() -> bool:
    """Whether standard output or error is a pipe that nobody reads any more; what is still to be printed is dropped then."""
    poll = select.poll()
    for descriptor in (1, 2):
        poll.register(descriptor, 0)
    gone = [descriptor for descriptor, event in poll.poll(0) if event & (select.POLLERR | select.POLLHUP)]
    for descriptor in gone:
        _drop(descriptor)
    return bool(gone)


def _takes_output() -> bool:
    """Whether standard output takes what it was given; if not, that is dropped: Python would fail over it again at its end."""
    if sys.stdout is None or sys.stdout.closed:
        return True
    try:
        sys.stdout.flush()
    except OSError:
        with suppress(OSError):  # a stream of the caller's own has no descriptor
            _drop(sys.stdout.fileno())
        return False
    return True


def _drop(descriptor: int) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


def _print_traceback() -> None:
    if os.environ.get(TRACEBACK):
        traceback.print_exc()


def _print_version() -> None:
    from unified_lm import __version__

    print(f"unified_lm {__version__}")


def usage() -> str:
    """The help text."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items()]
    more = "unified-lm COMMAND --help shows a command's arguments, their defaults and an example."
    return "\n".join(["usage: unified-lm COMMAND [key=value ...]", "", *lines, "", more])


def _refuse_text(number: int, fault: str) -> None:
    raise UserError(f"argument {number} {fault}. Arguments are texts in UTF-8, names of files included.")


def _refuse(name: str) -> None:
    raise UserError(f"unknown command '{name}'.{did_you_mean(name, COMMANDS)}")
