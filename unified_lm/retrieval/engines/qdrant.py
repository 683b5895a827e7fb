"""Qdrant: a server by its address, or its client's embedded form for small indexes."""

from __future__ import annotations

import os
import pickle
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID, uuid5

import numpy as np
from qdrant_client import QdrantClient, models
from qdrant_client.http.exceptions import ApiException, UnexpectedResponse

from unified_lm.core.errors import CheckpointError, ConfigError
from unified_lm.retrieval.documents import Document, Passage
from unified_lm.retrieval.engines.base import VectorEngine

KEY_VARIABLE = "QDRANT_API_KEY"
"""Environment variable with the server's key, which is neither logged nor stored."""

_SPACE = UUID("6f0c7b0e-3a51-4d43-9d6f-3f1f5b1f6a10")
"""Qdrant's own ids are numbers or UUIDs; those of documents, which may be any text, become UUIDs in this name space."""
_FIELDS = {"id", "text", "origin"}
_POINTS_PER_CALL = 256
_COLLECTION = "documents"


class QdrantEngine(VectorEngine):
    """Documents in a Qdrant collection.

    The embedded form holds everything in memory and is meant for some ten thousand documents (its client says so above
    20,000). One process at a time may have it open, also to search. It stores points as pickles, so open only folders whose
    maker you trust.

    Args:
        location: a folder, or ``http(s)://HOST:PORT[/COLLECTION]`` of a server.
        dim: dimensions of a vector.

    Raises:
        ConfigError: the address holds a password or a query.
        CheckpointError: vectors of other dimensions are there, the folder is in use or damaged, or no server answers.
    """

    def __init__(self, location: str, dim: int) -> None:
        self.dim = dim
        self._location = location
        self._collection = _COLLECTION
        self._on_server = location.startswith(("http://", "https://"))
        with self._reported():
            self._client = self._connect()
        try:
            with self._reported():
                self._check_collection()
        except CheckpointError:
            self._client.close()
            raise

    def _connect(self) -> QdrantClient:
        if not self._on_server:
            _remove_empty_start(Path(self._location))
            return QdrantClient(path=self._location)
        if not {"@", "?", "#"}.isdisjoint(self._location):
            raise ConfigError(
                "the address of a Qdrant server is http(s)://HOST:PORT[/COLLECTION], without user, password or query, since "
                f"it is stored with the index. Put the server's key into the environment variable {KEY_VARIABLE}."
            )
        scheme, _, rest = self._location.partition("://")
        host, _, collection = rest.partition("/")
        self._collection = collection.strip("/") or _COLLECTION
        return QdrantClient(url=f"{scheme}://{host}", api_key=os.environ.get(KEY_VARIABLE), timeout=30)

    @contextmanager
    def _reported(self) -> Iterator[None]:
        """What the client raises where a server refuses or does not answer, or a folder is in use or damaged."""
        try:
            yield
        except UnexpectedResponse as error:
            key = "is set" if os.environ.get(KEY_VARIABLE) else "is not set"
            raise CheckpointError(
                f"the Qdrant server at {self._location} refuses: {error}. Its key is read from the environment variable "
                f"{KEY_VARIABLE}, which {key}."
            ) from error
        except ApiException as error:
            raise CheckpointError(
                f"no Qdrant server answers at {self._location}: {error}. Start it, or correct the address."
            ) from error
        except (ConfigError, CheckpointError):
            raise
        except (OSError, RuntimeError, ValueError, LookupError, EOFError, sqlite3.Error, pickle.UnpicklingError) as error:
            raise CheckpointError(
                f"the vectors in {self._location} cannot be read or written: {error}. "
                "If another process has them open, wait for it; if the folder is damaged, build the index again."
            ) from error

    def _check_collection(self) -> None:
        if not self._client.collection_exists(self._collection):
            vectors = models.VectorParams(size=self.dim, distance=models.Distance.DOT)
            self._client.create_collection(self._collection, vectors_config=vectors)
        found = self._client.get_collection(self._collection).config.params.vectors
        if not isinstance(found, models.VectorParams) or found.size != self.dim:
            size = found.size if isinstance(found, models.VectorParams) else "several"
            raise CheckpointError(
                f"{self._location} holds vectors of {size} dimensions, and {self.dim} are expected: it is of another model."
            )
        points, _ = self._client.scroll(self._collection, limit=1, with_payload=True)
        if found.distance is not models.Distance.DOT or any(set(point.payload or {}) != _FIELDS for point in points):
            raise CheckpointError(
                f"the Qdrant collection '{self._collection}' of {self._location} was not made by unified_lm "
                f"(distance {found.distance.value}). Name another collection, which is made if it is not there."
            )

    def _upsert(self, documents: Sequence[Document], vectors: np.ndarray) -> None:
        """A call that was cut off has added some of the documents; repeating it adds the others."""
        points = [
            models.PointStruct(id=_key(d.id), vector=v.tolist(), payload={"id": d.id, "text": d.text, "origin": d.origin})
            for d, v in zip(documents, vectors, strict=True)
        ]
        with self._reported():
            for start in range(0, len(points), _POINTS_PER_CALL):
                result = self._client.upsert(self._collection, points[start : start + _POINTS_PER_CALL], wait=True)
                if result.status is not models.UpdateStatus.COMPLETED:
                    raise CheckpointError(f"Qdrant has not stored the documents: {result.status}. Run the command again.")

    def delete(self, ids: Sequence[str]) -> int:
        """See `VectorEngine.delete`."""
        found = list(self.find(ids))
        with self._reported():
            if found:
                self._client.delete(self._collection, models.PointIdsList(points=[_key(id) for id in found]), wait=True)
        return len(found)

    def find(self, ids: Sequence[str]) -> dict[str, Document]:
        """See `VectorEngine.find`."""
        with self._reported():
            records = self._client.retrieve(self._collection, [_key(id) for id in ids], with_payload=True) if ids else []
        documents = [Document(**(record.payload or {})) for record in records]
        return {document.id: document for document in documents}

    def _nearest(self, queries: np.ndarray, limit: int) -> list[list[Passage]]:
        # The embedded form is always exact, and warns of the parameter.
        exact = models.SearchParams(exact=True) if self._on_server else None
        requests = [models.QueryRequest(query=q.tolist(), limit=limit, params=exact, with_payload=True) for q in queries]
        with self._reported():
            responses = self._client.query_batch_points(self._collection, requests)
        return [
            [Passage(Document(**(point.payload or {})), float(point.score)) for point in response.points]
            for response in responses
        ]

    def ids(self) -> Iterator[str]:
        """See `VectorEngine.ids`."""
        offset = None
        while True:
            with self._reported():
                records, offset = self._client.scroll(
                    self._collection, limit=_POINTS_PER_CALL, offset=offset, with_payload=["id"]
                )
            yield from (str((record.payload or {})["id"]) for record in records)
            if offset is None:
                return

    def __len__(self) -> int:
        with self._reported():
            return int(self._client.count(self._collection, exact=True).count)

    def close(self) -> None:
        """See `VectorEngine.close`."""
        self._client.close()


def _key(id: str) -> str:
    return str(uuid5(_SPACE, id))


def _remove_empty_start(folder: Path) -> None:
    """A process that was killed while the client made the folder leaves an empty list of collections, which it cannot read."""
    folder.mkdir(parents=True, exist_ok=True)
    listed = folder / "meta.json"
    if listed.is_file() and not listed.stat().st_size and not (folder / "collection").exists():
        listed.unlink()
