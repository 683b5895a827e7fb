"""Equality and similarity of texts: normalized words, shingles, and Jaccard similarity."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence

SHINGLE_WORDS = 3
"""Default length of a shingle, in words."""

# Thai, kana and Han characters: these scripts put no spaces between words, so every character counts as a word. The second
# alternative is a run of any other letters and digits; `[^\W_]` is `\w` without the underscore.
_WORD = re.compile(
    r"[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]|[^\W_\u0e00-\u0e7f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]+"
)


def normalized_words(text: str) -> list[str]:
    """The words of a text, casefolded, without punctuation and white space, in Unicode NFKC."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def normalized(text: str) -> str:
    """The joined `normalized_words`; the stripped text itself if it has no words ("???")."""
    return " ".join(normalized_words(text)) or text.strip()


def runs(words: Sequence[str], size: int) -> Iterator[str]:
    """All runs of `size` words (>= 1), in order; none for a shorter text."""
    return (" ".join(words[i : i + size]) for i in range(len(words) - size + 1))


def shingles(words: Sequence[str], size: int = SHINGLE_WORDS) -> frozenset[str]:
    """The set of `runs`; a shorter text is a single shingle."""
    return frozenset(runs(words, size)) or frozenset({" ".join(words)})


def jaccard(left: frozenset[str], right: frozenset[str]) -> float:
    """Size of the intersection over size of the union, in [0, 1]."""
    union = len(left | right)
    return len(left & right) / union if union else 0.0
