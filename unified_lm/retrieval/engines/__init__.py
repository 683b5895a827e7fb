"""Engines for vectors, by name.

LanceDB is the default: a folder like an export, every addition a version that is there wholly or not at all, documents are
replaced and deleted, several processes may have it open, and neither vectors nor texts are held in memory. FAISS searches
faster, from memory, but is no store: texts, replacing, deleting and whole additions would be ours to write. Qdrant is the other
engine, for those who have a server; its client's embedded form is slow to add to, held in memory and open to one process.

Vectors of 576 dimensions with texts of 300 characters, batches of 256, on two cores (`benchmarks/vector_engines.py`; FAISS is
an exact index in memory beside a parquet file per batch; Qdrant is embedded, and was stopped after three minutes at 39,424,
measured beside other work; two numbers are two runs):

                           5,000 vectors               100,000 vectors     39,424
                           LanceDB  FAISS   Qdrant     LanceDB  FAISS      Qdrant
    add, s                 0.5      0.9     18         20       13         180
    a last batch, ms       25       40      920        25       30         1,740
    open again, s          0.01     0.2     0.6-1.1    0.01     2-3        12
    search 1 question, ms  25-30    2       4          250      37-66      31
    search 64, ms          110-130  45-90   200        1,750    900-1,600  1,900
    on disk, MB            12       18      31         237      363        246
    delete 256, ms         11-18    -       800-1,000  14-25    -          1,650
    packages, MB           181      65      26

A process that is killed in the middle of adding leaves whole batches in LanceDB, and may leave some documents of a batch in
Qdrant, which repeating the batch mends. Both were killed twenty times and then held the same as if they had not been.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module

from unified_lm.core.errors import ConfigError, did_you_mean
from unified_lm.retrieval.engines.base import VectorEngine

ENGINES: Mapping[str, str] = {
    "lance": "unified_lm.retrieval.engines.lance.LanceEngine",
    "qdrant": "unified_lm.retrieval.engines.qdrant.QdrantEngine",
}
"""Name -> class."""


def open_engine(name: str, location: str, dim: int) -> VectorEngine:
    """Open an engine, or create an empty one.

    Args:
        name: of the table `ENGINES`.
        location: a folder, or a server's address where the engine has servers.
        dim: dimensions of a vector.

    Raises:
        ConfigError: there is no such engine, or its package is not installed.
        CheckpointError: what is there is of other dimensions, or cannot be opened.
    """
    if name not in ENGINES:
        raise ConfigError(f"unknown vector engine '{name}'.{did_you_mean(name, ENGINES)}")
    module, _, attribute = ENGINES[name].rpartition(".")
    try:
        engine: type[VectorEngine] = getattr(import_module(module), attribute)
    except ModuleNotFoundError as error:
        raise ConfigError(f"vector engine '{name}' needs {error.name}: pip install 'unified_lm[rag]'.") from error
    return engine(location, dim)  # type: ignore[call-arg]
