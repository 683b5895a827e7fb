"""`unified-lm embed`: the vectors of a corpus, in a folder that any number of processes fill."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from unified_lm.cli.arguments import add_device_options, add_embedding_options, command_parser, embedding_options, positive
from unified_lm.core import distributed
from unified_lm.retrieval.vector_folder import FORMS, SHARD_ROWS, check_place
from unified_lm.retrieval.vector_work import DOCUMENTS, VECTORS


def embed(argv: Sequence[str]) -> None:
    """Embed documents into a folder."""
    options = _parser().parse_args(list(argv))
    check_place(options.out)
    distributed.terminate_with_agent()
    from unified_lm.inference import UnifiedLM
    from unified_lm.retrieval.files import read_documents
    from unified_lm.retrieval.vector_folder import embed_documents

    chosen = {"device": options.device, "dtype": options.dtype, **embedding_options(options)}
    model = UnifiedLM.from_pretrained(options.model, **chosen)
    columns = (SpinnerColumn(), TextColumn("embedding"), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("embedding", total=None)
        done = embed_documents(
            options.out,
            model,
            lambda: (document for named in options.files for document in read_documents(named, options.column)),
            instruction=options.instruction,
            form=options.form,
            shard_rows=options.shard_rows,
            progress=lambda finished, total: bar.update(task, completed=finished, total=total),
        )
    cut = f", {done.truncated:,} of them cut to {model.max_tokens} tokens" if done.truncated else ""
    speed = f" ({done.own_tokens / done.seconds:,.0f} tokens/s)" if done.own_tokens else ""
    print(
        f"{options.out / VECTORS}: {done.rows:,} vectors of {model.embedding_dim} dimensions{cut}; ids in {DOCUMENTS}\n"
        f"embedded here: {done.own_rows:,} texts, {done.own_tokens:,} tokens in {done.seconds:.1f} s{speed}"
    )


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "embed",
        "embed documents into DIR/vectors.npy, which numpy maps into memory; ids of its rows are in DIR/documents.parquet.\n"
        "Started again after an interruption it goes on. Several processes fill one folder together: torchrun on many GPUs,\n"
        "or the same command on machines that share it.",
        "corpus/ --model runs/grit/export --out vectors",
        "on many GPUs: torchrun --nproc-per-node 8 -m unified_lm embed FILES ...",
    )
    parser.add_argument(
        "files", nargs="+", help="jsonl, csv, parquet, txt (a document per line), md, a folder, or builtin:pydocs"
    )
    parser.add_argument("--model", required=True, help="a run or its export folder, or a Hub name")
    parser.add_argument("--out", type=Path, required=True, help="folder of the vectors")
    parser.add_argument("--column", default="text", help="column of rows that holds the text (text)")
    parser.add_argument("--instruction", default="", help="the task, for queries; none, as for documents, if left out")
    parser.add_argument("--form", choices=FORMS, default="float32", help="of the vectors on disk (float32)")
    parser.add_argument("--shard-rows", type=positive, default=SHARD_ROWS, help=f"texts of a piece of work ({SHARD_ROWS})")
    add_embedding_options(parser)
    add_device_options(parser, dtype="auto")
    return parser
