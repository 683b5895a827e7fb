"""What an engine for vectors is: documents with one vector each, found by inner product."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np

from unified_lm.core.errors import DataError
from unified_lm.retrieval.documents import Document, Passage


class VectorEngine(ABC):
    """Documents and their vectors, on disk or on a server.

    `upsert` is there wholly or not at all when the process is killed, or repeating it mends it (each engine says which); so
    whoever adds documents in the same batches again ends with the same content. One process writes at a time; the index that
    owns an engine sees to that.

    Attributes:
        dim: dimensions of a vector.
    """

    dim: int

    def upsert(self, documents: Sequence[Document], vectors: np.ndarray) -> None:
        """Add documents, in place of those with the same ids.

        Args:
            documents: no id twice.
            vectors: float32 `[N, D]`.

        Raises:
            DataError: a vector is not finite; nothing is added.
            CheckpointError: they could not be stored.
        """
        array = self._float32(vectors)
        assert len(array) == len(documents), f"{len(documents)} documents with {len(array)} vectors"
        assert len({document.id for document in documents}) == len(documents), "an id comes twice"
        for document, finite in zip(documents, np.isfinite(array).all(axis=1), strict=True):
            if not finite:
                raise DataError(
                    f"document {document.id!r}: the model gave it a vector with NaN or infinity, which cannot be searched. "
                    "Nothing was added. Load the model in float32, or check its weights."
                )
        if documents:
            self._upsert(documents, array)

    @abstractmethod
    def _upsert(self, documents: Sequence[Document], vectors: np.ndarray) -> None:
        """Store documents with finite vectors, contiguous float32 `[N, D]`; N > 0."""

    @abstractmethod
    def delete(self, ids: Sequence[str]) -> int:
        """Remove documents; returns how many were there."""

    @abstractmethod
    def find(self, ids: Sequence[str]) -> dict[str, Document]:
        """The documents with these ids, as far as there are any."""

    def search(self, queries: np.ndarray, k: int) -> list[list[Passage]]:
        """The documents with the largest inner products, exactly.

        Args:
            queries: float32 `[Q, D]`.
            k: most documents per query.

        Returns:
            For each query, best first; of equal scores the smaller id comes first, also where they decide who is among the k.

        Raises:
            DataError: a query is not finite.
        """
        array = self._float32(queries)
        if not np.isfinite(array).all():
            raise DataError(
                "the model gave the question a vector with NaN or infinity, which nothing can be compared with. "
                "Load the model in float32, or check its weights."
            )
        if k < 1 or not len(array):
            return [[] for _ in array]
        return [self._settle(query, found, k) for query, found in zip(array, self._nearest(array, k + 1), strict=True)]

    def _settle(self, query: np.ndarray, found: list[Passage], k: int) -> list[Passage]:
        """The first `k` by (score, id) of one more: if the last ones are equal, there may be others that are equal to them."""
        asked = k + 1
        while len(found) == asked and min(p.score for p in found) == sorted((p.score for p in found), reverse=True)[k - 1]:
            asked *= 2
            (found,) = self._nearest(query[None], asked)
        return sorted(found, key=lambda passage: (-passage.score, passage.document.id))[:k]

    @abstractmethod
    def _nearest(self, queries: np.ndarray, limit: int) -> list[list[Passage]]:
        """The `limit` documents with the largest inner products with each query, contiguous float32 `[Q, D]`, in any order."""

    def _float32(self, vectors: np.ndarray) -> np.ndarray:
        """Contiguous float32 `[N, D]`."""
        array = np.ascontiguousarray(vectors, dtype=np.float32)
        assert array.shape == (len(array), self.dim), f"vectors of shape {array.shape}, and {self.dim} dimensions"
        return array

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
