"""The vector engines against each other, and against FAISS beside parquet files where faiss is installed: time to add in
batches of 256, to open again, of exact searches (k = 10; one question and 64), to delete 256, and bytes on disk.

Vectors are random unit ones of 576 dimensions, texts have 300 characters. An engine whose additions take longer than
`--minutes` is stopped there, and is measured with what it holds. LanceDB keeps former versions for a minute:
`--settle 61` waits until they can be removed before bytes are counted. Ratios are within one run of this script.

Usage: python benchmarks/vector_engines.py [--sizes 5000 100000] [--arms lance qdrant faiss] [--minutes 5] [--settle 0]
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from rich.console import Console
from rich.table import Table

from unified_lm.retrieval.documents import Document
from unified_lm.retrieval.engines import ENGINES, open_engine

DIM = 576
BATCH = 256


class FaissBesideParquet:
    """The least that FAISS needs to be a store: a parquet file per batch, and an exact index that is made of them in memory."""

    def __init__(self, folder: str, dim: int) -> None:
        import faiss

        self._folder, self._index, self._rows = Path(folder), faiss.IndexFlatIP(dim), list[Any]()
        self._folder.mkdir(exist_ok=True)
        for path in sorted(self._folder.glob("*.parquet")):
            rows = pyarrow.parquet.read_table(path)
            self._take(rows, rows["vector"].combine_chunks().flatten().to_numpy().reshape(-1, dim))

    def _take(self, rows: pa.Table, vectors: np.ndarray) -> None:
        self._index.add(vectors)
        self._rows.append(rows.select(["id", "text"]))

    def upsert(self, documents: list[Document], vectors: np.ndarray) -> None:
        """Adds only: what replaces or removes documents would have to be written."""
        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
        rows = pa.table({"id": [d.id for d in documents], "text": [d.text for d in documents], "vector": column})
        pyarrow.parquet.write_table(rows, self._folder / f"{len(self._rows):06d}.parquet")
        self._take(rows, vectors)

    def search(self, queries: np.ndarray, k: int) -> list[list[dict[str, str]]]:
        """The texts found, best first."""
        _, numbers = self._index.search(queries, k)
        return [[self._row(int(number)) for number in row] for row in numbers]

    def _row(self, number: int) -> dict[str, str]:
        part, row = divmod(number, BATCH)
        found: dict[str, str] = self._rows[part].slice(row, 1).to_pylist()[0]
        return found

    def __len__(self) -> int:
        return int(self._index.ntotal)

    def close(self) -> None:
        """Nothing is open."""


def seconds(job: Callable[[], object], repeats: int = 5) -> float:
    """Median time of a call, after one that is not counted."""
    taken = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        job()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[1:])


def folder_bytes(folder: str) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def measure(arm: str, size: int, limit: float, settle: float) -> list[str]:
    """One row of the table."""
    rng = np.random.default_rng(0)
    folder = tempfile.mkdtemp()
    opened = (lambda: FaissBesideParquet(folder, DIM)) if arm == "faiss" else (lambda: open_engine(arm, folder, DIM))
    engine: Any = opened()
    started, slowest = time.perf_counter(), list[float]()
    for start in range(0, size, BATCH):
        count = min(BATCH, size - start)
        vectors = rng.normal(size=(count, DIM)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        documents = [Document(f"document {start + i}", f"{start + i} " + "t" * 300) for i in range(count)]
        began = time.perf_counter()
        engine.upsert(documents, vectors)
        slowest.append(time.perf_counter() - began)
        if time.perf_counter() - started > limit:
            break
    held = len(engine)
    if arm != "faiss":
        engine.compact()
        time.sleep(settle)
        engine.compact()
    adding = sum(slowest)
    engine.close()
    del engine
    began = time.perf_counter()
    engine = opened()
    reopening = time.perf_counter() - began
    queries = rng.normal(size=(64, DIM)).astype(np.float32)
    row = [
        arm,
        f"{held:,}",
        f"{adding:.1f}",
        f"{1000 * statistics.median(slowest[:5]):.0f} / {1000 * statistics.median(slowest[-5:]):.0f}",
        f"{reopening:.2f}",
        f"{1000 * seconds(lambda: engine.search(queries[:1], 10)):.1f}",
        f"{1000 * seconds(lambda: engine.search(queries, 10), 3):.0f}",
        f"{folder_bytes(folder) / 1e6:.0f}",
    ]
    if arm != "faiss":
        began = time.perf_counter()
        assert engine.delete([f"document {i}" for i in range(BATCH)]) == BATCH
        row.append(f"{1000 * (time.perf_counter() - began):.0f}")
    engine.close()
    shutil.rmtree(folder)
    return row


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[5_000])
    parser.add_argument("--arms", nargs="+", default=sorted(ENGINES))
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--settle", type=float, default=0.0)
    arguments = parser.parse_args()
    warnings.simplefilter("once")
    columns = "engine|vectors|add, s|first / last batches, ms|open, s|one question, ms|64 questions, ms|MB|delete 256, ms"
    table = Table(*columns.split("|"))
    for size in arguments.sizes:
        for arm in arguments.arms:
            row = measure(arm, size, 60 * arguments.minutes, arguments.settle)
            print(*row, sep=" | ", flush=True)
            table.add_row(*row)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
