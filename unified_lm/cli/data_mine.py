"""`unified-lm data mine SOURCE --model MODEL --out FILE`: hard negatives for pair rows."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from unified_lm.cli.arguments import add_device_options, command_parser, finite, from_zero, positive, whole
from unified_lm.config.schema import SourceConfig
from unified_lm.core.distributed import local_device
from unified_lm.core.errors import UserError
from unified_lm.core.files import cache_dir
from unified_lm.data.rows.files import output_names
from unified_lm.data.rows.records import RecordKind
from unified_lm.data.sources import open_source, open_sources
from unified_lm.mining.embedders import load_embedder
from unified_lm.mining.mine import Mining, WorkShard, check_places
from unified_lm.mining.mine import Progress as Report
from unified_lm.mining.negatives import Given, MiningConfig, Sampling


def mine(argv: Sequence[str]) -> None:
    """Mine hard negatives. Each file of a folder is mined separately, since a batch contains rows of one file only."""
    options = _parser().parse_args(list(argv))
    config = MiningConfig(
        num_negatives=options.negatives,
        skip=options.skip,
        depth=options.depth,
        max_fraction=None if options.max_fraction == 0 else options.max_fraction,
        margin=options.margin,
        max_score=options.max_score,
        min_score=options.min_score,
        near_duplicate=None if options.near_duplicate == 0 else options.near_duplicate,
        sampling=Sampling(options.sampling),
        given=Given(options.given),
        seed=options.seed,
    )
    shard = WorkShard.parse(options.shard)
    where = replace(
        source_config(options.source, options.split, options.columns),
        limit=options.limit,
        instruction=options.instruction,
        document_instruction=options.document_instruction,
        on_empty="skip" if options.skip_empty else "error",
    )
    sources = open_sources(where, RecordKind.PAIR, options.seed)
    corpus = open_source(SourceConfig(path=options.corpus), RecordKind.TEXT, options.seed) if options.corpus else None
    outputs = _outputs(options.out, [source.name for source in sources])
    check_places(outputs)
    embedder = load_embedder(
        options.model,
        device=options.device,
        dtype=options.dtype,
        max_tokens=options.max_tokens,
        query_prompt=options.query_prompt,
        document_prompt=options.document_prompt,
        batch_size=options.batch_size,
    )
    console = Console(soft_wrap=True, highlight=False)
    # All jobs before the first one runs: each refuses an output that belongs to something else.
    jobs = [
        Mining(
            source,
            embedder,
            config,
            out,
            cache=options.cache or cache_dir("vectors"),
            corpus=corpus,
            device=options.device or str(local_device()),
        )
        for source, out in zip(sources, outputs, strict=True)
    ]
    for job in jobs:
        with _progress() as show_progress:
            report = job.run(shard, show_progress)
        if report is None:
            console.print(
                f"{job.out}: shard {options.shard} is done; the file is written when the last shard is.", markup=False
            )
        else:
            console.print(mining_table(report))
            console.print(f"{job.out}: {report['rows']:,} rows\n{job.report_path}", markup=False)


def _outputs(out: Path, names: Sequence[str]) -> list[Path]:
    """Where the mined rows of each source go; the name of one in a folder begins with that of the folder."""
    if len(names) == 1:
        return [out]
    return [out / name for name in output_names([str(Path(*Path(name).parts[1:])) for name in names], ".jsonl")]


def source_config(named: str, split: str | None, columns: str) -> SourceConfig:
    """Parse a source on the command line, see `SourceConfig`; `split` replaces that of the text.

    Raises:
        UserError: columns in a form other than ``field=column,...``.
    """
    pairs = [item.partition("=") for item in columns.split(",") if item]
    if any(not name or not column for name, _, column in pairs):
        raise UserError(f"--columns: got '{columns}', expected field=column,... such as query=question,positive=answer.")
    renamed = {name: column for name, _, column in pairs}
    source = SourceConfig.from_text(named)
    return replace(source, columns=renamed, split=split or source.split)


def mining_table(report: dict[str, Any]) -> Table:
    """Format a report of `Mining.run` as a table."""
    table = Table(title=f"hard negatives for {report['source']}", title_justify="left", show_header=False)
    for name, value in report["mean_similarity"].items():
        table.add_row(f"mean similarity to the query: {name}", "none" if value is None else f"{value:.3f}")
    table.add_row("mined negatives", f"{report['mined_negatives']:,}")
    table.add_row("rows with fewer than requested (kept)", f"{report['rows_with_too_few']:,} of {report['rows']:,}")
    table.add_row("rows with none (kept)", f"{report['rows_with_none']:,}")
    for reason, count in report["filtered"].items():
        if count:
            table.add_row(f"rejected: {reason}", f"{count:,}")
    return table


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "data mine",
        "mine hard negatives for pair rows with any model that embeds",
        "rows.jsonl --model runs/grit/export --out mined.jsonl --negatives 7 --skip 10",
        "After an interruption, the same command resumes where it stopped.",
    )
    parser.add_argument("source", help="pair rows: a file, a folder, hub:NAME[:SUBSET] or builtin:pydocs")
    parser.add_argument(
        "--model", required=True, help="a run or its export, a sentence-transformers folder, or a Hub name of either"
    )
    parser.add_argument("--out", type=Path, required=True, help="the .jsonl file to write (a folder, for a folder of files)")
    parser.add_argument("--corpus", help="a file or folder of texts to mine from as well")
    parser.add_argument("--shard", default="1/1", metavar="i/n", help="this process's part of the work (1/1)")
    _add_choice(parser.add_argument_group("which negatives"))
    rows = parser.add_argument_group("reading the rows")
    rows.add_argument("--split", help="split of a Hub or built-in data set (train), or of a folder by the names of its files")
    rows.add_argument("--columns", default="", metavar="FIELD=COLUMN,...", help="where names differ")
    rows.add_argument("--limit", type=positive, help="at most this many rows, a seeded choice")
    rows.add_argument("--instruction", help="instruction for queries without one; written to the rows")
    rows.add_argument("--document-instruction", help="instruction for documents without one; written to the rows")
    rows.add_argument("--skip-empty", action="store_true", help="leave out rows with an empty text, and count them")
    model = parser.add_argument_group("the model")
    add_device_options(model)
    model.add_argument("--max-tokens", type=positive, help="limit of a text with its prompt; by default the model's own")
    model.add_argument("--batch-size", type=positive, default=32, help="texts per forward, sentence-transformers only (32)")
    model.add_argument("--query-prompt", help="for sentence-transformers: put before queries; {instruction} is the row's")
    model.add_argument("--document-prompt", help="the same for documents")
    model.add_argument("--cache", type=Path, help="folder for embeddings ($UNIFIED_LM_CACHE/vectors)")
    return parser


def _add_choice(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--negatives", type=positive, default=7, help="mined per row (7)")
    group.add_argument("--skip", type=whole, default=0, help="skip this many best-ranked documents (0)")
    group.add_argument("--depth", type=positive, default=100, help="consider this many documents per query (100)")
    group.add_argument(
        "--max-fraction",
        type=from_zero,
        default=0.95,
        help="maximum score of a negative as a fraction of the positive's (0.95; 0: no limit)",
    )
    group.add_argument("--margin", type=from_zero, help="minimum difference between the positive's score and a negative's")
    group.add_argument("--max-score", type=finite, help="maximum similarity of a negative")
    group.add_argument("--min-score", type=finite, help="minimum similarity of a negative")
    group.add_argument(
        "--near-duplicate",
        type=from_zero,
        default=0.8,
        help="reject documents with this Jaccard similarity of word triples to a positive (0.8; 0: only equal texts)",
    )
    group.add_argument(
        "--sampling", choices=[kind.value for kind in Sampling], default="top", help="which of the remaining candidates (top)"
    )
    group.add_argument("--given", choices=[kind.value for kind in Given], default="keep", help="the rows' own negatives (keep)")
    group.add_argument("--seed", type=whole, default=42, help="seed of the sampling (42)")


@contextmanager
def _progress() -> Iterator[Report | None]:
    """One progress bar per kind of work, on stderr; None if stderr is not a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        tasks: dict[str, TaskID] = {}

        def show(what: str, done: int, total: int) -> None:
            """Update the bar of one kind of work, which appears with its first report."""
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done)

        yield show
