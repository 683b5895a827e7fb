"""What is indexed and found."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b


@dataclass(frozen=True, slots=True)
class Document:
    """A text to find.

    Attributes:
        id: any text, one of its kind in an index.
        text: the text.
        origin: where it is from, for people ("guide.md, line 12"); "" if unknown.
    """

    id: str
    text: str
    origin: str = ""


@dataclass(frozen=True, slots=True)
class Passage:
    """A document that was found, with its score: the inner product with the question's vector, or what a reranker gave it."""

    document: Document
    score: float


def text_id(text: str) -> str:
    """The id of a document that has none: a hash of its text, 32 hexadecimal digits."""
    return blake2b(text.encode(), digest_size=16).hexdigest()
