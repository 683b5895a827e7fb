"""Probes and scores: separable tags are learned, seqeval's F1 is ours, what no state can know is not."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

pytest.importorskip("seqeval")
from seqeval.metrics import f1_score

from tests.evaluation.words.word_files import random_data
from unified_lm.core.errors import ConfigError
from unified_lm.evaluation.words.probe import LinearProbe, LogisticProbe, fit_tags, make_probe
from unified_lm.evaluation.words.scores import most_frequent_tags, tag_scores
from unified_lm.evaluation.words.tasks import word_level_scores
from unified_lm.inference import UnifiedLM
from unified_lm.models.tiny import tiny_model, tiny_tokenizer


def blobs(num: int = 300, dim: int = 6, classes: int = 3) -> tuple[np.ndarray, list[list[str]]]:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, num)
    vectors = rng.normal(size=(num, dim)).astype(np.float32)
    vectors[np.arange(num), labels] += 4
    vectors[:, -1] *= 1000  # a dimension that dominates, as models have them
    return vectors, [[f"T{label}" for label in labels[start : start + 5]] for start in range(0, num, 5)]


def test_logistic_probe_is_scikit_learns_on_standardized_vectors() -> None:
    vectors, tags = blobs()
    predicted, notes = fit_tags(LogisticProbe(inverse_penalty=0.3), vectors[:200], tags[:40], vectors[200:])
    flat = [tag for sentence in tags for tag in sentence]
    scaler = StandardScaler().fit(vectors[:200])
    reference = LogisticRegression(C=0.3).fit(scaler.transform(vectors[:200]), flat[:200])
    assert predicted == list(reference.predict(scaler.transform(vectors[200:])))
    assert np.mean(np.array(predicted) == flat[200:]) > 0.9
    assert notes["converged"]
    assert not fit_tags(LogisticProbe(max_iterations=1), vectors[:200], tags[:40], vectors[200:])[1]["converged"]


def test_linear_probe_learns_repeats_and_has_a_seed() -> None:
    vectors, tags = blobs()
    vectors[:, -1] /= 1000
    probe = LinearProbe(num_steps=300, learning_rate=2e-2)
    predicted, notes = fit_tags(probe, vectors[:200], tags[:40], vectors[200:])
    gold = [tag for sentence in tags for tag in sentence][200:]
    assert np.mean(np.array(predicted) == gold) > 0.9
    assert fit_tags(probe, vectors[:200], tags[:40], vectors[200:])[1] == notes
    other = LinearProbe(num_steps=300, learning_rate=2e-2, seed=1)
    assert fit_tags(other, vectors[:200], tags[:40], vectors[200:])[1] != notes


def test_nothing_to_learn_and_unknown_probe() -> None:
    with pytest.raises(ConfigError, match="every training word has the tag 'X'"):
        fit_tags(LogisticProbe(), np.zeros((4, 2), np.float32), [["X", "X"], ["X", "X"]], np.zeros((1, 2), np.float32))
    with pytest.raises(ConfigError, match="Did you mean 'logistic'"):
        make_probe("logistik")


def test_span_f1_is_seqevals() -> None:
    rng = np.random.default_rng(1)
    tags = ["O", "B-A", "I-A", "B-B", "I-B"]
    gold, predicted = ([[str(tag) for tag in rng.choice(tags, 9)] for _ in range(30)] for _ in range(2))
    score = tag_scores("ner", gold, predicted, num_resamples=100)
    assert score["f1"] == pytest.approx(f1_score(gold, predicted), abs=1e-12)
    assert score["low"] < score["score"] < score["high"]
    assert score["accuracy"] == pytest.approx(np.mean(np.array(gold) == np.array(predicted)))
    assert score["accuracy"] != pytest.approx(score["f1"], abs=1e-3)
    assert tag_scores("chunk", gold, gold, num_resamples=100)["f1"] == 1


def test_accuracy_and_macro_f1() -> None:
    gold, predicted = [["A", "A", "A"], ["B", "A", "A"]], [["A", "A", "A"], ["A", "A", "A"]]
    score = tag_scores("pos", gold, predicted, num_resamples=100)
    assert score["score"] == score["accuracy"] == pytest.approx(5 / 6)
    assert score["macro_f1"] == pytest.approx((10 / 11 + 0) / 2)


def test_baseline_knows_words_only() -> None:
    data = random_data()
    predicted = most_frequent_tags(data.train, data.test, "pos")
    assert tag_scores("pos", [s.tags["pos"] for s in data.test], predicted, num_resamples=100)["score"] > 0.9
    chance = most_frequent_tags(data.train, data.test, "ner")
    assert tag_scores("ner", [s.tags["ner"] for s in data.test], chance, num_resamples=100)["accuracy"] < 0.8


def test_what_a_state_can_and_cannot_know() -> None:
    """A causal state knows its word and not the next; a bidirectional one knows something of the next."""
    model = UnifiedLM(tiny_model("llama"), tiny_tokenizer(), template="plain")
    data = random_data(150, 60)
    causal = word_level_scores(model, data, attention="causal")
    both = word_level_scores(model, data, attention="bidirectional", tasks=("ner",), alignments=("same_token",))
    assert causal["pos"]["same_token"]["score"] > 0.95
    assert causal["pos"]["next_token"]["score"] < 0.6  # read before the word itself: one of two tags by chance
    assert causal["ner"]["same_token"]["accuracy"] < 0.6
    assert both["ner"]["same_token"]["accuracy"] > causal["ner"]["same_token"]["accuracy"] + 0.05
    assert causal["chunk"]["same_token"]["accuracy"] > 0.7  # the word before is seen
    assert causal["chunk"]["same_token"]["metric"] == "f1"
