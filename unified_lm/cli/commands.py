"""Sub-commands that are short enough to stand together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from unified_lm.cli import script
from unified_lm.cli.arguments import HELP, command_parser, whole
from unified_lm.composition.compose import compose_run
from unified_lm.composition.locate import group_options, list_recipes
from unified_lm.config.schema import VERIFICATIONS
from unified_lm.core.errors import UserError
from unified_lm.core.outputs import note_inputs
from unified_lm.core.user_files import user_path

_SETTINGS = (
    "any key of the configuration with its dots (optim.lr=1e-4), [a,b] for a list, ~key for its default; group=option "
    "chooses a group's option (model=tiny_random). What is not given is as the recipe says"
)
_RECIPE = "a recipe's name (`unified-lm recipes` lists them), its file, or the folder of a run; required"


def train(argv: Sequence[str]) -> Path:
    """Train what `recipe=NAME key=value` arguments say; returns the folder of the run (`main` of `train.py`)."""
    show_help_of_train(argv)
    return script.train(argv)


def show_help_of_train(argv: Sequence[str]) -> None:
    """Print the help of training where it is asked for.

    Raises:
        SystemExit: 0, after help.
    """
    _help_of_settings(
        "train",
        "train a recipe, a chain of recipes or an ablation, and export the result",
        "recipe=grit_smollm2 max_steps=20 run_dir=runs/trial",
        argv,
        {
            "recipe=NAME": _RECIPE,
            "dry_run=true": "only show what it would do, with estimates of memory and time (false)",
            "resume=auto": "go on from the run's newest checkpoint (none)",
        },
    )


def demo(argv: Sequence[str]) -> None:
    """Run the demo (see `cli.demo`)."""
    _help_of_settings(
        "demo",
        "train the embedded model on the embedded data with GRIT (offline, on a CPU), then search and answer with the export",
        "max_steps=20",
        argv,
        {"run_dir=DIR": "where the run is written (runs/demo-DATE-TIME)"},
    )
    from unified_lm.cli.demo import demo as run

    run(argv)


def _help_of_settings(name: str, description: str, example: str, argv: Sequence[str], arguments: Mapping[str, str]) -> None:
    """Print the help of a command that takes `key=value` arguments, where it is asked for; the rest is Hydra's to read.

    Raises:
        SystemExit: 0, after help.
    """
    parser = command_parser(name, description, example)
    for argument, text in arguments.items():
        parser.add_argument(argument, nargs=None if text is _RECIPE else "?", metavar=argument, help=text)
    parser.add_argument("settings", nargs="*", metavar="key=value", help=_SETTINGS)
    if any(argument in HELP for argument in argv):
        parser.parse_args(["--help"])


def recipes(argv: Sequence[str]) -> None:
    """Print every recipe with its description, and the options of every group; takes no arguments."""
    command_parser("recipes", "list the recipes, and the options of every configuration group", "").parse_known_args(argv)
    if argv:
        raise UserError(f"`unified-lm recipes` takes no arguments, got {' '.join(argv)}.")
    table = Table("recipe=", "what it does", title="recipes", title_justify="left")
    for name, description in list_recipes().items():
        table.add_row(name, description)
    groups = Table("group", "options", title="groups (group=option)", title_justify="left")
    for group, options in group_options().items():
        groups.add_row(f"{group}=", ", ".join([*options, *(["tiny_random"] if group == "model" else [])]))
    console = Console()
    console.print(table)
    console.print(groups)


def export(argv: Sequence[str]) -> None:
    """Export the weights of a checkpoint of a run; the newest one without `--step`. With `--for`, a copy for an engine."""
    parser = command_parser("export", "export a checkpoint as a finished run is exported", "runs/grit --step 40", _ENGINES)
    parser.add_argument("run", type=Path, help="folder of a run; with --for also of an export")
    parser.add_argument("--step", type=whole, default=None, help="the checkpoint's step; the newest if left out")
    parser.add_argument("--out", type=Path, default=None, help="folder to write; RUN/export (with --step: RUN/export-STEP)")
    parser.add_argument("--verify", choices=VERIFICATIONS, default=None, help="what to read back; as the run's export.verify")
    parser.add_argument("--adapter", action="store_true", help="the adapter alone, for its base; to RUN/export-adapter")
    parser.add_argument("--for", dest="engine", default=None, help="write a copy of the export that an engine can serve")
    parser.add_argument("--pool-prompt", action="store_true", help="with --for: pool prompts with the text, as engines do")
    options = parser.parse_args(list(argv))
    note_inputs(())  # it reads checkpoints, and the run's export is what it writes; an engine's copy notes its source
    if options.adapter and (options.engine is not None or options.verify is not None):
        raise UserError("--adapter writes peft's files and loads nothing back: it goes with neither --for nor --verify.")
    if options.engine is not None:
        _export_for(options.run, options.step, options.out, options.engine, options.pool_prompt)
        return
    if options.pool_prompt:
        raise UserError("--pool-prompt says how an engine pools, and no engine is named. Add --for vllm-embed or --for tei.")
    from unified_lm.assembly.checkpoints import export_adapter, export_checkpoint

    name = ("export-adapter" if options.adapter else "export") + ("" if options.step is None else f"-{options.step}")
    target, console = options.out or options.run / name, Console(stderr=True)
    if options.adapter:
        print(export_adapter(options.run, target, console, options.step))
        return
    print(export_checkpoint(options.run, target, console, options.step, options.verify))


_ENGINES = "engines (--for): vllm-embed, vllm-generate, tei; docs/serving.md says what each reads"


def _export_for(run: Path, step: int | None, out: Path | None, engine: str, pool_prompt: bool) -> None:
    """Write an engine's copy of an export that exists, and print its folder and the line that serves it."""
    from unified_lm.export.manifest import FILE_NAME
    from unified_lm.export.serving import write_serving

    source = run if (run / FILE_NAME).is_file() else run / ("export" if step is None else f"export-{step}")
    if not (source / FILE_NAME).is_file():
        raise UserError(
            f"{run} is neither an export nor a run with one in {source.name}. Write it first: unified-lm export {run}"
            + (f" --step {step}" if step is not None else "")
        )
    target = out or source.with_name(f"{source.name}-{engine}")
    launch = write_serving(source, target, engine, pool_prompt=pool_prompt)
    print(target)
    Console(stderr=True).print(f"serve it with: {launch}", highlight=False, soft_wrap=True, markup=False)


def inspect(argv: Sequence[str]) -> None:
    """Show real samples, packing statistics and a mask picture of a recipe; `out=DIR` says where the picture goes."""
    _help_of_settings(
        "inspect",
        "show a recipe's real samples, what each token is for, packing statistics and a picture of a mask; nothing is trained",
        "recipe=grit_smollm2 out=runs/inspect",
        argv,
        {"recipe=NAME": _RECIPE, "out=DIR": "folder of the picture (runs/inspect)"},
    )
    from unified_lm.cli.inspect import inspect_run

    folders = [argument.partition("=")[2] for argument in argv if argument.startswith("out=")]
    config = compose_run([argument for argument in argv if not argument.startswith("out=")])
    console = Console()
    for notice in config.notices:
        console.print(notice, style="yellow", markup=False)
    inspect_run(config, console, user_path(folders[-1] if folders else "runs/inspect"))
