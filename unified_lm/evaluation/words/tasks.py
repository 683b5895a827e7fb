"""Word-level tasks: how well a linear probe on a frozen model's word vectors tags words (LLM2Vec, section 4.1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from unified_lm.core.errors import ConfigError, did_you_mean
from unified_lm.evaluation.words.data import WordData, require_tasks
from unified_lm.evaluation.words.features import MAX_TOKENS, Alignment, FeatureSettings, Subtoken, word_features
from unified_lm.evaluation.words.probe import LogisticProbe, Probe, fit_tags
from unified_lm.evaluation.words.scores import most_frequent_tags, tag_scores
from unified_lm.export.manifest import ATTENTIONS
from unified_lm.inference.unified import UnifiedLM

ALIGNMENTS = tuple(alignment.value for alignment in Alignment)
"""Values of the alignments."""


def word_level_scores(
    model: UnifiedLM,
    data: WordData,
    *,
    tasks: Sequence[str] = (),
    alignments: Sequence[str] = ALIGNMENTS,
    attention: str | None = None,
    subtoken: str = "mean",
    probe: Probe | None = None,
    max_tokens: int = MAX_TOKENS,
    cache_key: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Probe a model's word vectors. One forward per sentence serves all tasks and alignments.

    Args:
        model: the model to probe.
        data: training and test sentences.
        tasks: "pos", "chunk", "ner"; empty selects all tasks of the data.
        alignments: "same_token", "next_token"; see `Alignment`.
        attention: "causal", "bidirectional" or "bidirectional_keep_first"; None selects the model's own.
        subtoken: "mean", "first" or "last"; see `Subtoken`.
        probe: None selects `LogisticProbe()`.
        max_tokens: see `MAX_TOKENS`.
        cache_key: hash of the model's content, to keep vectors on disk; see `word_features`.
        progress: called with the number of sentences read since the last call; the total is that of both splits.

    Returns:
        `scores[task][alignment]`: the results of `tag_scores`; "baseline", the same metric for the most frequent tag of each
        word; and "fit", the probe's notes on the fit.

    Raises:
        ConfigError: an unknown task, alignment, attention or subtoken, or training words with one and the same tag.
        DataError: a word without tokens.
    """
    tasks = require_tasks(tasks, data)
    attention = attention or model.attention
    if attention not in ATTENTIONS:
        raise ConfigError(f"unknown attention '{attention}'.{did_you_mean(attention, ATTENTIONS)}")
    settings = FeatureSettings(attention, Subtoken.parse(subtoken), max_tokens)
    chosen = [Alignment.parse(name) for name in alignments]
    probe = probe or LogisticProbe()
    train, test = (
        word_features(model, side, chosen, settings, cache_key=cache_key, progress=progress) for side in (data.train, data.test)
    )
    scores: dict[str, dict[str, dict[str, Any]]] = {}
    for task in tasks:
        gold = [sentence.tags[task] for sentence in data.test]
        baseline = tag_scores(task, gold, most_frequent_tags(data.train, data.test, task), num_resamples=100)["score"]
        scores[task] = {}
        for alignment in chosen:
            tags = [sentence.tags[task] for sentence in data.train]
            flat, notes = fit_tags(probe, train[alignment], tags, test[alignment])
            found = iter(flat)
            predicted = [[next(found) for _ in sentence] for sentence in gold]
            scores[task][alignment.value] = {**tag_scores(task, gold, predicted), "baseline": baseline, "fit": notes}
    return scores
