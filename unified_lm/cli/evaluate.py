"""`unified-lm eval` and its sub-command `eval mteb MODEL --tasks ...`: benchmark tasks, or the user's files."""

from __future__ import annotations

import argparse
import os
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from unified_lm.cli.arguments import (
    Command,
    add_device_options,
    add_embedding_options,
    command_parser,
    embedding_options,
    run_group,
)
from unified_lm.core.errors import ConfigError, DataError, did_you_mean
from unified_lm.core.outputs import check_file, write_json_file
from unified_lm.core.user_files import user_path
from unified_lm.evaluation.embedding.instructions import instructions_of, require_known, table_names
from unified_lm.evaluation.embedding.offline import find_tasks, read_task
from unified_lm.evaluation.embedding.task_results import ModelIdentity, TaskScore
from unified_lm.evaluation.embedding.task_sets import RegistryTask, task_sets

if TYPE_CHECKING:
    from unified_lm.evaluation.embedding.mteb_adapter import AbsTask
    from unified_lm.inference import UnifiedLM

COMMANDS: Mapping[str, Command] = {
    "mteb": Command("embedding tasks of mteb, or folders of files", "unified_lm.cli.evaluate:evaluate_mteb"),
    "words": Command("word-level tasks by a linear probe", "unified_lm.cli.evaluate_words:evaluate_words"),
    "perplexity": Command("token and byte perplexity by domain", "unified_lm.cli.evaluate_generation:evaluate_perplexity"),
    "rag": Command("answers from documents, in every mode", "unified_lm.cli.evaluate_rag:evaluate_rag"),
    "lm": Command("tasks of lm-eval", "unified_lm.cli.evaluate_generation:evaluate_lm"),
}
"""Name -> evaluation."""
_SETTINGS = ("template", "pooling", "attention", "method", "alpha", "max_tokens", "dtype")


def evaluate(argv: Sequence[str]) -> None:
    """Run the evaluation named by the first argument.

    Raises:
        UserError: no evaluation, or an unknown one.
    """
    run_group("eval", "evaluate a finished model", COMMANDS, "mteb runs/grit/export --tasks STSBenchmark", argv)


def evaluate_mteb(argv: Sequence[str]) -> None:
    """Evaluate a model with mteb.

    Raises:
        UserError: an error in the arguments, the tasks, their files or the model; where possible it is raised before the
            model is loaded.
    """
    options = _parser().parse_args(list(argv))
    if options.prompts is not None:
        check_file(options.prompts)
    adapter = _adapter()
    from unified_lm.inference import UnifiedLM
    from unified_lm.inference.loading import model_folder
    from unified_lm.mining.embedders import folder_hash

    console = Console(stderr=True)
    tasks = select_tasks(options.tasks, options.languages, console)
    folder = model_folder(options.model, None)
    model = UnifiedLM.from_pretrained(
        folder,
        device=options.device,
        dtype=options.dtype,
        **embedding_options(options),
        check_weights=True,
    )
    instructions = instructions_of(options.instructions, model.manifest.instructions if model.manifest else {})
    require_known(instructions, [adapter.task_key(task.metadata) for task in adapter.leaf_tasks(tasks)])
    if options.prompts is not None:
        write_json_file(options.prompts, adapter.model_prompts(model, instructions, tasks))
        print(options.prompts)
        return
    settings = {name: str(value) for name in _SETTINGS if (value := getattr(options, name)) is not None}
    if instructions.label:
        settings["instructions"] = instructions.label
    identity = ModelIdentity(name=options.name or _name(folder), revision=folder_hash(folder), settings=settings)
    encoder = adapter.UnifiedEncoder(model, instructions, identity, show_progress=sys.stderr.isatty())
    out = options.out or (folder.parent / "mteb" if Path(options.model).is_dir() else Path("mteb"))
    scores = adapter.run_tasks(
        encoder, tasks, out, overwrite=options.overwrite, report=lambda score: console.print(_line(score), markup=False)
    )
    _print(scores, identity, model)
    print(f"results: {scores[0].path.parent}")


def select_tasks(names: Sequence[str], languages: Sequence[str], console: Console) -> list[AbsTask]:
    """Resolve names to tasks: sets, tasks of mteb's registry, and folders of offline tasks.

    A name with a path separator is a folder, and so is the name of a folder that is not the name of a task.

    Raises:
        DataError: an unknown name, or a folder without a valid task.
        ConfigError: two tasks with the same name.
    """
    adapter = _adapter()
    sets = task_sets()
    tasks: list[AbsTask] = []
    for name in names:
        if name in sets:
            tasks += [adapter.registry_task(task) for task in sets[name].tasks]
        elif os.sep in name or name in (".", "..") or (Path(name).is_dir() and not adapter.in_registry(name)):
            for folder in find_tasks(user_path(name)):
                source = read_task(folder)
                for notice in source.notices:
                    console.print(f"{source.name}: {notice}", style="yellow", markup=False)
                tasks.append(adapter.offline_task(source))
        else:
            hint = did_you_mean(name, sets)
            if "Did you" in hint and not adapter.in_registry(name):
                raise DataError(f"unknown task '{name}'.{hint}")
            tasks.append(adapter.registry_task(RegistryTask(name=name), languages))
    found = [task.metadata.name for task in tasks]
    twice = sorted({name for name in found if found.count(name) > 1})
    if twice:
        raise ConfigError(
            f"--tasks names {', '.join(twice)} more than once; an offline task is renamed by `name:` in task.yaml."
        )
    return tasks


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "eval mteb",
        "evaluate a model on tasks of mteb, or on folders of files; finished tasks are skipped",
        "runs/grit/export --tasks STSBenchmark SciFact --instructions e5",
    )
    add = parser.add_argument
    add("model", help="a run or its export folder, any causal model's folder, or a Hub name")
    add("--tasks", nargs="+", required=True, metavar="TASK", help=f"mteb's names, sets ({', '.join(task_sets())}), or folders")
    add("--instructions", default="export", help=f"export (default), none, task, {', '.join(table_names())}, or a .json table")
    add(
        "--languages",
        nargs="+",
        default=[],
        metavar="LANG",
        help="keep only subsets in these languages, such as eng; by default all",
    )
    add("--out", type=Path, default=None, help="mteb's cache folder (default: mteb beside the export)")
    add("--name", default=None, help='name in the results, "organization/model"')
    add("--overwrite", action="store_true", help="run finished tasks again")
    add("--prompts", type=Path, default=None, help="only write the prompts, for running plain mteb, to this .json file")
    add_device_options(parser)
    add_embedding_options(parser)
    return parser


def _adapter():  # type: ignore[no-untyped-def]  # the type of a module cannot be named
    try:
        from unified_lm.evaluation.embedding import mteb_adapter
    except ImportError as error:
        raise ConfigError(
            f"this needs mteb ({error}): pip install 'unified_lm[eval]', on Python 3.11 or newer "
            f"(this is {sys.version.split()[0]})."
        ) from error
    return mteb_adapter


def _name(folder: Path) -> str:
    """The default name in results: the name of the run for an export, of the folder otherwise."""
    folder = folder.resolve()
    return f"unified_lm/{folder.parent.name if folder.name == 'export' else folder.name}"


def _line(score: TaskScore) -> str:
    how = "finished before" if score.resumed else f"{score.seconds:.1f} s"
    return f"{score.name}: {score.metric} {score.score:.4f} ({how})"


def _print(scores: Sequence[TaskScore], identity: ModelIdentity, model: UnifiedLM) -> None:
    """Print the tasks, then means over the tasks of each type and over all tasks (as in MTEB's tables)."""
    table = Table("task", "type", "metric", "score", title=f"{identity.name} @ {identity.revision[:12]}", title_justify="left")
    types: dict[str, list[float]] = defaultdict(list)
    for score in scores:
        table.add_row(score.name, score.type, score.metric, f"{score.score:.4f}")
        types[score.type].append(score.score)
    if len(scores) > 1:
        table.add_section()
        for name, values in types.items():
            table.add_row(f"mean of {len(values)}", name, "", f"{sum(values) / len(values):.4f}")
        table.add_row(f"mean of {len(scores)}", "all", "", f"{sum(score.score for score in scores) / len(scores):.4f}")
    Console().print(table)
    if model.num_truncated:
        print(f"{model.num_truncated} texts were cut to the limit in tokens")
