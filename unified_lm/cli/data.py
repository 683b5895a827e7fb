"""`unified-lm data mine | overlap | prepare`: make training data and check it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from unified_lm.cli.arguments import Command, command_parser, from_zero, positive, run_group, whole
from unified_lm.core.errors import UserError, did_you_mean
from unified_lm.core.outputs import check_files
from unified_lm.data.rows.files import check_report, write_report
from unified_lm.data.rows.texts import open_rows
from unified_lm.mining.overlap import (
    OverlapConfig,
    OverlapKind,
    OverlapReport,
    build_index,
    check_rows,
    find_overlap,
    output_paths,
)

COMMANDS: Mapping[str, Command] = {
    "mine": Command("hard negatives for pair rows", "unified_lm.cli.data_mine:mine"),
    "overlap": Command("rows of training data that evaluation sets contain", "unified_lm.cli.data:overlap"),
    "prepare": Command("published data as files that the recipes read", "unified_lm.cli.data:prepare"),
}


def data(argv: Sequence[str]) -> None:
    """Run one of the data commands.

    Raises:
        UserError: no command, or an unknown one.
    """
    run_group("data", "make training data, and check it", COMMANDS, "prepare tulu2 --out data/tulu2", argv)


def overlap(argv: Sequence[str]) -> None:
    """Report overlap between training data and evaluation sets, and write the rows without overlap (`--write`)."""
    parser = command_parser(
        "data overlap",
        "find training rows that evaluation sets contain, exactly or approximately",
        "train.jsonl test.tsv --write clean.jsonl --report overlap.yaml",
        "TRAIN and EVAL are files, folders, or hub:NAME[:SUBSET[:SPLIT]]",
    )
    parser.add_argument("train", help="training rows of any kind")
    parser.add_argument("evaluation", nargs="+", metavar="EVAL", help="evaluation sets; every column of texts is compared")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the rows without overlap (a folder if TRAIN is one)")
    parser.add_argument("--report", type=Path, metavar="FILE.yaml", help="write the report, with examples")
    parser.add_argument("--columns", default="", help="columns of the evaluation sets to compare, a,b,c; by default all")
    parser.add_argument(
        "--kinds", default=",".join(kind.value for kind in OverlapKind), help="tests to run, by default %(default)s"
    )
    parser.add_argument("--ngram", type=positive, default=13, help="words of a shared run (13)")
    parser.add_argument("--near", type=from_zero, default=0.8, help="Jaccard similarity of near-duplicates (0.8)")
    parser.add_argument("--min-words", type=positive, default=4, help="shorter texts are not compared (4 words)")
    parser.add_argument("--examples", type=whole, default=5, help="examples kept per kind (5)")
    options = parser.parse_args(list(argv))
    config = OverlapConfig(
        ngram_words=options.ngram,
        near_threshold=options.near,
        min_words=options.min_words,
        kinds=_kinds(options.kinds),
        columns=tuple(filter(None, options.columns.split(","))),
        num_examples=options.examples,
    )
    if options.report is not None:
        check_report(options.report)
    train = open_rows(options.train)
    evaluation = [(name, file) for name in options.evaluation for file in open_rows(name)]
    outputs = output_paths(train, options.write) if options.write is not None else []
    read = [file.path for file in (*train, *(file for _, file in evaluation)) if file.path is not None]
    check_files([*outputs, *([options.report] if options.report is not None else [])], read)
    if outputs:
        check_rows(train, outputs)
    index = build_index(evaluation, config)
    with counting("comparing rows") as progress:
        report = find_overlap(train, index, write=options.write, progress=progress)
    _print_overlap(report, config, Console(soft_wrap=True))
    if options.report is not None:
        write_report(options.report, report.as_dict())
    if options.write is not None:
        print(f"{options.write}: {report.num_rows - report.num_overlapping:,} rows without overlap")


def _kinds(names: str) -> tuple[OverlapKind, ...]:
    chosen = set()
    for name in filter(None, names.split(",")):
        try:
            chosen.add(OverlapKind(name))
        except ValueError:
            known = [kind.value for kind in OverlapKind]
            raise UserError(f"--kinds: unknown kind '{name}'.{did_you_mean(name, known)}") from None
    return tuple(kind for kind in OverlapKind if kind in chosen)


def _print_overlap(report: OverlapReport, config: OverlapConfig, console: Console) -> None:
    fraction = report.num_overlapping / report.num_rows if report.num_rows else 0.0
    console.print(
        f"{report.num_overlapping:,} of {report.num_rows:,} training rows ({fraction:.2%}) overlap with "
        f"{report.num_evaluation_texts:,} evaluation texts ({report.num_short_texts:,} more were too short to compare).",
        highlight=False,
    )
    if not report.num_overlapping:
        return
    names = {
        OverlapKind.EXACT: "exact",
        OverlapKind.NORMALIZED: "normalized",
        OverlapKind.NGRAM: f"{config.ngram_words} words",
        OverlapKind.NEAR: f"Jaccard {config.near_threshold:g}",
    }
    table = Table("evaluation set", *(names[kind] for kind in config.kinds))
    for set_name, counts in report.by_set.items():
        table.add_row(set_name, *(f"{counts[kind.value]:,}" for kind in config.kinds))
    console.print(table)
    console.print("fields: " + ", ".join(f"{name} {count:,}" for name, count in report.by_field.most_common()), highlight=False)
    for kind, examples in report.examples.items():
        for example in examples[:2]:
            console.print(f"\n{kind}: {example['train']} ~ {example['evaluation']}", markup=False, highlight=False)
            for key in ("train_text", "evaluation_text", "shared"):
                console.print(f"  {example[key]}", markup=False, highlight=False)


def prepare(argv: Sequence[str]) -> None:
    """Write a published data set in the formats that recipes read, with a manifest."""
    from unified_lm.data.rows.prepare import FORMATS
    from unified_lm.data.rows.prepare import prepare as write
    from unified_lm.data.rows.published import PUBLISHED

    parser = command_parser(
        "data prepare", "write a published data set as files that the recipes read", "tulu2 --out data/tulu2 --limit 1000"
    )
    parser.add_argument("name", metavar="NAME", help=f"one of {', '.join(PUBLISHED)}")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write to")
    parser.add_argument("--from", dest="local", type=Path, metavar="LOCAL", help="read this copy, not the Hub")
    parser.add_argument("--revision", help="Hub revision; by default the newest; the manifest records its commit")
    parser.add_argument(
        "--format", choices=[ending.lstrip(".") for ending in FORMATS], default="jsonl", help="of the files (jsonl)"
    )
    parser.add_argument("--limit", type=positive, help="read only the first rows of each file, for a trial")
    options = parser.parse_args(list(argv))
    done = write(
        options.name,
        options.out,
        local=options.local,
        revision=options.revision,
        suffix=f".{options.format}",
        limit=options.limit,
    )
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"{done.num_rows:,} rows in {len(done.files)} file(s), {done.dropped.total():,} left out", markup=False)
    for reason, count in sorted(done.dropped.items()):
        console.print(f"  {count:,} x {reason}", markup=False)
    console.print(f"license   {PUBLISHED[options.name].license}\nmanifest  {done.manifest}\ntrain on  {done.use}", markup=False)


@contextmanager
def counting(what: str) -> Iterator[Callable[[int], None] | None]:
    """A counter on stderr; None if stderr is not a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    with Progress(*Progress.get_default_columns()[:1], "{task.completed:,.0f}", console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=None)
        yield lambda count: bar.advance(task, count)
