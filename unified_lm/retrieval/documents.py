"""What is indexed and found."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b

from unified_lm.core.errors import DataError
from unified_lm.core.typed import half_pair


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

    def __post_init__(self) -> None:
        """Check the texts: JSON can spell half of a pair of surrogates, a file's name can hold any bytes; no store takes these.

        Raises:
            DataError: one of the texts is no Unicode.
        """
        for field in (self.id, self.text, self.origin):
            if isinstance(field, str) and (place := half_pair(field)) is not None:
                where = f" ({self.origin})" if self.origin else ""
                raise DataError(
                    f"document {self.id!r}{where}: character {place + 1} of {field[:20]!r} is half of a surrogate pair, "
                    "which is no Unicode text. Remove it from the document."
                )


@dataclass(frozen=True, slots=True)
class Passage:
    """A document that was found, with its score: the inner product with the question's vector, or what a reranker gave it."""

    document: Document
    score: float


def text_id(text: str) -> str:
    """The id of a document that has none: a hash of its text, 32 hexadecimal digits."""
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


class SeenDocuments:
    """The documents of one addition so far, as hashes: a million of them take some 100 MB."""

    def __init__(self) -> None:
        self._ids, self._texts = set[int](), set[int]()

    def check(self, document: Document) -> None:
        """Take note of a document.

        Raises:
            DataError: it is empty or no text, or its id has come with another text.
        """
        where = f" ({document.origin})" if document.origin else ""
        if not isinstance(document.text, str) or not document.text.strip():
            raise DataError(f"document {document.id!r}{where} is empty. Leave it out, or give it content.")
        named, whole = hash(document.id), hash((document.id, document.text))
        if named in self._ids and whole not in self._texts:
            raise DataError(
                f"document {document.id!r}{where} comes a second time, with another text. Give every document an "
                "id of its own, or none."
            )
        self._ids.add(named)
        self._texts.add(whole)
