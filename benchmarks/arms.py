"""What masks and stages do to the embedded model: sentence similarity, retrieval, news by subject, and tagging of words.

Arms without training: causal attention ("uni"), bidirectional ("bi"), bidirectional but for the first token, which sees itself
alone ("first alone"; `bidirectional_keep_first`), each also behind the begin of text that the chain trains with, and every text
repeated ("echo": causal, the prompt "Rewrite the sentence: TEXT, rewritten sentence: TEXT", pooling the second copy;
arXiv:2402.15449). Trained arms are the runs found in the given folders that have an export, one per seed and arm; the name of
an arm is the attention and the stages ("bi + MNTP + SimCSE", "first alone + GRIT"), read from the runs' own configurations.
Mean pooling, no instruction, and the template of the run.

Tasks:
- STS-B dev: Spearman correlation of cosine and human scores (a file in SentEval's format), times 100;
- pydocs retrieval: nDCG@10 of held-out docstring summaries as queries for their bodies, times 100; the same queries in all
  arms;
- labels: texts by subject (`--labels`, a file with `text` and `label`): AMI of ten k-means with the labels, and accuracy of
  logistic regression on 16 texts a label, ten draws, each times 100;
- words: a linear probe on frozen word vectors predicts the kind of every word of Python source code (`word_level_code`),
  accuracy times 100, from the word's own token and from the token before it. Sentences are not repeated here, so echo has none.

Seeds: a run's seed determines order, masks and dropout of its training. The untrained arms have no randomness (the queries are
fixed, the probe is convex), so they have one number. Intervals: 95 % bootstrap over the task's items (for labels over the
draws), averaged over seeds; for words the mean of the seeds' own intervals.

Every score is saved as soon as it is computed (OUT/scores), with hashes of the model's weights and of the data; the same
command again computes what is missing. The words are source code of the interpreter itself, so their hash changes with Python's
version.

Usage: python benchmarks/arms.py STS_DEV.csv FOLDER... --out DIR [--tasks sts retrieval labels words] [--queries 300]
    [--labels FILE] [--base MODEL]
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
from unified_lm.evaluation.analyses.methods import label_scores
from unified_lm.evaluation.analyses.texts import LabeledTexts, read_labeled
from unified_lm.evaluation.words.code import code_words
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
TASKS = ("sts", "retrieval", "labels", "words")
READ_AS = {"uni": "causal", "bi": "bidirectional", "first alone": "bidirectional_keep_first"}
"""Arm -> name of its attention."""
STAGES = {"masked_text": "MNTP", "views": "SimCSE", "pairs": "supervised"}
"""Format of the stream that embeds -> name of the stage; with a stream beside it that does not embed, it is GRIT."""
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
    """

    arm: str
    seed: int | None
    key: str
    load: Callable[[], UnifiedLM] = field(compare=False)
    max_tokens: int = MAX_TOKENS

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

    key = hash_weights(embedded_directory()) if base is None else folder_hash(model_folder(base, None))
    arms = [("echo", "causal", "echo", ECHO_TOKENS)]
    for arm, attention in READ_AS.items():
        arms += [(arm, attention, "plain", MAX_TOKENS), (f"{arm} + begin of text", attention, "plain_bos", MAX_TOKENS)]
    return [Entry(arm, None, key, partial(load, attention, template), limit) for arm, attention, template, limit in arms]


def trained(folders: Sequence[Path]) -> list[Entry]:
    """The finished runs in the folders, by arm and seed.

    Raises:
        DataError: a folder holds no run with an export, or two runs are the same arm and seed.
    """
    entries: dict[tuple[str, int], Entry] = {}
    for folder in folders:
        runs = sorted(path.parent for path in folder.rglob("config.yaml") if (path.parent / "export").is_dir())
        if not runs:
            raise DataError(f"{folder} holds no run with an export (a folder with config.yaml and export/).")
        for run in runs:
            config = from_yaml(run / "config.yaml")
            assert isinstance(config, RunConfig)
            export, identity = run / "export", (arm_of(config), config.seed)
            if identity in entries:
                raise DataError(f"{run} is the second run of '{identity[0]}' with seed {identity[1]}; give each once.")
            entries[identity] = Entry(*identity, folder_hash(export), partial(UnifiedLM.from_pretrained, export))
    return [entries[key] for key in sorted(entries, key=lambda key: (key[0].split(" + ")[0], len(key[0]), *key))]


def arm_of(config: RunConfig) -> str:
    """Attention of the run's texts, and its stages: those of the run that it started from, then its own."""
    arm, *stages = [""]
    if config.model.init_from:
        before = Path(str(config.model.init_from)).expanduser()
        saved = (before.parent if before.name == "export" else before) / "config.yaml"
        if saved.is_file():  # else it started from a model that is no run
            started = from_yaml(saved)
            assert isinstance(started, RunConfig)
            arm, *stages = arm_of(started).split(" + ")
    embeds = [stream for stream in config.streams.values() if stream.format in STAGES]
    if not embeds:
        raise DataError(f"{config.run_dir} trains no stream that embeds ({', '.join(STAGES)}); leave it out.")
    stage = "GRIT" if len(config.streams) > len(embeds) else STAGES[embeds[0].format]
    own = {attention: name for name, attention in READ_AS.items()}[embeds[0].attention]
    changed = f" (then {own})" if stages and own != arm else ""
    return " + ".join([arm if stages else own, *stages, stage + changed])


# --- tasks -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tasks:
    """The data of all tasks.

    Attributes:
        sts: rows of SentEval's file (score in column 4, sentences in 5 and 6).
        pairs: held-out docstrings.
        labeled: texts by subject, or None.
        key: hash of the data, so that scores of different data are never mixed.
    """

    sts: list[list[str]]
    pairs: list[PairRecord]
    labeled: LabeledTexts | None
    key: str

    @property
    def gold(self) -> np.ndarray:
        """Human similarity scores, float64 `[N]`."""
        return np.array([float(row[4]) for row in self.sts])


def load_tasks(sts: Path, num_queries: int, labels: str | None = None) -> Tasks:
    """Read the tasks' data."""
    with open(sts, encoding="utf-8", newline="") as handle:
        rows = [row for row in csv.reader(handle, delimiter="\t", quoting=csv.QUOTE_NONE) if len(row) >= 7]
    if len(rows) < 2:
        raise DataError(f"{sts} has no rows of seven tab-separated columns.")
    source = open_source(SourceConfig(builtin="pydocs", split="test", limit=num_queries), RecordKind.PAIR, QUERY_SEED)
    pairs = [record for record in source if isinstance(record, PairRecord)]
    labeled = None if labels is None else read_labeled(labels, None)
    texts = [*(cell for row in rows for cell in row[4:7]), *(f"{p.query.text}\0{p.positives[0].text}" for p in pairs)]
    texts += [] if labeled is None else [f"{text}\0{label}" for text, label in zip(labeled.texts, labeled.labels, strict=True)]
    return Tasks(rows, pairs, labeled, blake2b("\0".join(texts).encode(), digest_size=8).hexdigest())


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


def labels_scores(model: UnifiedLM, tasks: Tasks, limit: int) -> dict[str, list[float]]:
    """AMI of k-means and accuracy of few-shot classification, ten draws of each."""
    if tasks.labeled is None:
        raise DataError("the task 'labels' needs --labels FILE, rows with text and label.")
    vectors = model.encode(tasks.labeled.texts, normalize=True, max_tokens=limit, show_progress=sys.stderr.isatty())
    found = label_scores(tasks.labeled.labels, [vectors], clusters=True)
    return {name: found[name][0].tolist() for name in ("ami", "accuracy")}


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

    Raises:
        DataError: they belong to other words.
    """
    data, saved = code_words(), scores["words_data"]
    if saved["key"] != data.key:
        raise DataError(
            f"{file} has scores of other words ({saved['name']}; this is {data.name}); "
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
    changed = [key for key, value in identity.items() if scores.get(key) != value]
    if changed:
        raise DataError(f"{file} is of another {' and '.join(changed)}; remove it, or choose another --out.")
    if "words" in scores:
        require_same_words(scores, file)
    # Words take no template: no repeated sentence, and a begin of text changes nothing that is read of them untrained.
    wordless = entry.arm == "echo" or entry.arm.endswith("begin of text")
    missing = [task for task in wanted if task not in scores and not (task == "words" and wordless)]
    if not missing:
        return scores
    model = entry.load()
    work: dict[str, Callable[[], Any]] = {
        "sts": lambda: sts_cosines(model, tasks, entry.max_tokens),
        "retrieval": lambda: retrieval_scores(model, tasks, entry.max_tokens),
        "labels": lambda: labels_scores(model, tasks, entry.max_tokens),
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
    parser = argparse.ArgumentParser(prog="arms.py", description="masks and stages on four tasks")
    parser.add_argument("sts", type=Path, metavar="STS_DEV.csv")
    parser.add_argument("runs", nargs="*", type=Path, metavar="FOLDER", help="folders of runs with exports")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=None, help="(all; labels where --labels is)")
    parser.add_argument("--labels", default=None, metavar="FILE", help="texts by subject: rows with text and label")
    parser.add_argument("--queries", type=int, default=300, help="held-out queries (300)")
    parser.add_argument("--base", default=None, help="another untrained model: a folder or a Hub name")
    options = parser.parse_args(list(argv))
    tasks = load_tasks(options.sts, options.queries, options.labels)
    wanted = options.tasks or [task for task in TASKS if task != "labels" or options.labels]
    started = time.perf_counter()
    table: dict[str, dict[str, Any]] = {}
    found: dict[str, list[dict[str, Any]]] = {}
    seeds: dict[str, list[int | None]] = {}
    (options.out / "scores").mkdir(parents=True, exist_ok=True)
    for entry in [*untrained(options.base), *trained(options.runs)]:
        found.setdefault(entry.arm, []).append(measure(entry, tasks, wanted, options.out / "scores", started))
        seeds.setdefault(entry.arm, []).append(entry.seed)
    for arm, scores in found.items():
        table[arm] = summarize(scores, tasks.gold)
    write_results(table, seeds, len(tasks.sts), len(tasks.pairs), options.out)


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))
