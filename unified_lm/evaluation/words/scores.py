"""Scores of tag sequences: accuracy for words and F1 for spans, with confidence intervals over sentences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from seqeval.metrics.sequence_labeling import get_entities

from unified_lm.evaluation.bootstrap import bootstrap_interval
from unified_lm.evaluation.words.data import SPAN_TASKS, Sentence

Tags = Sequence[Sequence[str]]
"""Per sentence, one tag per word."""


def metric_of(task: str) -> str:
    """The main metric of a task: "f1" of spans, or "accuracy"."""
    return "f1" if task in SPAN_TASKS else "accuracy"


def tag_scores(task: str, gold: Tags, predicted: Tags, *, num_resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Score predictions.

    Args:
        task: "pos", "chunk" or "ner".
        gold, predicted: tags of the same sentences (>= 2).
        num_resamples, seed: see `bootstrap_interval`; sentences are resampled, since words of a sentence are not independent.

    Returns:
        "metric", its "score" with a 95 % interval ("low", "high"), and always "accuracy" over words. For spans also
        "precision", "recall" and "f1", micro-averaged; a span is correct if type and both ends agree, as in seqeval and
        conlleval. For words also "macro_f1", the mean F1 over the tags in `gold`.

    Raises:
        ConfigError: fewer than two sentences.
    """
    words = np.asarray([_correct(g, p) for g, p in zip(gold, predicted, strict=True)], np.float64)
    result: dict[str, Any] = {"metric": metric_of(task)}
    statistic: Callable[[np.ndarray], float]
    if task in SPAN_TASKS:
        counts = np.asarray([_spans(g, p) for g, p in zip(gold, predicted, strict=True)], np.float64)
        statistic = _f1
        hits, found, wanted = counts.sum(axis=0)
        more = {"f1": _f1(counts), "precision": _ratio(hits, found), "recall": _ratio(hits, wanted)}
    else:
        counts, statistic = words, _accuracy
        more = {"macro_f1": _macro_f1(gold, predicted)}
    interval = bootstrap_interval(statistic, counts, num_resamples=num_resamples, seed=seed)
    return {
        **result,
        "score": interval.value,
        "low": interval.low,
        "high": interval.high,
        "accuracy": _accuracy(words),
        **more,
    }


def most_frequent_tags(train: Sequence[Sentence], test: Sequence[Sentence], task: str) -> list[list[str]]:
    """Tag words with their most frequent training tag, unknown words with the most frequent tag of all: a probe's baseline."""
    counts: dict[str, Counter[str]] = {}
    total: Counter[str] = Counter()
    for sentence in train:
        for word, tag in zip(sentence.words, sentence.tags[task], strict=True):
            counts.setdefault(word, Counter())[tag] += 1
            total[tag] += 1
    best = {word: _first(tags) for word, tags in counts.items()}
    fallback = _first(total)
    return [[best.get(word, fallback) for word in sentence.words] for sentence in test]


def _first(tags: Counter[str]) -> str:
    return min(tags, key=lambda tag: (-tags[tag], tag))  # ties by name, not by order of insertion


def _correct(gold: Sequence[str], predicted: Sequence[str]) -> tuple[int, int]:
    return sum(g == p for g, p in zip(gold, predicted, strict=True)), len(gold)


def _spans(gold: Sequence[str], predicted: Sequence[str]) -> tuple[int, int, int]:
    """Numbers of correct, predicted and true spans."""
    wanted, found = set(get_entities(list(gold))), set(get_entities(list(predicted)))
    return len(wanted & found), len(found), len(wanted)


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else 0.0


def _accuracy(counts: np.ndarray) -> float:
    correct, total = counts.sum(axis=0)
    return _ratio(correct, total)


def _f1(counts: np.ndarray) -> float:
    hits, found, wanted = counts.sum(axis=0)
    return _ratio(2 * hits, found + wanted)


def _macro_f1(gold: Tags, predicted: Tags) -> float:
    from sklearn.metrics import f1_score

    flat = [[tag for sentence in side for tag in sentence] for side in (gold, predicted)]
    return float(f1_score(*flat, labels=sorted(set(flat[0])), average="macro", zero_division=0))
