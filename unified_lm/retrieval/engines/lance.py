"""LanceDB: an embedded engine, a folder of Arrow files with versions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import lancedb
import numpy as np
import pyarrow as pa

from unified_lm.core.errors import CheckpointError
from unified_lm.retrieval.documents import Document, Passage
from unified_lm.retrieval.engines.base import VectorEngine

_TABLE = "documents"
_FIELDS = ["id", "text", "origin"]
_IDS_PER_FILTER = 1000
_KEPT_FOR_READERS = timedelta(minutes=1)
"""For so long a version stays that a search or a scan may still be reading. Every new call reads the latest one."""
_FEWEST_TO_MERGE = 128
_SHARE_TO_MERGE = 8
"""Each addition is a file, and makes the next one slower; putting files together rewrites all rows. So it is done after so many
additions, or an eighth of all, whichever is more: 1 M rows are rewritten some ten times, not a hundred."""


class LanceEngine(VectorEngine):
    """Documents in a LanceDB table. Every call that writes makes a new version, so it is there wholly or not at all.

    Several processes may have it open. Each call sees what has been written before it began.

    Args:
        location: the folder, created if needed.
        dim: dimensions of a vector.

    Raises:
        CheckpointError: the folder holds vectors of other dimensions, or cannot be read.
    """

    def __init__(self, location: str, dim: int) -> None:
        self.dim = dim
        self._location = location
        self._upserts = self._unmerged = 0
        schema = pa.schema([*((name, pa.string()) for name in _FIELDS), ("vector", pa.list_(pa.float32(), dim))])
        with self._reported():
            database = lancedb.connect(Path(location), read_consistency_interval=timedelta(0))
            # A folder without a version is what is left of a process that was killed while it made the table.
            made = any(Path(location, f"{_TABLE}.lance", "_versions").glob("*.manifest"))
            self._table = database.open_table(_TABLE) if made else database.create_table(_TABLE, schema=schema, exist_ok=True)
            found = self._table.schema.field("vector").type.list_size
        if found != dim:
            raise CheckpointError(
                f"{location} holds vectors of {found} dimensions, and {dim} are expected: it is of another model."
            )

    @contextmanager
    def _reported(self) -> Iterator[None]:
        """LanceDB reports damaged and missing files, and a full disk, by errors of several kinds."""
        try:
            yield
        except Exception as error:
            # Damaged bytes may also end in a panic of its Rust part, whose class cannot be imported.
            if not isinstance(error, (OSError, RuntimeError, ValueError, KeyError)) and type(error).__name__ != "RustPanic":
                raise
            raise CheckpointError(
                f"the vectors in {self._location} cannot be read or written: {error}. "
                "If the disk has room and the folder is whole, run the command again; otherwise build the index again."
            ) from error

    def _upsert(self, documents: Sequence[Document], vectors: np.ndarray) -> None:
        columns = {name: [getattr(document, name) for document in documents] for name in _FIELDS}
        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), self.dim)
        with self._reported():
            rows = pa.table({**columns, "vector": column}, schema=self._table.schema)
            self._table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all().execute(rows)
        self._upserts, self._unmerged = self._upserts + 1, self._unmerged + 1
        if self._unmerged >= max(_FEWEST_TO_MERGE, self._upserts // _SHARE_TO_MERGE):
            self.compact()

    def delete(self, ids: Sequence[str]) -> int:
        """See `VectorEngine.delete`."""
        before = len(self)
        with self._reported():
            for start in range(0, len(ids), _IDS_PER_FILTER):
                self._table.delete(_one_of(ids[start : start + _IDS_PER_FILTER]))
        return before - len(self)

    def find(self, ids: Sequence[str]) -> dict[str, Document]:
        """See `VectorEngine.find`."""
        found: dict[str, Document] = {}
        with self._reported():
            for start in range(0, len(ids), _IDS_PER_FILTER):
                part = ids[start : start + _IDS_PER_FILTER]
                rows = self._table.search().where(_one_of(part)).select(_FIELDS).limit(len(part)).to_arrow()
                found |= {row["id"]: Document(**row) for row in rows.to_pylist()}
        return found

    def _nearest(self, queries: np.ndarray, limit: int) -> list[list[Passage]]:
        found: list[list[Passage]] = [[] for _ in queries]
        with self._reported():
            search: Any = self._table.search(queries, vector_column_name="vector")
            rows = search.distance_type("dot").limit(limit).select([*_FIELDS, "_distance"]).to_arrow()
        # With one query there is no column that says whose row it is. LanceDB's distance of this kind is 1 - inner product.
        for row in rows.to_pylist():
            document = Document(*(row[name] for name in _FIELDS))
            found[row.get("query_index", 0)].append(Passage(document, 1.0 - row["_distance"]))
        return found

    def ids(self) -> Iterator[str]:
        """See `VectorEngine.ids`."""
        with self._reported():
            batches = self._table.search().select(["id"]).to_batches()
        for batch in batches:
            yield from batch.column("id").to_pylist()

    def __len__(self) -> int:
        with self._reported():
            return int(self._table.count_rows())

    def compact(self) -> None:
        """See `VectorEngine.compact`: fewer files, and former versions are removed."""
        with self._reported():
            self._table.optimize(cleanup_older_than=_KEPT_FOR_READERS)
        self._unmerged = 0


def _one_of(ids: Sequence[str]) -> str:
    """An SQL filter; a quote inside a text is doubled, everything else means itself."""
    return "id IN (" + ", ".join("'" + id.replace("'", "''") + "'" for id in ids) + ")"
