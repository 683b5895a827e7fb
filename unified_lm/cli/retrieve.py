"""`unified-lm index | ask | chat`: documents that a model has read, and answers from them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from unified_lm.cli.arguments import add_device_options, command_parser, from_zero, positive, read_stdin
from unified_lm.core.errors import ConfigError
from unified_lm.retrieval.manifest import IndexManifest, check_place

if TYPE_CHECKING:
    from unified_lm.inference import UnifiedLM
    from unified_lm.retrieval.answering import Answer
    from unified_lm.retrieval.documents import Document
    from unified_lm.retrieval.index import Index

_MODES = (
    "modes (--mode): auto, no_retrieval, document_then_query, query_then_document (read all of it), document_cache, "
    "query_cache,\ndocument_query_cache, query_document_cache (the named parts come from a cache). docs/cached-texts.md has a "
    "picture of each."
)


def index(argv: Sequence[str]) -> None:
    """Make an index of documents, or add to one."""
    options = _index_parser().parse_args(list(argv))
    if options.budget_gb == 0:
        raise ConfigError("--budget-gb: 0 stores nothing; expected more, or --states none.")
    check_place(options.out)
    documents = _documents(options)
    first = list(islice(documents, 1))  # texts that cannot be read make no index
    model = _load(options.model, options)
    from unified_lm.batch import seeing_attention
    from unified_lm.retrieval.index import Index

    states = {
        "embedded": [model.attention],
        "causal": ["causal"],
        "both": [seeing_attention(model.attention), "causal"],
        "none": [],
    }
    with Index.create(
        options.out,
        model,
        name=str(Path(options.model).resolve()) if Path(options.model).exists() else options.model,
        engine=options.engine,
        address=options.address,
        states=states[options.states],
        form=options.form,
        budget_bytes=None if options.budget_gb is None else int(options.budget_gb * 1e9),
        max_tokens=options.max_tokens,
        on_long=options.on_long,
    ) as made:
        columns = (SpinnerColumn(), TextColumn("reading documents"), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
            task = bar.add_task("reading", total=options.limit)
            added = made.add(chain(first, documents), lambda count: bar.update(task, advance=count))
        speed = f"{added.tokens / added.seconds:,.0f} tokens/s" if added.seconds else ""
        told = [f"{getattr(added, name):,} {name}" for name in ("added", "unchanged", "cut", "split")]
        print(f"{options.out}: {len(made):,} documents, {made.num_bytes / 1e9:.2f} GB of keys and values")
        if added.cut:
            limit = f"{added.cut:,} documents are longer than {made.max_tokens} tokens and were cut"
            Console(stderr=True).print(f"{limit}: --max-tokens reads more of them, --on-long split all", highlight=False)
        print(f"{', '.join(told)}; {added.tokens:,} tokens in {added.seconds:.1f} s, {speed}")


def _index_parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "index",
        "read documents with a model, and keep what searching them and answering from them needs.\n"
        "Started again after an interruption it goes on; documents that are there already are passed over.",
        "docs/ notes.jsonl --model runs/grit/export --out runs/index",
    )
    parser.add_argument(
        "files", nargs="+", help="jsonl, csv, parquet, txt (a document per line), md, a folder, or builtin:pydocs"
    )
    parser.add_argument("--model", required=True, help="a run or its export folder, or a Hub name")
    parser.add_argument("--out", type=Path, required=True, help="folder of the index")
    parser.add_argument("--column", default="text", help="column of rows that holds the text (text)")
    parser.add_argument("--limit", type=positive, default=None, help="most documents; all if left out")
    parser.add_argument("--engine", default="lance", help="vector engine: lance or qdrant (lance)")
    parser.add_argument("--address", default="", help="http address of the engine's server; a folder of the index if left out")
    parser.add_argument(
        "--states",
        choices=("embedded", "causal", "both", "none"),
        default="embedded",
        help="what is kept of documents for answers: as they are embedded, as causal text, both, or none (embedded)",
    )
    parser.add_argument(
        "--form", default="bfloat16", help="of keys and values on disk: float32, bfloat16, float16, int8 (bfloat16)"
    )
    parser.add_argument(
        "--budget-gb", type=from_zero, default=None, help="limit of keys and values on disk, in GB; none if left out"
    )
    parser.add_argument("--max-tokens", type=positive, default=None, help="limit of a document; the model's own if left out")
    parser.add_argument("--on-long", choices=("cut", "split"), default="cut", help="what becomes of longer ones (cut)")
    add_device_options(parser, dtype="auto")
    return parser


def _documents(options: argparse.Namespace) -> Iterator[Document]:
    from unified_lm.retrieval.files import read_documents

    left = options.limit
    for named in options.files:
        for document in read_documents(named, options.column):
            if left == 0:
                return
            left = None if left is None else left - 1
            yield document


def ask(argv: Sequence[str]) -> None:
    """Answer one question from an index."""
    parser = _answer_parser(
        "ask", "answer a question from the documents of an index", 'runs/index "What does shutil.copyfile do?"'
    )
    parser.add_argument("question", help='the question; "-" reads it from stdin')
    parser.add_argument("--compare", action="store_true", help="also answer without caches, and show the time of both")
    options = parser.parse_args(list(argv))
    question = read_stdin() if options.question == "-" else options.question
    console = Console(stderr=True)
    with _open(options) as opened:
        answer = _answer(opened, question, options, ())
        show(answer, console)
        if options.compare:
            plain = opened.answer(question, k=options.k, mode="document_then_query", max_new_tokens=options.max_new_tokens)
            console.print(f"without caches ({plain.mode}): {plain.text}", highlight=False, markup=False, soft_wrap=True)
            ratio = plain.first_token_seconds / answer.first_token_seconds
            console.print(
                f"to the first token: {answer.first_token_seconds:.2f} s, without caches {plain.first_token_seconds:.2f} s "
                f"({ratio:.1f} times as long)",
                highlight=False,
            )


def chat(argv: Sequence[str]) -> None:
    """Answer questions from an index until the input ends."""
    parser = _answer_parser(
        "chat", "talk with the documents of an index; an empty line or the end of input ends it", "runs/index"
    )
    options = parser.parse_args(list(argv))
    console = Console(stderr=True)
    with _open(options) as opened:
        history: list[tuple[str, str]] = []
        while True:
            console.print("> ", end="")
            question = read_stdin(line=True).strip()
            if not question:
                return
            answer = _answer(opened, question, options, tuple(history))
            show(answer, console)
            history += [("user", question), ("assistant", answer.text)]


def show(answer: Answer, console: Console) -> None:
    """Print what an answer was made of."""
    for number, passage in enumerate(answer.passages, start=1):
        text = " ".join(passage.document.text.split())[:100]
        console.print(
            f"[{number}] {passage.score:.3f}  {passage.document.origin}  {text}", highlight=False, markup=False, soft_wrap=True
        )
    mode = f"{answer.mode} ({answer.states})" if answer.states else answer.mode
    read = answer.prompt_tokens - answer.cached_tokens
    console.print(
        f"{mode}: {answer.cached_tokens:,} of {answer.prompt_tokens:,} prompt "
        f"tokens from the cache, {read:,} read; search {answer.search_seconds:.2f} s, first token after "
        f"{answer.first_token_seconds:.2f} s, all {answer.seconds:.2f} s",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _answer_parser(name: str, description: str, example: str) -> argparse.ArgumentParser:
    parser = command_parser(name, description, example, _MODES)
    parser.add_argument("index", type=Path, help="folder of the index")
    parser.add_argument("--model", default=None, help="the model, where it is no longer where it was")
    parser.add_argument("-k", type=positive, default=1, help="documents that an answer is given (1)")
    parser.add_argument("--mode", default="auto", help="what comes from a cache (auto: what is stored, and long questions)")
    parser.add_argument(
        "--states", default=None, help="bidirectional, bidirectional_keep_first or causal; as the index keeps them if left out"
    )
    parser.add_argument("--rerank", default=None, help="pointwise or listwise: reorder the passages first; not, if left out")
    parser.add_argument("--candidates", type=positive, default=20, help="passages that are reranked (20)")
    parser.add_argument("--max-new-tokens", type=positive, default=256, help="limit of the answer in tokens (256)")
    parser.add_argument(
        "--temperature", type=from_zero, default=0.0, help="sampling temperature; 0.0 (the default) takes the most likely token"
    )
    add_device_options(parser, dtype="auto")
    return parser


def _answer(opened: Index, question: str, options: argparse.Namespace, history: tuple[tuple[str, str], ...]) -> Answer:
    from unified_lm.retrieval.rerank import Reranker

    answer = opened.answer(
        question,
        k=options.k,
        mode=options.mode,
        states=options.states,
        rerank=None if options.rerank is None else Reranker(opened.model, options.rerank),
        candidates=options.candidates,
        history=history,
        max_new_tokens=options.max_new_tokens,
        on_text=lambda text: print(text, end="", flush=True),
        temperature=options.temperature,
    )
    print()
    return answer


def _open(options: argparse.Namespace) -> Index:
    from unified_lm.retrieval.index import Index

    manifest = IndexManifest.load(options.index)
    name = options.model or manifest.model
    return Index.open(options.index, _load(name, options) if name else None)


def _load(name: str, options: argparse.Namespace) -> UnifiedLM:
    from unified_lm.inference import UnifiedLM  # takes seconds to import, which --help can do without

    return UnifiedLM.from_pretrained(name, device=options.device, dtype=options.dtype)
