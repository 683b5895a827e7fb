"""What LLM2Vec's stages, and echo embeddings, give on the embedded model: sentence similarity, retrieval, and tagging of words.

Arms: the untrained model read causally ("uni"), bidirectionally ("bi") and with every text repeated ("echo": causal, the prompt
"Rewrite the sentence: TEXT, rewritten sentence: TEXT", pooling the second copy; arXiv:2402.15449), "uni" and "bi" behind the
begin of text that the chain trains with, and the two stages of chains trained by `benchmarks/llm2vec_chain.py` ("bi + MNTP",
"bi + MNTP + SimCSE"; one chain a seed). Mean pooling, no instruction.

Tasks:
- STS-B dev: Spearman correlation of cosine and human scores (a file in SentEval's format), times 100;
- pydocs retrieval: nDCG@10 of held-out docstring summaries that search their bodies, times 100; the same queries in every arm;
- words: a linear probe on frozen word vectors predicts the kind of every word of Python source code (`word_level_code`),
  accuracy times 100, from the word's own token and from the token before it. Sentences stand there once: no number for echo.

Seeds: a chain's seed decides order, masks and dropout of its training. The untrained arms have no randomness at all (the
queries are a fixed choice, the probe is convex), so they have one number. Intervals: 95 % bootstrap over the task's items,
seeds averaged; for words the mean of the seeds' own intervals.

Every score is saved when it is there (OUT/scores), with hashes of the model's weights and of the data; the same command again
goes on from what is missing. The words are source code of the interpreter itself, so their hash changes with Python's version.

Usage: python benchmarks/arms.py STS_DEV.csv RUN_DIR... --out DIR [--tasks sts retrieval words] [--queries 300] [--base MODEL]
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr

from unified_lm import UnifiedLM
from unified_lm.cli.main import run_command
from unified_lm.composition.convert import from_yaml
from unified_lm.config.schema import ModelConfig, RunConfig, SourceConfig
from unified_lm.core.errors import DataError
from unified_lm.core.files import write_json, write_text
from unified_lm.data.rows.records import PairRecord, RecordKind
from unified_lm.data.sources import open_source
from unified_lm.evaluation.bootstrap import bootstrap_interval
from unified_lm.evaluation.words.code import code_words
from unified_lm.evaluation.words.scores import most_frequent_tags, tag_scores
from unified_lm.evaluation.words.tasks import word_level_scores
from unified_lm.export.manifest import hash_weights
from unified_lm.inference.loading import model_folder
from unified_lm.mining.embedders import folder_hash
from unified_lm.models.embedded import embedded_directory
from unified_lm.models.loading import load_model
from unified_lm.objectives.ranking import ndcg_per_query
from unified_lm.reporting.curves import PALETTE

MAX_TOKENS = 128
"""Limit of a text; under echo of either copy, and its prompt stands around them."""
ECHO_TOKENS = 2 * MAX_TOKENS + 16
TASKS = ("sts", "retrieval", "words")
ALIGNMENTS = ("same_token", "next_token")
STAGES = {"bi + MNTP": "1-*mntp", "bi + MNTP + SimCSE": "2-*simcse"}
QUERY_SEED = 0


@dataclass(frozen=True)
class Entry:
    """One model to measure.

    Attributes:
        arm: its row in the table.
        seed: of its training; None where nothing was trained.
        key: hash of its weights.
        load: loads it.
        max_tokens: limit of an embedded text with its prompt.
        former_key: what earlier scores of the same weights carry; None for none.
    """

    arm: str
    seed: int | None
    key: str
    load: Callable[[], UnifiedLM] = field(compare=False)
    max_tokens: int = MAX_TOKENS
    former_key: str | None = None

    @property
    def file_name(self) -> str:
        """Of its scores."""
        name = self.arm.replace(" + ", "-").replace(" ", "-").lower()
        return f"{name}.json" if self.seed is None else f"{name}-seed{self.seed}.json"


def untrained(base: str | None) -> list[Entry]:
    """The arms without training; those behind a begin of text are what the trained ones started from."""

    def load(attention: str, template: str) -> UnifiedLM:
        if base is not None:
            return UnifiedLM.from_pretrained(base, template=template, pooling="mean", attention=attention)
        loaded = load_model(ModelConfig(source="embedded", name="smollm2-135m", family="llama"))
        return UnifiedLM(loaded.causal_lm, loaded.tokenizer, template=template, pooling="mean", attention=attention)

    if base is None:
        # Scores used to carry this name; the package has had one set of weights, so they are still right.
        key, former = hash_weights(embedded_directory()), "embedded smollm2-135m"
    else:
        key, former = folder_hash(model_folder(base, None)), None  # a path said nothing about what it held
    arms = [
        ("uni", "causal", "plain", MAX_TOKENS),
        ("echo", "causal", "echo", ECHO_TOKENS),
        ("bi", "bidirectional", "plain", MAX_TOKENS),
        ("uni + begin of text", "causal", "plain_bos", MAX_TOKENS),
        ("bi + begin of text", "bidirectional", "plain_bos", MAX_TOKENS),
    ]
    return [
        Entry(arm, None, key, partial(load, attention, template), limit, former) for arm, attention, template, limit in arms
    ]


def trained(folders: Sequence[Path]) -> list[Entry]:
    """The stages of every chain.

    Raises:
        DataError: a folder has no finished first stage.
    """
    entries = []
    for folder in folders:
        found = 0
        for arm, pattern in STAGES.items():
            for stage in sorted(path for path in folder.glob(pattern) if (path / "export").is_dir()):
                config = from_yaml(stage / "config.yaml")
                assert isinstance(config, RunConfig)
                export = stage / "export"
                entries.append(
                    Entry(arm, config.seed, folder_hash(export), lambda export=export: UnifiedLM.from_pretrained(export))
                )
                found += 1
        if not found:
            raise DataError(f"{folder} holds no finished stage of a chain ({' or '.join(STAGES.values())} with an export).")
    twice = [(entry.arm, entry.seed) for entry in entries]
    if len(set(twice)) < len(twice):
        raise DataError(f"two chains have the same seed: {sorted({entry.seed for entry in entries})}; give every seed once.")
    return sorted(entries, key=lambda entry: (list(STAGES).index(entry.arm), entry.seed))


# --- tasks -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tasks:
    """The data of all tasks.

    Attributes:
        sts: rows of SentEval's file (score in column 4, sentences in 5 and 6).
        pairs: held-out docstrings.
        key: hash of the data, so that scores of other data are not mixed in.
    """

    sts: list[list[str]]
    pairs: list[PairRecord]
    key: str

    @property
    def gold(self) -> np.ndarray:
        """Human similarity scores, float64 `[N]`."""
        return np.array([float(row[4]) for row in self.sts])


def load_tasks(sts: Path, num_queries: int) -> Tasks:
    """Read the tasks' data."""
    with open(sts, encoding="utf-8", newline="") as handle:
        rows = [row for row in csv.reader(handle, delimiter="\t", quoting=csv.QUOTE_NONE) if len(row) >= 7]
    if len(rows) < 2:
        raise DataError(f"{sts} has no rows of seven tab-separated columns.")
    source = open_source(SourceConfig(builtin="pydocs", split="test", limit=num_queries), RecordKind.PAIR, QUERY_SEED)
    pairs = [record for record in source if isinstance(record, PairRecord)]
    texts = [*(cell for row in rows for cell in row[4:7]), *(f"{p.query.text}\0{p.positives[0].text}" for p in pairs)]
    return Tasks(rows, pairs, blake2b("\0".join(texts).encode(), digest_size=8).hexdigest())


def sts_cosines(model: UnifiedLM, tasks: Tasks, limit: int) -> list[float]:
    """Cosine of every pair of sentences."""
    texts = [row[5] for row in tasks.sts] + [row[6] for row in tasks.sts]
    vectors = model.encode(texts, normalize=True, max_tokens=limit, show_progress=sys.stderr.isatty())
    return np.sum(vectors[: len(tasks.sts)] * vectors[len(tasks.sts) :], axis=1).astype(float).tolist()


def retrieval_scores(model: UnifiedLM, tasks: Tasks, limit: int) -> list[float]:
    """nDCG@10 of every query; all the queries' documents are searched."""
    settings: dict[str, Any] = {"normalize": True, "max_tokens": limit, "output": "torch", "show_progress": sys.stderr.isatty()}
    queries = model.encode([pair.query.text for pair in tasks.pairs], **settings)
    documents = model.encode([pair.positives[0].text for pair in tasks.pairs], **settings)
    relevant = [{index} for index in range(len(tasks.pairs))]
    return [float(score) for score in ndcg_per_query(torch.as_tensor(queries @ documents.T), relevant, 10)]


def word_scores(model: UnifiedLM) -> dict[str, dict[str, float]]:
    """Accuracy by alignment, with its interval and that of guessing each word's most frequent tag."""
    found = word_level_scores(model, code_words(), tasks=("pos",), alignments=ALIGNMENTS)["pos"]
    return {name: {key: float(found[name][key]) for key in ("score", "low", "high", "baseline")} for name in ALIGNMENTS}


def words_identity() -> dict[str, str]:
    """Name, with Python's version, and hash of the tagged words."""
    data = code_words()
    return {"name": data.name, "key": data.key}


def require_same_words(scores: dict[str, Any], file: Path) -> None:
    """Check that saved scores of words are of the words that would be measured now.

    Scores from before their data were recorded hold the accuracy of guessing each word's most frequent tag, which needs no
    model: where it is what the present data give, to the last digit, the data are taken to be the same, and recorded.

    Raises:
        DataError: they are not.
    """
    data = code_words()
    if "words_data" not in scores:
        gold = [sentence.tags["pos"] for sentence in data.test]
        guessed = tag_scores("pos", gold, most_frequent_tags(data.train, data.test, "pos"), num_resamples=100)["score"]
        if all(scores["words"][name]["baseline"] == guessed for name in ALIGNMENTS):
            scores["words_data"] = words_identity()
    saved = scores.get("words_data", {})
    if saved.get("key") != data.key:
        raise DataError(
            f"{file} has scores of other words ({saved.get('name', 'of an unknown version of Python')}; this is {data.name}); "
            "take the same Python, remove the file's 'words', or choose another --out."
        )


def measure(entry: Entry, tasks: Tasks, wanted: Sequence[str], folder: Path, started: float) -> dict[str, Any]:
    """Measure what is missing of one model; every task is saved when it is done.

    Raises:
        DataError: the file of scores is of other data, of another model, or its words are of another Python.
    """
    file = folder / entry.file_name
    identity = {"arm": entry.arm, "seed": entry.seed, "model": entry.key, "data": tasks.key}
    scores: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else dict(identity)
    before = dict(scores)
    if entry.former_key is not None and scores.get("model") == entry.former_key:
        scores["model"] = entry.key
    changed = [key for key, value in identity.items() if scores.get(key) != value]
    if changed:
        raise DataError(f"{file} is of another {' and '.join(changed)}; remove it, or choose another --out.")
    if "words" in scores:
        require_same_words(scores, file)
    if scores != before:
        write_json(file, scores)
    missing = [task for task in wanted if task not in scores and not (task == "words" and entry.arm == "echo")]
    if not missing:
        return scores
    model = entry.load()
    work: dict[str, Callable[[], Any]] = {
        "sts": lambda: sts_cosines(model, tasks, entry.max_tokens),
        "retrieval": lambda: retrieval_scores(model, tasks, entry.max_tokens),
        "words": lambda: word_scores(model),
    }
    for task in missing:
        scores[task] = work[task]()
        if task == "words":
            scores["words_data"] = words_identity()
        write_json(file, scores)
        print(
            f"{entry.file_name.removesuffix('.json')}: {task} after {(time.perf_counter() - started) / 60:.1f} min", flush=True
        )
    return scores


# --- table -------------------------------------------------------------------------------------------------------------


def summarize(found: Sequence[dict[str, Any]], tasks: Tasks) -> dict[str, Any]:
    """One column a task: the value of every seed, mean, standard deviation over seeds, and an interval over items."""
    columns: dict[str, Any] = {}
    sts = [np.array(scores["sts"]) for scores in found if "sts" in scores]
    if sts:
        values = [_spearman(tasks.gold, cosine) for cosine in sts]
        columns["STS-B dev"] = _column(values, lambda gold, *all_: fmean(_spearman(gold, c) for c in all_), tasks.gold, *sts)
    retrieval = [np.array(scores["retrieval"]) * 100 for scores in found if "retrieval" in scores]
    if retrieval:
        values = [float(queries.mean()) for queries in retrieval]
        columns["pydocs nDCG@10"] = _column(values, lambda *all_: float(np.mean(all_)), *retrieval)
    for alignment in ALIGNMENTS:
        words = [scores["words"][alignment] for scores in found if "words" in scores]
        if words:
            ends = {end: 100 * fmean(word[end] for word in words) for end in ("low", "high", "baseline")}
            columns[f"words, {alignment.replace('_', ' ')}"] = {**_spread([100 * word["score"] for word in words]), **ends}
    return columns


def _spearman(gold: np.ndarray, cosine: np.ndarray) -> float:
    return float(spearmanr(gold, cosine).statistic) * 100


def _column(values: list[float], statistic: Callable[..., float], *samples: np.ndarray) -> dict[str, Any]:
    interval = bootstrap_interval(statistic, *samples)
    return {**_spread(values), "low": interval.low, "high": interval.high}


def _spread(values: list[float]) -> dict[str, Any]:
    return {"values": values, "mean": fmean(values), "deviation": stdev(values) if len(values) > 1 else None}


def cell(column: dict[str, Any] | None) -> str:
    """ "54.2 ± 0.3 [52.0, 56.1]"; "-" where there is no number."""
    if column is None:
        return "-"
    deviation = "" if column["deviation"] is None else f" ± {column['deviation']:.1f}"
    return f"{column['mean']:.1f}{deviation} [{column['low']:.1f}, {column['high']:.1f}]"


def write_results(table: dict[str, dict[str, Any]], seeds: dict[str, list[int | None]], tasks: Tasks, out: Path) -> None:
    """Print the table, and write arms.json, arms.md and arms.png."""
    columns = list(dict.fromkeys(name for row in table.values() for name in row))
    headings = ["arm", "seeds", *columns]
    rows = [
        [arm, ", ".join("-" if seed is None else str(seed) for seed in seeds[arm]), *(cell(row.get(name)) for name in columns)]
        for arm, row in table.items()
    ]
    shown = Table(*headings)
    for row in rows:
        shown.add_row(*row)
    Console().print(shown)
    note = (
        f"Mean ± standard deviation over seeds, [95 % interval over items]. {len(tasks.sts)} sentence pairs, "
        f"{len(tasks.pairs)} queries over as many documents. Untrained arms have no seed."
    )
    lines = [headings, ["---"] * len(headings), *rows]
    write_text(out / "arms.md", "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{note}\n")
    write_json(out / "arms.json", {"note": note, "seeds": seeds, "arms": table})
    draw(table, columns, out / "arms.png")
    for name in ("arms.md", "arms.json", "arms.png"):
        print(out / name)


def draw(table: dict[str, dict[str, Any]], columns: Sequence[str], target: Path) -> None:
    """A panel per task: the mean with its interval over items, and a small point for every seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = (1.5 + 2.9 * len(columns), 0.42 * len(table) + 1.3)
    figure, axes = plt.subplots(1, len(columns), figsize=size, sharey=True, layout="constrained", squeeze=False)
    for axis, name in zip(axes.flat, columns, strict=True):
        for row, values in enumerate(table.values()):
            if name not in values:
                continue
            column = values[name]
            axis.plot([column["low"], column["high"]], [row, row], color="#adb5bd", linewidth=2, zorder=1)
            axis.scatter(column["values"], [row] * len(column["values"]), s=14, color=PALETTE[1], zorder=3)
            axis.scatter([column["mean"]], [row], s=46, color=PALETTE[0], zorder=2)
            label = {"xytext": (0, 7), "textcoords": "offset points", "ha": "center", "fontsize": 8}
            axis.annotate(f"{column['mean']:.1f}", (column["mean"], row), **label)
        axis.set_title(name, fontsize=10, loc="left")
        axis.set_ylim(len(table) - 0.4, -0.7)
        axis.margins(x=0.12)
        axis.grid(alpha=0.25, axis="x")
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_yticks(range(len(table)), list(table), fontsize=9)
    figure.supxlabel("blue: mean; orange: each seed; grey: 95 % interval over items", fontsize=8)
    figure.savefig(target, dpi=130)
    plt.close(figure)


def main(argv: Sequence[str]) -> None:
    """Measure what is missing, then print the table."""
    parser = argparse.ArgumentParser(prog="arms.py", description="LLM2Vec's stages and echo embeddings on three tasks")
    parser.add_argument("sts", type=Path, metavar="STS_DEV.csv")
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN_DIR", help="folders made by benchmarks/llm2vec_chain.py")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--queries", type=int, default=300, help="held-out queries (300)")
    parser.add_argument("--base", default=None, help="another untrained model: a folder or a Hub name")
    options = parser.parse_args(list(argv))
    tasks = load_tasks(options.sts, options.queries)
    started = time.perf_counter()
    table: dict[str, dict[str, Any]] = {}
    found: dict[str, list[dict[str, Any]]] = {}
    seeds: dict[str, list[int | None]] = {}
    (options.out / "scores").mkdir(parents=True, exist_ok=True)
    for entry in [*untrained(options.base), *trained(options.runs)]:
        found.setdefault(entry.arm, []).append(measure(entry, tasks, options.tasks, options.out / "scores", started))
        seeds.setdefault(entry.arm, []).append(entry.seed)
    for arm, scores in found.items():
        table[arm] = summarize(scores, tasks)
    write_results(table, seeds, tasks, options.out)


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))
