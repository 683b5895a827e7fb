"""Qdrant: a server by its address, or its client's embedded form for small indexes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from uuid import UUID, uuid5

import numpy as np
from qdrant_client import QdrantClient, models
from qdrant_client.http.exceptions import ApiException, ResponseHandlingException

from unified_lm.core.errors import CheckpointError, OutputError
from unified_lm.retrieval.documents import Document, Passage
from unified_lm.retrieval.engines.base import VectorEngine, best_first

KEY_VARIABLE = "QDRANT_API_KEY"
"""Environment variable with the server's key, which is neither logged nor stored."""

_SPACE = UUID("6f0c7b0e-3a51-4d43-9d6f-3f1f5b1f6a10")
"""Qdrant's own ids are numbers or UUIDs; those of documents, which may be any text, become UUIDs in this name space."""
_POINTS_PER_CALL = 256
_COLLECTION = "documents"


class QdrantEngine(VectorEngine):
    """Documents in a Qdrant collection.

    The embedded form searches in memory and is meant for some ten thousand documents (its client says so above 20,000).

    Args:
        location: a folder, or ``http(s)://HOST:PORT[/COLLECTION]`` of a server.
        dim: dimensions of a vector.

    Raises:
        CheckpointError: vectors of other dimensions are there, the folder is in use, or no server answers.
    """

    def __init__(self, location: str, dim: int) -> None:
        self.dim = dim
        self._collection = _COLLECTION
        self._on_server = location.startswith(("http://", "https://"))
        try:
            if self._on_server:
                scheme, _, rest = location.partition("://")
                host, _, collection = rest.partition("/")
                self._collection = collection.strip("/") or _COLLECTION
                self._client = QdrantClient(url=f"{scheme}://{host}", api_key=os.environ.get(KEY_VARIABLE), timeout=30)
            else:
                Path(location).mkdir(parents=True, exist_ok=True)
                self._client = QdrantClient(path=location)
            self._create(location)
        except (ApiException, ResponseHandlingException) as error:
            raise CheckpointError(
                f"no Qdrant server answers at {location}: {error}. Start it, or correct the address."
            ) from error
        except (RuntimeError, OSError) as error:
            raise CheckpointError(f"the vectors in {location} cannot be opened: {error}.") from error

    def _create(self, location: str) -> None:
        if not self._client.collection_exists(self._collection):
            vectors = models.VectorParams(size=self.dim, distance=models.Distance.DOT)
            self._client.create_collection(self._collection, vectors_config=vectors)
        found = self._client.get_collection(self._collection).config.params.vectors
        if not isinstance(found, models.VectorParams) or found.size != self.dim:
            size = found.size if isinstance(found, models.VectorParams) else "several"
            raise CheckpointError(
                f"{location} holds vectors of {size} dimensions, and {self.dim} are expected: it is of another model."
            )

    def upsert(self, documents: Sequence[Document], vectors: np.ndarray) -> None:
        """See `VectorEngine.upsert`: a call that was cut off has added some of the documents; repeating it adds the others."""
        points = [
            models.PointStruct(id=_key(d.id), vector=v.tolist(), payload={"id": d.id, "text": d.text, "origin": d.origin})
            for d, v in zip(documents, np.asarray(vectors, dtype=np.float32), strict=True)
        ]
        for start in range(0, len(points), _POINTS_PER_CALL):
            result = self._client.upsert(self._collection, points[start : start + _POINTS_PER_CALL], wait=True)
            if result.status is not models.UpdateStatus.COMPLETED:
                raise OutputError(f"Qdrant has not stored the documents: {result.status}. Run the command again.")

    def delete(self, ids: Sequence[str]) -> int:
        """See `VectorEngine.delete`."""
        found = list(self.find(ids))
        if found:
            self._client.delete(self._collection, models.PointIdsList(points=[_key(id) for id in found]), wait=True)
        return len(found)

    def find(self, ids: Sequence[str]) -> dict[str, Document]:
        """See `VectorEngine.find`."""
        records = self._client.retrieve(self._collection, [_key(id) for id in ids], with_payload=True) if ids else []
        documents = [Document(**(record.payload or {})) for record in records]
        return {document.id: document for document in documents}

    def search(self, queries: np.ndarray, k: int) -> list[list[Passage]]:
        """See `VectorEngine.search`."""
        if k < 1:
            return [[] for _ in queries]
        # The embedded form is always exact, and warns of the parameter.
        exact = models.SearchParams(exact=True) if self._on_server else None
        results = []
        for query in np.asarray(queries, dtype=np.float32):
            points = self._client.query_points(self._collection, query.tolist(), limit=k, search_params=exact).points
            results.append(best_first([Passage(Document(**(point.payload or {})), float(point.score)) for point in points]))
        return results

    def ids(self) -> Iterator[str]:
        """See `VectorEngine.ids`."""
        offset = None
        while True:
            records, offset = self._client.scroll(self._collection, limit=_POINTS_PER_CALL, offset=offset, with_payload=["id"])
            yield from (str((record.payload or {})["id"]) for record in records)
            if offset is None:
                return

    def __len__(self) -> int:
        return int(self._client.count(self._collection, exact=True).count)

    def close(self) -> None:
        """See `VectorEngine.close`."""
        self._client.close()


def _key(id: str) -> str:
    return str(uuid5(_SPACE, id))
