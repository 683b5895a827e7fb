"""What an engine for vectors is: documents with one vector each, found by inner product."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np

from unified_lm.core.errors import DataError
from unified_lm.retrieval.documents import Document, Passage


class VectorEngine(ABC):
    """Documents and their vectors, on disk or on a server.

    `upsert` is there wholly or not at all when the process dies, or repeating it mends it; so whoever adds documents in the
    same batches again ends with the same content. One process writes at a time; the index that owns an engine sees to that.

    Attributes:
        dim: dimensions of a vector.
    """

    dim: int

    @abstractmethod
    def upsert(self, documents: Sequence[Document], vectors: np.ndarray) -> None:
        """Add documents, in place of those with the same ids.

        Args:
            documents: no id twice.
            vectors: float32 `[N, D]`.
        """

    @abstractmethod
    def delete(self, ids: Sequence[str]) -> int:
        """Remove documents; returns how many were there."""

    @abstractmethod
    def find(self, ids: Sequence[str]) -> dict[str, Document]:
        """The documents with these ids, as far as there are any."""

    @abstractmethod
    def search(self, queries: np.ndarray, k: int) -> list[list[Passage]]:
        """The documents with the largest inner products, exactly.

        Args:
            queries: float32 `[Q, D]`.
            k: most documents per query.

        Returns:
            For each query, best first; of equal scores the smaller id comes first.
        """

    @abstractmethod
    def ids(self) -> Iterator[str]:
        """All ids, in no particular order, without holding them all."""

    @abstractmethod
    def __len__(self) -> int: ...

    def compact(self) -> None:  # noqa: B027 - not every engine has something to do
        """Put in order what many small additions left behind; nothing else changes."""

    def close(self) -> None:  # noqa: B027 - as above
        """Let go of files and connections."""

    def get(self, ids: Sequence[str]) -> list[Document]:
        """The documents with these ids, in this order.

        Raises:
            DataError: some are not there.
        """
        found = self.find(ids)
        if missing := [id for id in ids if id not in found]:
            shown = ", ".join(map(repr, missing[:3])) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
            raise DataError(f"no document {shown} among the {len(self):,} of the index.")
        return [found[id] for id in ids]


def best_first(passages: Sequence[Passage]) -> list[Passage]:
    """Passages by falling score, then by id."""
    return sorted(passages, key=lambda passage: (-passage.score, passage.document.id))
