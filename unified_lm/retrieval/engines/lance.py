"""LanceDB: an embedded engine, a folder of Arrow files with versions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import lancedb
import numpy as np
import pyarrow as pa

from unified_lm.core.errors import CheckpointError
from unified_lm.retrieval.documents import Document, Passage
from unified_lm.retrieval.engines.base import VectorEngine, best_first

_TABLE = "documents"
_FIELDS = ["id", "text", "origin"]
_IDS_PER_FILTER = 1000
_KEPT_FOR_READERS = timedelta(hours=1)
"""A process that opened an older version can go on reading it for so long."""


class LanceEngine(VectorEngine):
    """Documents in a LanceDB table. Every call that writes makes a new version, so it is there wholly or not at all.

    Args:
        location: the folder, created if needed.
        dim: dimensions of a vector.

    Raises:
        CheckpointError: the folder holds vectors of other dimensions, or cannot be read.
    """

    def __init__(self, location: str, dim: int) -> None:
        self.dim = dim
        schema = pa.schema([*((name, pa.string()) for name in _FIELDS), ("vector", pa.list_(pa.float32(), dim))])
        try:
            self._database = lancedb.connect(Path(location))
            made = _TABLE in self._database.table_names()
            self._table = self._database.open_table(_TABLE) if made else self._database.create_table(_TABLE, schema=schema)
            found = self._table.schema.field("vector").type.list_size
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(f"the vectors in {location} cannot be read: {error}. Build the index again.") from error
        if found != dim:
            raise CheckpointError(
                f"{location} holds vectors of {found} dimensions, and {dim} are expected: it is of another model."
            )

    def upsert(self, documents: Sequence[Document], vectors: np.ndarray) -> None:
        """See `VectorEngine.upsert`."""
        if not documents:
            return
        values = pa.array(np.ascontiguousarray(vectors, dtype=np.float32).reshape(-1))
        columns = {name: [getattr(document, name) for document in documents] for name in _FIELDS}
        rows = pa.table({**columns, "vector": pa.FixedSizeListArray.from_arrays(values, self.dim)}, schema=self._table.schema)
        self._table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all().execute(rows)

    def delete(self, ids: Sequence[str]) -> int:
        """See `VectorEngine.delete`."""
        before = len(self)
        for start in range(0, len(ids), _IDS_PER_FILTER):
            self._table.delete(_one_of(ids[start : start + _IDS_PER_FILTER]))
        return before - len(self)

    def find(self, ids: Sequence[str]) -> dict[str, Document]:
        """See `VectorEngine.find`."""
        found: dict[str, Document] = {}
        for start in range(0, len(ids), _IDS_PER_FILTER):
            part = ids[start : start + _IDS_PER_FILTER]
            rows = self._table.search().where(_one_of(part)).select(_FIELDS).limit(len(part)).to_arrow()
            found |= {row["id"]: Document(**row) for row in rows.to_pylist()}
        return found

    def search(self, queries: np.ndarray, k: int) -> list[list[Passage]]:
        """See `VectorEngine.search`."""
        results = []
        for query in np.asarray(queries, dtype=np.float32):
            rows = self._search(query, k).to_pylist() if k > 0 else []
            # LanceDB's distance of this kind is 1 - inner product.
            results.append(
                best_first([Passage(Document(*(row[name] for name in _FIELDS)), 1.0 - row["_distance"]) for row in rows])
            )
        return results

    def _search(self, query: np.ndarray, k: int) -> Any:
        search: Any = self._table.search(query, vector_column_name="vector")
        search = search.distance_type("dot")
        return search.limit(k).select([*_FIELDS, "_distance"]).to_arrow()

    def ids(self) -> Iterator[str]:
        """See `VectorEngine.ids`."""
        for batch in self._table.search().select(["id"]).to_batches():
            yield from batch.column("id").to_pylist()

    def __len__(self) -> int:
        return int(self._table.count_rows())

    def compact(self) -> None:
        """See `VectorEngine.compact`: fewer files, and former versions are removed."""
        self._table.optimize(cleanup_older_than=_KEPT_FOR_READERS)


def _one_of(ids: Sequence[str]) -> str:
    """An SQL filter; a quote inside a text is doubled, everything else means itself."""
    return "id IN (" + ", ".join("'" + id.replace("'", "''") + "'" for id in ids) + ")"
