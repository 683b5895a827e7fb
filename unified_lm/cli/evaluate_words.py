"""`unified-lm eval words MODEL --task pos|chunk|ner|all ...`: word-level tasks by a linear probe."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from unified_lm.cli.arguments import command_parser, positive, whole
from unified_lm.cli.evaluate_model import add_model_options, find_model, plain_table, progress_bar
from unified_lm.core.errors import ConfigError, UserError, did_you_mean
from unified_lm.core.outputs import check_files, write_json_file
from unified_lm.evaluation.result_table import FOLDER
from unified_lm.evaluation.words.code import code_words
from unified_lm.evaluation.words.data import TASKS, WORD, WordData, find_conll, read_conll, read_hub, require_tasks
from unified_lm.evaluation.words.features import MAX_TOKENS, Alignment, Subtoken
from unified_lm.export.manifest import ATTENTIONS

_SOURCES = ("builtin", "conll", "hub")
_ALIGNMENTS = tuple(alignment.value for alignment in Alignment)


def evaluate_words(argv: Sequence[str]) -> None:
    """Probe a model on word-level tasks.

    Raises:
        UserError: an error in the arguments, the data or the model; arguments and data are checked first.
    """
    options = _parser().parse_args(list(argv))
    for name in options.attention or ():
        if name not in ATTENTIONS:
            raise ConfigError(f"unknown attention '{name}'.{did_you_mean(name, ATTENTIONS)}")
    alignments = [Alignment.parse(name).value for name in options.alignment]
    Subtoken.parse(options.subtoken)
    if options.out is not None:
        check_files([options.out])  # built-in data take seconds to read
    try:
        from unified_lm.evaluation.words.probe import make_probe
        from unified_lm.evaluation.words.tasks import word_level_scores
    except ImportError as error:
        raise ConfigError(f"this needs scikit-learn and seqeval ({error}): pip install 'unified_lm[eval]'.") from error
    probe = make_probe(options.probe, options.seed)
    data = _data(options)
    tasks = require_tasks(() if "all" in options.task else options.task, data)
    console = Console(stderr=True)
    model_ref = find_model(options.model)
    out = options.out or model_ref.beside / "words" / f"{_file_name(data.name)}-{options.probe}.json"
    table_file = model_ref.beside / FOLDER / f"words-{out.stem}.json"
    check_files([out, *([table_file] if model_ref.in_run else [])])
    model = model_ref.load(options, template="plain")
    scores: dict[str, Any] = {}
    for attention in options.attention or [model.attention]:
        with progress_bar(f"{attention}: sentences", len(data.train) + len(data.test), console) as advance:
            scores[attention] = word_level_scores(
                model,
                data,
                tasks=tasks,
                alignments=alignments,
                attention=attention,
                subtoken=options.subtoken,
                probe=probe,
                max_tokens=options.max_tokens,
                cache_key=model_ref.revision,
                progress=advance,
            )
    result = {
        "model": model_ref.name,
        "revision": model_ref.revision,
        "settings": {"subtoken": options.subtoken, "max_tokens": options.max_tokens, "dtype": options.dtype},
        "probe": probe.describe(),
        "data": _described(data),
        "scores": scores,
    }
    write_json_file(out, result)
    table = _table(scores, f"Word-level tasks: {model_ref.name} @ {model_ref.revision[:12]} on {data.name}")
    warnings = unconverged(scores)
    if model_ref.in_run:
        about = f"{data.about}; " if data.about else ""
        note = f"{about}probe: {options.probe}; 95 % intervals over test sentences."
        plain_table(table, " ".join([note, *warnings])).save(table_file)
    Console().print(table)
    for warning in warnings:
        Console(soft_wrap=True).print(f"warning: {warning}", style="yellow", markup=False, highlight=False)
    print(f"results: {out}")


def unconverged(scores: Mapping[str, Any]) -> list[str]:
    """One warning per score whose probe did not converge within its iterations.

    Args:
        scores: attention -> task -> alignment -> result of `word_level_scores`.
    """
    return [
        f"{task}, {attention}, {alignment}: the probe had not converged after {score['fit']['iterations']} iterations, so "
        f"{score['score']:.4f} is not the score at its optimum; do not compare it with other scores."
        for attention, tasks in scores.items()
        for task, alignments in tasks.items()
        for alignment, score in alignments.items()
        if not score["fit"].get("converged", True)
    ]


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "eval words",
        "tag words by a linear probe on a frozen model's states",
        "runs/mntp --task pos --attention causal bidirectional",
    )
    add_model_options(parser)
    add = parser.add_argument
    add("--task", nargs="+", default=["all"], choices=[*TASKS, "all"], help="what to tag (all: what the data has)")
    add(
        "--data",
        default="builtin",
        metavar="SOURCE",
        help="builtin (default), conll:FOLDER, conll:TRAIN,TEST or hub:NAME[@REVISION]",
    )
    add("--subset", default="", help="subset of a Hub data set; its default one if left out")
    add(
        "--columns", nargs="+", default=[], metavar="NAME=WHERE", help="word, pos, chunk, ner: positions from 0, or Hub columns"
    )
    add("--comment", default="", metavar="PREFIX", help="what a comment line of a CoNLL file begins with; by default none")
    add("--alignment", nargs="+", default=list(_ALIGNMENTS), metavar="NAME", help=f"{', '.join(_ALIGNMENTS)} (both)")
    modes = "causal, bidirectional, bidirectional_keep_first; by default the model's own"
    add("--attention", nargs="+", default=None, metavar="MODE", help=modes)
    add("--subtoken", default="mean", help="how a word of several tokens becomes one vector: mean (default), first or last")
    add("--probe", default="logistic", help="logistic (default; regularized, no seed), or linear (trained as in LLM2Vec)")
    add("--seed", type=whole, default=0, help="of the linear probe (0)")
    add("--train-sentences", type=positive, default=None, help="at most this many training sentences, evenly spread")
    add("--max-tokens", type=positive, default=MAX_TOKENS, help=f"tokens of one context ({MAX_TOKENS}); longer ones are split")
    add("--out", type=Path, default=None, help="result file (default: words/DATA-PROBE.json beside the export)")
    return parser


def _data(options: argparse.Namespace) -> WordData:
    source, colon, where = options.data.partition(":")
    if source not in _SOURCES or bool(colon) == (source == "builtin"):
        raise UserError(f"unknown data '{options.data}': expected builtin, conll:FOLDER, conll:TRAIN,TEST or hub:NAME.")
    if source == "builtin" and (options.columns or options.comment or options.subset):
        raise UserError("--columns, --comment and --subset are for conll: and hub: data.")
    columns = _columns(options.columns)
    if source == "conll":
        train, test = find_conll(where)
        positions = {name: _position(name, value) for name, value in columns.items()}
        data = read_conll(train, test, positions or None, comment=options.comment, name=_conll_name(where, train))
    elif source == "hub":
        name, _, revision = where.partition("@")
        data = read_hub(name, columns or None, subset=options.subset, revision=revision or None)
    else:
        data = code_words()
    return data.limited(options.train_sentences or len(data.train))


def _columns(pairs: Sequence[str]) -> dict[str, str]:
    columns = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not value or name not in (WORD, *TASKS):
            raise UserError(f"--columns {pair}: expected NAME=WHERE with NAME one of {', '.join((WORD, *TASKS))}.")
        columns[name] = value
    if columns and (WORD not in columns or len(columns) < 2):
        raise UserError(f"--columns must say where the words are and at least one task: {WORD}=0 pos=1.")
    return columns


def _position(name: str, value: str) -> int:
    try:
        return int(value)
    except ValueError as error:
        raise UserError(f"--columns {name}={value}: expected a position, counted from 0 (-1 is the last column).") from error


def _conll_name(where: str, train: Path) -> str:
    return train.stem if "," in where else Path(where).resolve().name


def _file_name(name: str) -> str:
    return name.replace("/", "__")


def _described(data: WordData) -> dict[str, Any]:
    splits = {
        split: {"sentences": len(side), "words": sum(len(sentence.words) for sentence in side)}
        for split, side in (("train", data.train), ("test", data.test))
    }
    return {"name": data.name, "key": data.key, "about": data.about, **splits}


def _table(scores: Mapping[str, Any], title: str) -> Table:
    table = Table(title=title)
    for column in ("task", "attention", "alignment", "metric", "score", "95 %", "accuracy", "baseline"):
        table.add_column(column, no_wrap=column in ("task", "attention", "alignment", "score"))
    table.title_justify = "left"
    first = next(iter(scores.values()))
    for task in first:
        for attention, tasks in scores.items():
            for alignment, score in tasks[task].items():
                interval = f"{score['low']:.4f} to {score['high']:.4f}"
                numbers = (f"{score['score']:.4f}", interval, f"{score['accuracy']:.4f}", f"{score['baseline']:.4f}")
                table.add_row(task, attention, alignment, score["metric"], *numbers)
        table.add_section()
    return table
