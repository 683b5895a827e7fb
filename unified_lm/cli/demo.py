"""`unified-lm demo`: train the embedded model with GRIT, then search and answer with the export, also from an index."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from unified_lm.cli.script import train
from unified_lm.composition.compose import from_yaml
from unified_lm.config.schema import RunConfig
from unified_lm.core.errors import ConfigError
from unified_lm.data.rows.records import PairRecord, RecordKind
from unified_lm.data.sources import open_source
from unified_lm.engine.metrics import held_out
from unified_lm.inference import UnifiedLM
from unified_lm.reporting.curves import plot_run
from unified_lm.retrieval.index import Index

RECIPE = "grit_smollm2"
SEARCHES = (
    "remove duplicate elements from an array",
    "read a file of comma separated values",
    "compute the inverse of a square matrix",
)
QUESTION = "What does shutil.copyfile do?"
INDEXED = 40
"""Held-out documents that are read into an index."""


def demo(argv: Sequence[str]) -> None:
    """Run the demo; `argv` may override any key of the recipe (`max_steps=10 run_dir=...`).

    Prints what changed on held-out data, three searches, one generated answer, and one from documents, plain and cached.
    """
    started = time.perf_counter()
    run_dir = train([f"recipe={RECIPE}", f"run_dir=runs/demo-{time.strftime('%Y%m%d-%H%M%S')}", *argv])
    console = Console()
    console.print(measurements(run_dir))
    model = UnifiedLM.from_pretrained(run_dir / "export")
    _search(model, run_dir, console)
    _answer(model, console)
    _answer_from_index(model, run_dir, console)
    console.print(f"\nplot    {plot_run(run_dir)}\nexport  {run_dir / 'export'}", highlight=False, soft_wrap=True)
    console.print(f"{(time.perf_counter() - started) / 60:.1f} minutes", highlight=False)


def measurements(run_dir: Path) -> Table:
    """Held-out measurements of a run before and after training, as a table."""
    before, after = held_out(run_dir)
    table = Table(title="held-out data", title_justify="left")
    for column in ("", "before", "after", "change"):
        table.add_column(column, justify="left" if not column else "right")
    for key, name in (
        ("retrieval/ndcg@10", "retrieval nDCG@10, bidirectional"),
        ("retrieval/recall@1", "retrieval recall@1, bidirectional"),
        ("retrieval_causal/ndcg@10", "retrieval nDCG@10, same weights read causally"),
        ("heldout/generation", "answer loss, causal (nats per token)"),
        ("heldout/embedding", "contrastive loss, bidirectional"),
    ):
        if key in before and key in after:
            change = after[key] - before[key]
            table.add_row(name, f"{before[key]:.3f}", f"{after[key]:.3f}", f"{change:+.3f}")
    return table


def _held_out_pairs(run_dir: Path) -> list[PairRecord]:
    config = from_yaml(run_dir / "config.yaml")
    assert isinstance(config, RunConfig)
    retrieval = config.validation.retrieval
    assert retrieval is not None, "the demo's recipe measures retrieval"
    source = open_source(retrieval.queries, RecordKind.PAIR, config.seed)
    return [record for record in source if isinstance(record, PairRecord)]


def _search(model: UnifiedLM, run_dir: Path, console: Console) -> None:
    """Three searches among the held-out documents."""
    pairs = _held_out_pairs(run_dir)
    texts = list(dict.fromkeys(pair.positives[0].text for pair in pairs))
    console.print(f"\n[bold]search[/] among {len(texts)} held-out docstrings")
    for query, hits in zip(SEARCHES, model.search(SEARCHES, texts, 3, pairs[0].query.instruction), strict=True):
        console.print(f"  {query}", style="bold", highlight=False)
        for hit in hits:
            found = " ".join(texts[hit.index].split())[:90]
            console.print(f"    {hit.score:.3f}  {found}", highlight=False, markup=False, soft_wrap=True)


def _answer(model: UnifiedLM, console: Console) -> None:
    answer = model.generate([{"role": "user", "content": QUESTION}], max_new_tokens=60)
    console.print("\n[bold]answer[/], from the same weights")
    console.print(f"  {QUESTION}\n  {answer}", highlight=False, markup=False, soft_wrap=True)


def _answer_from_index(model: UnifiedLM, run_dir: Path, console: Console) -> None:
    """The first held-out question, answered from documents: read as a whole, and from their stored keys and values."""
    pairs = _held_out_pairs(run_dir)[:INDEXED]
    try:
        index = Index.create(run_dir / "index", model, name=str(run_dir / "export"))
    except ConfigError as missing:  # the vector engine is an extra of its own
        console.print(f"\nno answer from an index: {missing}", highlight=False, markup=False, soft_wrap=True)
        return
    with index:
        index.add(pair.positives[0].text for pair in pairs)
        console.print(
            f"\n[bold]answer from an index[/] of {len(index)} documents, {index.num_bytes / 1e6:.0f} MB of keys and values"
        )
        console.print(f"  {pairs[0].query.text}", style="bold", highlight=False, markup=False)
        for mode in ("document_then_query", "document_cache"):
            answer = index.answer(
                pairs[0].query.text, k=3, mode=mode, instruction=pairs[0].query.instruction, max_new_tokens=40
            )
            told = f"{answer.prompt_tokens - answer.cached_tokens} of {answer.prompt_tokens} prompt tokens read"
            told = f"  {mode}: first token after {answer.first_token_seconds:.2f} s, {told}"
            console.print(f"{told}\n    {' '.join(answer.text.split())}", highlight=False, markup=False, soft_wrap=True)
