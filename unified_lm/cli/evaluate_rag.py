"""`unified-lm eval rag`: answers from documents, in every mode."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from unified_lm.cli.arguments import command_parser, positive, whole
from unified_lm.cli.evaluate_model import EvaluatedModel, add_model_options, find_model, plain_table, progress_bar
from unified_lm.config.streams import SourceConfig
from unified_lm.core.errors import CheckpointError, DataError, OutputError, UserError, did_you_mean
from unified_lm.core.files import cache_dir
from unified_lm.core.folder_lock import hold_folder, release_folder
from unified_lm.core.outputs import check_files, write_json_file
from unified_lm.data.prompts.layouts import LAYOUTS
from unified_lm.data.rows.records import GroundedRecord, RecordKind
from unified_lm.data.sources import open_source
from unified_lm.evaluation.generation.grounded import ModeScores, as_dict, corpus, loss_beside, measure_mode, retrieve
from unified_lm.evaluation.result_table import FOLDER
from unified_lm.retrieval.documents import Passage
from unified_lm.retrieval.index import Index
from unified_lm.retrieval.rerank import METHODS, Reranker
from unified_lm.retrieval.stored import STATES

_DATA = "builtin:pydocs:grounded"
_PLAIN = "document_then_query"
"""What the other modes' losses are compared with, question by question."""


def evaluate_rag(argv: Sequence[str]) -> None:
    """Measure retrieval, and answers in every mode.

    Raises:
        UserError: an error in the arguments, the data or the model.
    """
    options = _parser().parse_args(list(argv))
    options.modes = options.modes or list(LAYOUTS)
    for mode in options.modes:
        if mode not in LAYOUTS:
            raise UserError(f"--modes: unknown mode '{mode}'.{did_you_mean(mode, LAYOUTS)}")
    console = Console(stderr=True)
    rows = _rows(options)
    model_ref = find_model(options.model)
    out = options.out or model_ref.beside / "rag.json"
    table_file = model_ref.beside / FOLDER / "rag.json"
    check_files([out, *([table_file] if model_ref.in_run else [])])
    with _index(options, model_ref, rows, console) as index:
        passages, recall, reranked = _passages(index, rows, options, console)
        given = [found[: options.k] for found in passages]
        scores = []
        for mode in options.modes:
            for states in options.states if LAYOUTS[mode].blocks else options.states[:1]:
                total = min(options.generate, len(rows))
                with progress_bar(f"{mode} ({states}): answers", total, console) as advance:
                    measured = measure_mode(
                        index,
                        rows,
                        given,
                        mode,
                        states,
                        num_generated=options.generate,
                        max_new_tokens=options.max_new_tokens,
                        recompute=options.recompute,
                        reranked=options.rerank is not None,
                        progress=advance,
                    )
                scores.append(measured)
        stored = index.num_bytes
    result: dict[str, Any] = {"model": model_ref.name, "revision": model_ref.revision, "questions": len(rows), "k": options.k}
    result |= {"recall": {str(key): value for key, value in recall.items()}, "bytes": stored}
    if reranked:
        result |= {"rerank": options.rerank, "reranked_recall": {str(key): value for key, value in reranked.items()}}
    plain = next((each for each in scores if each.mode == _PLAIN), None)
    write_json_file(out, {**result, "modes": [as_dict(each, plain) for each in scores]})
    told = ", ".join(f"recall@{key} {value:.3f}" for key, value in recall.items())
    if reranked:
        told += f"; reranked {options.rerank}: " + ", ".join(f"{key}: {value:.3f}" for key, value in reranked.items())
    if options.recompute:
        told += f"; the first {options.recompute} tokens of later blocks read again"
    table = _table(scores, f"Answers from {options.k} documents: {model_ref.name} @ {model_ref.revision[:12]}; {told}")
    if model_ref.in_run:
        note = f"{len(rows)} questions; 95 % intervals over questions; {told}; {stored / 1e6:.0f} MB of keys and values."
        plain_table(table, note).save(table_file)
    Console().print(table)
    print(f"results: {out}")


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "eval rag",
        "answers from documents that were read before: quality and time to the first token, in every mode",
        "runs/rag --limit 100 --modes document_then_query document_cache",
        f"modes: {', '.join(LAYOUTS)}",
    )
    add_model_options(parser)
    add = parser.add_argument
    add("--data", default=_DATA, help=f"grounded rows: a file, hub:NAME or built-in rows, held-out split ({_DATA})")
    add("--modes", nargs="+", default=None, metavar="MODE", help="which modes; all of them if left out")
    add("--states", nargs="+", choices=STATES, default=["bidirectional", "causal"], help="of blocks (bidirectional causal)")
    add("-k", type=positive, default=3, help="documents that an answer is given (3)")
    add("--depth", type=positive, default=10, help="passages that retrieval is measured on (10)")
    add(
        "--rerank",
        choices=METHODS,
        default=None,
        help="rerank the --depth passages, once; times to the first token leave it out",
    )
    add("--recompute", type=whole, default=0, help="first tokens of every block but the first that are read again (0)")
    add("--limit", type=positive, default=200, help="most questions (200)")
    add("--generate", type=whole, default=50, help="for so many questions an answer is generated; 0 measures losses only (50)")
    add("--max-new-tokens", type=positive, default=64, help="limit of a generated answer (64)")
    add("--max-tokens", type=positive, default=None, help="limit of a document; the model's own if left out")
    add("--out", type=Path, default=None, help="result file (default: rag.json beside the export)")
    return parser


def _rows(options: argparse.Namespace) -> list[GroundedRecord]:
    config = SourceConfig.from_text(options.data)
    if config.path is None:
        config = replace(config, split=config.split or "test")
    source = open_source(replace(config, limit=options.limit), RecordKind.GROUNDED, seed=0)
    rows = [record for record in source if isinstance(record, GroundedRecord)]
    if len(rows) < 2:
        raise DataError(f"{options.data} has {len(rows)} questions; an interval needs at least 2.")
    return rows


def _index(options: argparse.Namespace, model_ref: EvaluatedModel, rows: list[GroundedRecord], console: Console) -> Index:
    """An index of the rows' documents, kept in the cache folder: measuring again does not read them again."""
    model, documents = model_ref.load(options, template="grit"), list(corpus(rows))
    states = tuple(sorted(options.states))
    said = [
        model.embedding_key,
        str(options.max_tokens or model.max_tokens),
        *states,
        *sorted(document.id for document in documents),
    ]
    folder = cache_dir("rag", blake2b("\x1f".join(said).encode(), digest_size=16).hexdigest())
    hold_folder(folder)  # first: one that another process fills is not damaged
    try:
        index = Index.create(folder, model, states=states, max_tokens=options.max_tokens)
    except (CheckpointError, OutputError) as error:
        console.print(f"note: the cached index cannot be opened, and is made again: {error}", highlight=False, soft_wrap=True)
        shutil.rmtree(folder)
        index = Index.create(folder, model, states=states, max_tokens=options.max_tokens)
    finally:
        release_folder(folder)
    with progress_bar("reading documents", len(documents), console) as advance:
        index.add(documents, advance)
    return index


def _passages(
    index: Index, rows: list[GroundedRecord], options: argparse.Namespace, console: Console
) -> tuple[list[list[Passage]], dict[int, float], dict[int, float]]:
    """The passages of every question, and recall before and after reranking (empty without)."""
    depth = max(options.k, options.depth)
    passages, recall = retrieve(index, rows, depth)
    if options.rerank is None:
        return passages, recall, {}
    with progress_bar(f"reranking {depth} passages", len(rows), console) as advance:
        passages, reranked = retrieve(index, rows, depth, Reranker(index.model, options.rerank), advance)
    return passages, recall, reranked


def _table(scores: Sequence[ModeScores], title: str) -> Table:
    plain = next((each for each in scores if each.mode == _PLAIN), None)
    columns = (
        "mode",
        "states",
        "answer loss",
        "beside plain",
        "exact match",
        "F1",
        "first token, s",
        "prompt tokens",
        "cached",
    )
    table = Table(*columns, title=title, title_justify="left")
    for each in scores:
        seconds = "" if each.first_token_seconds is None else f"{each.first_token_seconds:.3f}"
        beside = None if plain in (None, each) else loss_beside(each, plain)
        intervals = (each.loss, beside, each.exact_match, each.f1)
        cells = ["" if value is None else f"{value.value:.3f} [{value.low:.3f}, {value.high:.3f}]" for value in intervals]
        table.add_row(each.mode, each.states, *cells, seconds, f"{each.prompt_tokens:.0f}", f"{each.cached_tokens:.0f}")
    return table
