"""Data for analyses: reference texts, scored sentence pairs and retrieval pairs, from the user's files or from pydocs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from unified_lm.config.schema import SourceConfig
from unified_lm.core.errors import DataError
from unified_lm.core.random import derive_seed
from unified_lm.core.user_files import user_path
from unified_lm.data.rows.records import PairRecord, RecordKind, Text, TextRecord, answers_of
from unified_lm.data.sources import open_source
from unified_lm.evaluation.embedding.offline import DESCRIPTION, Kind, read_task
from unified_lm.evaluation.embedding.offline_files import Layout, read_fields

PYDOCS = "pydocs"
"""Names the built-in data set."""


@dataclass(frozen=True)
class ScoredPairs:
    """Sentence pairs with human similarity scores.

    Attributes:
        name: for figures.
        left: first sentences.
        right: second sentences.
        scores: float64 `[pairs]`, higher means more similar.
    """

    name: str
    left: list[str]
    right: list[str]
    scores: np.ndarray


@dataclass(frozen=True)
class RetrievalPairs:
    """Queries, the documents to search, and the relevant documents of each query.

    Attributes:
        name: for figures.
        queries: queries with their instructions.
        documents: distinct documents.
        relevant: per query, the indices of its relevant documents.
    """

    name: str
    queries: list[Text]
    documents: list[Text]
    relevant: list[set[int]]


@dataclass(frozen=True)
class LabeledTexts:
    """Texts with one label each.

    Attributes:
        name: for figures.
        texts: the texts.
        labels: string array `[texts]`.
    """

    name: str
    texts: list[str]
    labels: np.ndarray


def fingerprint(*parts: object) -> str:
    """Hash of the inputs of a measurement: strings, numbers, and lists of them."""
    return blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def read_texts(source: str, limit: int | None, *, subset: str = "sentences", split: str = "test") -> tuple[str, list[str]]:
    """Read the texts of a corpus.

    Args:
        source: "pydocs", a file or folder of texts (.txt with one text per line, .jsonl with "text"...), or an offline STS
            task, whose sentences are used.
        limit: maximum number of texts, sampled with a fixed seed and kept in source order; None for all.
        subset: subset of pydocs, "sentences" or "text".
        split: split of pydocs.

    Returns:
        The name of the corpus, and its texts.

    Raises:
        DataError: missing or malformed data.
    """
    path = user_path(source)
    if path.is_dir() and (path / DESCRIPTION).is_file():
        pairs = read_scored_pairs(source, None)
        texts = list(dict.fromkeys([*pairs.left, *pairs.right]))
        return pairs.name, _choose(texts, limit)
    config = (
        SourceConfig(builtin=PYDOCS, subset=subset, split=split, limit=limit)
        if source == PYDOCS
        else SourceConfig(path=source, limit=limit)
    )
    records = open_source(config, RecordKind.TEXT, seed=0)
    return records.name, [record.text for record in records if isinstance(record, TextRecord)]


def read_scored_pairs(source: str, limit: int | None) -> ScoredPairs:
    """Read sentence pairs with scores.

    Args:
        source: the folder of an offline STS task (`task.yaml`), or a file with columns sentence1, sentence2 and score.
        limit: maximum number of pairs, sampled with a fixed seed; None for all.

    Raises:
        DataError: missing or malformed data, or a task of another kind.
    """
    path = user_path(source)
    if path.is_dir():
        task = read_task(path)
        if task.kind is not Kind.STS:
            raise DataError(f"{path} is a task of kind {task.kind.value}; expected `type: sts`.")
        columns = task.splits["test"]
        name, left, right, scores = task.name, columns["sentence1"], columns["sentence2"], columns["score"]
    else:
        rows = [(r.text("sentence1"), r.text("sentence2"), r.number("score")) for r in read_fields(path, Layout({}))]
        name, (left, right, scores) = path.name.split(".")[0], map(list, zip(*rows, strict=True))
    chosen = _choose(list(range(len(left))), limit)
    values = np.asarray([scores[i] for i in chosen], np.float64)
    return ScoredPairs(name, [left[i] for i in chosen], [right[i] for i in chosen], values)


def read_labeled(source: str, limit: int | None) -> LabeledTexts:
    """Read labeled texts.

    Args:
        source: the folder of an offline task of classification (its test split) or clustering, or a file with columns text and
            label.
        limit: maximum number of texts, sampled with a fixed seed; None for all.

    Raises:
        DataError: missing or malformed data, a task of another kind, or a single label.
    """
    path = user_path(source)
    if path.is_dir():
        task = read_task(path)
        if task.kind not in (Kind.CLASSIFICATION, Kind.CLUSTERING):
            raise DataError(f"{path} is a task of kind {task.kind.value}; expected classification or clustering.")
        columns = task.splits["test"]
        name, texts, labels = task.name, columns["text"], columns["label"]
    else:
        rows = [(row.text("text"), row.label("label")) for row in read_fields(path, Layout({}))]
        name, (texts, labels) = path.name.split(".")[0], map(list, zip(*rows, strict=True))
    chosen = _choose(list(range(len(texts))), limit)
    kept = np.asarray([str(labels[i]) for i in chosen])
    if len(set(kept)) < 2:
        raise DataError(f"{path}: all {len(kept)} texts have the label '{kept[0]}'; two labels are needed at least.")
    return LabeledTexts(name, [texts[i] for i in chosen], kept)


def read_retrieval(source: str, limit: int | None) -> RetrievalPairs:
    """Read held-out retrieval pairs. The distinct positives and negatives of the sampled rows form the searched documents.

    Args:
        source: "pydocs" (its test split), or a file or folder of pairs.
        limit: maximum number of rows, sampled with a fixed seed; None for all.

    Raises:
        DataError: missing or malformed data.
    """
    config = (
        SourceConfig(builtin=PYDOCS, subset="pairs", split="test", limit=limit)
        if source == PYDOCS
        else SourceConfig(path=source, limit=limit)
    )
    records = open_source(config, RecordKind.PAIR, seed=0)
    rows = [record for record in records if isinstance(record, PairRecord)]
    index_of: dict[Text, int] = {}
    for row in rows:
        for text in (*row.positives, *row.negatives):
            index_of.setdefault(text, len(index_of))
    relevant = [{index_of[text] for text in answers} for answers in answers_of(rows)]
    return RetrievalPairs(records.name, [row.query for row in rows], list(index_of), relevant)


def _choose(items: list, limit: int | None) -> list:
    if limit is None or limit >= len(items):
        return items
    generator = np.random.default_rng(derive_seed(0, "limit"))
    return [items[i] for i in np.sort(generator.choice(len(items), limit, replace=False))]


def distinct(texts: Sequence[str]) -> list[str]:
    """Distinct texts, stripped, without empty ones."""
    return [text for text in dict.fromkeys(text.strip() for text in texts) if text]
