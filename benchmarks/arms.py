"""LLM2Vec's stages and echo embeddings on the embedded model: sentence similarity, retrieval, and tagging of words.

Arms: the untrained model with causal attention ("uni"), with bidirectional attention ("bi"), and with every text repeated
("echo": causal, the prompt "Rewrite the sentence: TEXT, rewritten sentence: TEXT", pooling the second copy; arXiv:2402.15449);
"uni" and "bi" with the begin-of-text token that the chain trains with; and the two stages of chains trained by
`benchmarks/llm2vec_chain.py` ("bi + MNTP", "bi + MNTP + SimCSE"; one chain per seed). Mean pooling, no instruction.

Tasks:
- STS-B dev: Spearman correlation of cosine and human scores (a file in SentEval's format), times 100;
- pydocs retrieval: nDCG@10 of held-out docstring summaries as queries for their bodies, times 100; the same queries in all
arms;
- words: a linear probe on frozen word vectors predicts the kind of every word of Python source code (`word_level_code`),
  accuracy times 100, from the word's own token and from the token before it. Sentences are not repeated here, so echo has none.

Seeds: a chain's seed determines order, masks and dropout of its training. The untrained arms have no randomness (the queries
    are
fixed, the probe is convex), so they have one number. Intervals: 95 % bootstrap over the task's items, averaged over seeds; for
words the mean of the seeds' own intervals.

Every score is saved as soon as it is computed (OUT/scores), with hashes of the model's weights and of the data; the same
command again computes what is missing. The words are source code of the interpreter itself, so their hash changes with Python's
version.

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
from typing import Any

import numpy as np
import torch
from arms_table import ALIGNMENTS, summarize, write_results

from unified_lm import UnifiedLM
from unified_lm.cli.main import run_command
from unified_lm.composition.convert import from_yaml
from unified_lm.config.schema import ModelConfig, RunConfig, SourceConfig
from unified_lm.core.errors import DataError
from unified_lm.core.files import write_json
from unified_lm.data.rows.records import PairRecord, RecordKind
from unified_lm.data.sources import open_source
from unified_lm.evaluation.words.code import code_words
from unified_lm.evaluation.words.scores import most_frequent_tags, tag_scores
from unified_lm.evaluation.words.tasks import word_level_scores
from unified_lm.inference.loading import model_folder
from unified_lm.mining.embedders import folder_hash
from unified_lm.models.embedded import embedded_directory
from unified_lm.models.loading import load_model
from unified_lm.models.weights_hash import hash_weights
from unified_lm.objectives.ranking import ndcg_per_query

MAX_TOKENS = 128
"""Limit of a text in tokens; for echo the limit of each copy, without the prompt around them."""
ECHO_TOKENS = 2 * MAX_TOKENS + 16
TASKS = ("sts", "retrieval", "words")
STAGES = {"bi + MNTP": "1-*mntp", "bi + MNTP + SimCSE": "2-*simcse"}
QUERY_SEED = 0


@dataclass(frozen=True)
class Entry:
    """One model to measure.

    Attributes:
        arm: its row in the table.
        seed: of its training; None for an untrained model.
        key: hash of its weights.
        load: loads it.
        max_tokens: limit of an embedded text with its prompt.
        former_key: key of earlier score files of the same weights, or None.
    """

    arm: str
    seed: int | None
    key: str
    load: Callable[[], UnifiedLM] = field(compare=False)
    max_tokens: int = MAX_TOKENS
    former_key: str | None = None

    @property
    def file_name(self) -> str:
        """Name of the file with its scores."""
        name = self.arm.replace(" + ", "-").replace(" ", "-").lower()
        return f"{name}.json" if self.seed is None else f"{name}-seed{self.seed}.json"


def untrained(base: str | None) -> list[Entry]:
    """The arms without training; those with a begin-of-text token are the starting point of the trained ones."""

    def load(attention: str, template: str) -> UnifiedLM:
        """Load the base model."""
        if base is not None:
            return UnifiedLM.from_pretrained(base, template=template, pooling="mean", attention=attention)
        loaded = load_model(ModelConfig(source="embedded", name="smollm2-135m", family="llama"))
        return UnifiedLM(loaded.causal_lm, loaded.tokenizer, template=template, pooling="mean", attention=attention)

    if base is None:
        # Older score files have this name as key. The package has only ever had one set of weights, so they are still valid.
        key, former = hash_weights(embedded_directory()), "embedded smollm2-135m"
    else:
        key, former = (
            folder_hash(model_folder(base, None)),
            None,
        )  # the key used to be a path, which does not identify the weights
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
        key: hash of the data, so that scores of different data are never mixed.
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
    """Cosine similarity of every pair of sentences."""
    texts = [row[5] for row in tasks.sts] + [row[6] for row in tasks.sts]
    vectors = model.encode(texts, normalize=True, max_tokens=limit, show_progress=sys.stderr.isatty())
    return np.sum(vectors[: len(tasks.sts)] * vectors[len(tasks.sts) :], axis=1).astype(float).tolist()


def retrieval_scores(model: UnifiedLM, tasks: Tasks, limit: int) -> list[float]:
    """nDCG@10 of every query over the documents of all queries."""
    settings: dict[str, Any] = {"normalize": True, "max_tokens": limit, "output": "torch", "show_progress": sys.stderr.isatty()}
    queries = model.encode([pair.query.text for pair in tasks.pairs], **settings)
    documents = model.encode([pair.positives[0].text for pair in tasks.pairs], **settings)
    relevant = [{index} for index in range(len(tasks.pairs))]
    return [float(score) for score in ndcg_per_query(torch.as_tensor(queries @ documents.T), relevant, 10)]


def word_scores(model: UnifiedLM) -> dict[str, dict[str, float]]:
    """Accuracy by alignment with its interval, and the accuracy of the most frequent tag of each word."""
    found = word_level_scores(model, code_words(), tasks=("pos",), alignments=ALIGNMENTS)["pos"]
    return {name: {key: float(found[name][key]) for key in ("score", "low", "high", "baseline")} for name in ALIGNMENTS}


def words_identity() -> dict[str, str]:
    """Name, with Python's version, and hash of the tagged words."""
    data = code_words()
    return {"name": data.name, "key": data.key}


def require_same_words(scores: dict[str, Any], file: Path) -> None:
    """Check that saved scores of words belong to the words that would be measured now.

    Older files lack the hash of their words, but contain the accuracy of predicting each word's most frequent tag, which needs
    no model. If the current words give the same number to the last digit, they are taken to be the same, and their hash is
    added.

    Raises:
        DataError: they belong to other words.
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
    """Measure the missing tasks of one model; each score is saved as soon as it is computed.

    Args:
        entry: the model.
        tasks: the data.
        wanted: names of the tasks.
        folder: contains the score files.
        started: `time.perf_counter()` at the start of the program, for messages.

    Raises:
        DataError: the score file belongs to other data, to another model, or to words of another Python version.
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
        table[arm] = summarize(scores, tasks.gold)
    write_results(table, seeds, len(tasks.sts), len(tasks.pairs), options.out)


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))
