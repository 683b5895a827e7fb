"""When two texts say the same: normalized words, shingles, and their Jaccard similarity."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence

SHINGLE_WORDS = 3
"""Words per shingle when two texts are compared with each other."""

# Chinese, Japanese and Thai put no spaces between words, so each of their characters counts as one.
_WORD = re.compile(
    r"[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]|[^\W_\u0e00-\u0e7f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]+"
)


def normalized_words(text: str) -> list[str]:
    """The words of a text without case, punctuation, white space and compatibility forms (Unicode NFKC)."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def normalized(text: str) -> str:
    """`normalized_words`, joined; the text itself, stripped, where it has no word at all ("???")."""
    return " ".join(normalized_words(text)) or text.strip()


def runs(words: Sequence[str], size: int) -> Iterator[str]:
    """All runs of `size` words (>= 1), in order; none of a shorter text."""
    return (" ".join(words[i : i + size]) for i in range(len(words) - size + 1))


def shingles(words: Sequence[str], size: int = SHINGLE_WORDS) -> frozenset[str]:
    """The set of `runs`; a shorter text is one shingle."""
    return frozenset(runs(words, size)) or frozenset({" ".join(words)})


def jaccard(left: frozenset[str], right: frozenset[str]) -> float:
    """Shared shingles over all shingles, in [0, 1]."""
    union = len(left | right)
    return len(left & right) / union if union else 0.0
