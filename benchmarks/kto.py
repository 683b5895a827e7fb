"""Effect of KTO on the embedded model, or on a finished run of it: held-out preferences and retrieval, before and after.

Trains `recipe=kto_smollm2` (the same command again resumes it), reads the held-out log-probabilities that the run measured
before its first and after its last step, and measures retrieval over held-out docstrings (nDCG@10 and recall@1, bidirectional,
with the settings of `grit_smollm2`) for the initial and the exported weights.

Usage: python benchmarks/kto.py --out DIR [--start RUN_OR_EXPORT] [--queries 200] [key=value ...]

`key=value` are further arguments of the recipe, such as max_steps=40 or optim.learning_rate=1e-4.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from unified_lm.cli.main import run_command
from unified_lm.cli.script import train
from unified_lm.composition.compose import compose_run
from unified_lm.config.schema import ModelConfig
from unified_lm.core import distributed
from unified_lm.core.errors import DataError
from unified_lm.core.files import write_json
from unified_lm.data.retrieval import build_retrieval
from unified_lm.engine.metrics import held_out
from unified_lm.models.backbone import Backbone
from unified_lm.models.embedding import embed_samples
from unified_lm.models.loading import load_model
from unified_lm.objectives.ranking import ndcg_at_k, recall_at_k

STREAM = "heldout/preference"
SHOWN = (
    "log_probability_desirable",
    "log_probability_undesirable",
    "log_ratio_desirable",
    "log_ratio_undesirable",
    "margin",
    "accuracy",
    "kl",
)


def retrieval(start: str | None, queries: int) -> dict[str, float]:
    """nDCG@10 and recall@1 of a model over held-out docstrings, bidirectional.

    Args:
        start: a run or an export; None for the original embedded model.
        queries: number of held-out pairs that serve as queries and documents.
    """
    config = compose_run(["recipe=grit_smollm2", f"validation.retrieval.queries.limit={queries}"])
    model: ModelConfig = replace(config.model, init_from=start)
    loaded = load_model(model)
    task = build_retrieval(config, loaded.tokenizer)
    assert task is not None, "grit_smollm2 measures retrieval"
    vectors = embed_samples(
        Backbone(loaded.causal_lm, model.attention_kernel).to(distributed.local_device()),
        [*task.queries, *task.documents],
        model.pooling,
        token_budget=config.packing.token_budget,
        device=distributed.local_device(),
        normalize=True,
    )
    scores = vectors[: len(task.queries)] @ vectors[len(task.queries) :].T
    return {"ndcg@10": ndcg_at_k(scores, task.relevant, 10), "recall@1": recall_at_k(scores, task.relevant, 1)}


def measure(out: Path, start: str | None, queries: int, overrides: list[str]) -> dict[str, Any]:
    """Train or resume, measure, and return the content of `kto.json`."""
    started = time.perf_counter()
    arguments = ["recipe=kto_smollm2", f"run_dir={out / 'run'}", "resume=auto", "checkpoint.every=10", *overrides]
    if start is not None:
        arguments.append(f"model.init_from={start}")
    run_dir = train(arguments)
    training_seconds = time.perf_counter() - started
    before, after = held_out(run_dir)
    if not before:
        raise DataError(f"{run_dir} has no held-out measurements of its first and last step. Start again in an empty folder.")
    results: dict[str, dict[str, float]] = {
        name: {"before": before[f"{STREAM}/{name}"], "after": after[f"{STREAM}/{name}"]} for name in SHOWN
    }
    results["loss"] = {"before": before[STREAM], "after": after[STREAM]}
    found = {"before": retrieval(start, queries), "after": retrieval(str(run_dir), queries)}
    results |= {name: {when: found[when][name] for when in found} for name in ("ndcg@10", "recall@1")}
    return {
        "start": start or "embedded model",
        "arguments": arguments,
        "results": results,
        "queries": queries,
        "seconds_of_the_last_call": training_seconds,
        "device": str(distributed.local_device()),
        "threads": torch.get_num_threads(),
    }


def show(report: dict[str, Any], console: Console) -> None:
    """Print the table."""
    table = Table(title=f"KTO from {report['start']}: held-out rows, log-probabilities in nats", title_justify="left")
    for name in ("", "before", "after", "change"):
        table.add_column(name, justify="left" if not name else "right")
    for name, values in report["results"].items():
        before, after = values["before"], values["after"]
        table.add_row(name, f"{before:.3f}", f"{after:.3f}", f"{after - before:+.3f}")
    console.print(table)


def main() -> None:
    """Parse arguments, run, write `OUT/kto.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run and of kto.json")
    parser.add_argument("--start", help="a finished run or an export to start from; left out: the embedded model")
    parser.add_argument("--queries", type=int, default=200, help="held-out pairs of the retrieval")
    parser.add_argument("overrides", nargs="*", help="key=value arguments of the recipe")
    options = parser.parse_args()
    report = measure(options.out, options.start, options.queries, options.overrides)
    write_json(options.out / "kto.json", report)
    show(report, Console())


if __name__ == "__main__":
    sys.exit(run_command(main))
