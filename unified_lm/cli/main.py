"""The `unified-lm` command, also `python -m unified_lm`. Heavy modules are imported only by the commands that need them."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from unified_lm.cli.arguments import HELP, Command
from unified_lm.core import failures
from unified_lm.core.errors import UserError, did_you_mean
from unified_lm.core.outputs import note_inputs
from unified_lm.core.typed import unusable_text
from unified_lm.core.user_files import explain_os_error

USER_ERROR = 2
_INTERRUPTED = 130
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
        The exit code: 0 on success, 2 after a user error (with one message on stderr), 130 after an interrupt.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    for number, argument in enumerate(arguments, start=1):
        if fault := unusable_text(argument):
            return run_command(partial(_refuse_text, number, fault))
    if not arguments or arguments[0] in (*HELP, "help"):
        print(usage())
        return 0 if arguments else USER_ERROR
    if arguments[0] in ("-V", "--version"):
        from unified_lm import __version__

        print(f"unified_lm {__version__}")
        return 0
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
        command()
    except SystemExit as ended:
        if not isinstance(ended.code, int):
            raise
        return ended.code  # argparse's: 0 after help, 2 after wrong arguments
    except UserError as error:
        _print_traceback()
        failures.report(str(error))
        return USER_ERROR
    except KeyboardInterrupt:
        if failures.is_main_process():
            print("interrupted", file=sys.stderr)
        return _INTERRUPTED
    except Exception as error:
        if isinstance(error, OSError) and (said := explain_os_error(error)) is not None:
            _print_traceback()
            failures.report(said)
            return USER_ERROR
        if failures.is_consequence(error):
            return USER_ERROR
        raise
    finally:
        note_inputs(())
    return 0


def _print_traceback() -> None:
    if os.environ.get(TRACEBACK):
        traceback.print_exc()


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
