"""Words, shingles and similarity of texts."""

import pytest

from unified_lm.mining.text_match import jaccard, normalized, normalized_words, shingles


def test_normalized_texts() -> None:
    assert normalized("  Hello,\tWORLD!\n") == normalized("hello world") == "hello world"
    assert normalized("ﬁne “text”") == "fine text"
    assert normalized("???") == "???"
    assert normalized_words("東京 tower 2") == ["東", "京", "tower", "2"]
    assert normalized("snake_case") == "snake case"


def test_jaccard() -> None:
    left, right = shingles(list("abcd")), shingles(list("bcde"))
    assert left == {"a b c", "b c d"}
    assert jaccard(left, right) == pytest.approx(1 / 3)
    assert shingles(["a"]) == {"a"}
    assert jaccard(shingles(["a", "b"]), shingles(["a", "b"])) == 1.0
