"""Engines for vectors, by name.

LanceDB is the default: it is a folder like an export, every addition is a transaction, so an indexer that is killed leaves
whole batches, it deletes and replaces documents, and it reads vectors and texts from disk instead of holding them. FAISS is a
library of searches, not a store: texts, deletions and atomic writes would be ours to write. Qdrant is the second engine, for
those who have a server.
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
