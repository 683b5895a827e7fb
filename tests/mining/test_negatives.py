"""Choosing negatives from ranked candidates: filters, ranges, sampling."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from unified_lm.config.schema import SourceConfig
from unified_lm.core.errors import ConfigError
from unified_lm.data.rows.records import PairRecord, RecordKind
from unified_lm.data.sources import RecordSource, open_source
from unified_lm.mining.negatives import (
    DocumentPool,
    Filter,
    MiningConfig,
    MiningStatistics,
    Sampling,
    choose_negatives,
    text_key,
)


def source_of(path: Path, rows: list[dict]) -> RecordSource:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return open_source(SourceConfig(path=str(path)), RecordKind.PAIR, 0)


def record_of(source: RecordSource, row: int) -> PairRecord:
    record = source[row]
    assert isinstance(record, PairRecord)
    return record


@pytest.fixture
def source(tmp_path: Path) -> RecordSource:
    rows = [
        {"query": "who wrote Faust", "pos": ["Goethe wrote Faust, a tragic play in two parts"], "neg": ["Faust is a town"]},
        {"query": "Who wrote FAUST?", "pos": ["It was written by Goethe"]},
        {"query": "where is Rome", "pos": ["GOETHE wrote Faust,  a tragic play in two parts!"]},
        {"query": "what is tea", "pos": ["goethe wrote faust a tragic play in two thick parts"]},
        *({"query": f"query {i}", "pos": [f"document number {i} tells about subject {i}"]} for i in range(20)),
    ]
    return source_of(tmp_path / "rows.jsonl", rows)


def choose(source: RecordSource, scores: list[float], positive: float = 0.9, **settings) -> tuple[list[int], Counter]:
    """Positions chosen for row 0 among the unrelated documents (from number 5 on)."""
    pool, filtered = DocumentPool(source), Counter()
    ranked = np.arange(5, 5 + len(scores))
    config = MiningConfig(**{"num_negatives": 3, "depth": 20, **settings})
    arguments = (pool, record_of(source, 0), [positive], ranked, np.array(scores, np.float32), config)
    return choose_negatives(*arguments, 0, filtered), filtered


def test_the_pool_holds_every_distinct_document(source: RecordSource) -> None:
    pool = DocumentPool(source)
    assert len(pool) == 25
    assert [text.text for text in pool][:3] == [
        "Goethe wrote Faust, a tragic play in two parts",
        "Faust is a town",
        "It was written by Goethe",
    ]
    assert pool.indices(record_of(source, 2).positives) == [3]


def test_planted_duplicates_are_forbidden(source: RecordSource) -> None:
    """Equal texts in other case and spacing, and the positives of the same query elsewhere, are no negatives."""
    pool = DocumentPool(source)
    record = record_of(source, 0)
    assert pool.forbidden(record, ()).tolist() == [0, 2, 3]
    assert pool.forbidden(record, record.negatives).tolist() == [0, 1, 2, 3]
    assert pool.forbidden(record_of(source, 3), ()).tolist() == [4]
    assert text_key("a, B  c") == text_key("A b C") != text_key("a b d")


def test_planted_near_duplicates_are_turned_down(source: RecordSource) -> None:
    """Row 3's document differs from the positive of row 0 by one word: a false negative, unless told otherwise."""
    pool, filtered = DocumentPool(source), Counter()
    ranked, scores = np.array([4, 5, 6]), np.array([0.8, 0.7, 0.6], np.float32)
    for near, expected in ((0.4, [1, 2]), (None, [0, 1])):
        config = MiningConfig(num_negatives=2, depth=3, near_duplicate=near)
        assert choose_negatives(pool, record_of(source, 0), [0.9], ranked, scores, config, 0, filtered) == expected
    assert filtered[Filter.NEAR_DUPLICATE.value] == 1


@pytest.mark.parametrize(
    ("settings", "positive", "expected", "reason"),
    [
        ({"max_fraction": 0.95}, 0.8, [2, 3, 4], Filter.FRACTION),  # at most 0.76
        ({"max_fraction": 0.95}, -0.1, [], Filter.FRACTION),  # at most -0.105, not -0.095
        ({"max_fraction": None, "margin": 0.25}, 0.9, [3, 4, 5], Filter.MARGIN),  # at most 0.65
        ({"max_fraction": None, "max_score": 0.75}, 0.9, [2, 3, 4], Filter.MAX_SCORE),
        ({"max_fraction": None, "min_score": 0.75}, 0.9, [0, 1], Filter.MIN_SCORE),
        ({"max_fraction": None, "skip": 2}, 0.9, [2, 3, 4], None),
        ({"max_fraction": None, "depth": 3, "skip": 0}, 0.9, [0, 1, 2], None),
    ],
)
def test_limits(source: RecordSource, settings: dict, positive: float, expected: list[int], reason: Filter | None) -> None:
    chosen, filtered = choose(source, [0.9, 0.8, 0.7, 0.6, 0.5, 0.4], positive, near_duplicate=None, **settings)
    assert chosen == expected
    assert set(filtered - Counter()) == ({reason.value} if reason else set())


def test_the_least_similar_positive_sets_the_limit(tmp_path: Path) -> None:
    source = source_of(
        tmp_path / "rows.jsonl", [{"query": "q w", "pos": ["one a", "two b"]}, {"query": "r", "pos": ["three c"]}]
    )
    pool, config = DocumentPool(source), MiningConfig(num_negatives=1, depth=1)
    candidates = (np.array([2]), np.array([0.5], np.float32), config, 0, Counter())
    assert choose_negatives(pool, record_of(source, 0), [0.9, 0.6], *candidates) == [0]
    assert choose_negatives(pool, record_of(source, 0), [0.9, 0.52], *candidates) == []


def test_random_sampling_is_seeded_per_row_and_stays_in_range(source: RecordSource) -> None:
    scores = np.linspace(0.8, 0.4, 15).tolist()
    drawn, _ = choose(source, scores, sampling=Sampling.RANDOM, skip=2, depth=12, near_duplicate=None)
    again, _ = choose(source, scores, sampling=Sampling.RANDOM, skip=2, depth=12, near_duplicate=None)
    other, _ = choose(source, scores, sampling=Sampling.RANDOM, skip=2, depth=12, near_duplicate=None, seed=1)
    assert drawn == again != other
    assert len(set(drawn)) == 3
    assert set(drawn) <= set(range(2, 12))


def test_a_text_is_taken_once(tmp_path: Path) -> None:
    rows = [{"query": "q", "pos": ["p"]}, {"query": "r", "pos": ["Some text here", "some TEXT here!", "another text"]}]
    source = source_of(tmp_path / "rows.jsonl", rows)
    filtered: Counter[str] = Counter()
    config = MiningConfig(num_negatives=2, depth=3)
    ranked, scores = np.array([1, 2, 3]), np.array([0.3, 0.2, 0.1], np.float32)
    assert choose_negatives(DocumentPool(source), record_of(source, 0), [0.9], ranked, scores, config, 0, filtered) == [0, 2]
    assert filtered[Filter.REPEATED.value] == 1


def test_settings_are_checked_together() -> None:
    with pytest.raises(ConfigError, match="4 problems") as found:
        MiningConfig(num_negatives=0, max_fraction=1.5, margin=-1, min_score=0.5, max_score=0.1)
    assert "max_fraction: got 1.5, expected more than 0 and at most 1." in str(found.value)
    with pytest.raises(ConfigError, match="depth: 10 minus skip 8 leaves 2 candidates for 7 negatives"):
        MiningConfig(skip=8, depth=10)


def test_statistics_add_up() -> None:
    left = MiningStatistics(2, 3, 1, 0, Counter(a=1), (1, 0.5), (2, 0.5), (0, 0.0))
    total = left + MiningStatistics(1, 1, 0, 0, Counter(a=2, b=1), (1, 0.25), (1, 0.5), (4, 1.0))
    assert total == MiningStatistics(3, 4, 1, 0, Counter(a=3, b=1), (2, 0.75), (3, 1.0), (4, 1.0))
