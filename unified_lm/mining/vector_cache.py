"""Embeddings on disk, in chunks addressed by their content.

A killed run resumes where it stopped, and processes with a common disk divide the work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Protocol

import numpy as np
from filelock import FileLock, Timeout

from unified_lm.core.errors import DataError
from unified_lm.core.files import read_array, write_array
from unified_lm.data.rows.records import Text

CHUNK = 1024
"""Default number of texts per file."""

Encode = Callable[[Sequence[Text]], np.ndarray]
"""Texts -> unit vectors, float32 `[texts, D]`."""


class Texts(Protocol):
    """Random access to texts, possibly on disk."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Text: ...


class VectorCache:
    """Files of embeddings, each named by a hash of the model, the prompts and its texts.

    A chunk is always embedded as a whole and in one call, so that its numbers do not depend on the caller.

    Args:
        folder: folder of the files, created if needed.
        tag: identifies everything else that affects the vectors: model, role, prompts.
        encode: embeds the texts of one chunk.
        chunk: texts per file.
    """

    def __init__(self, folder: Path, tag: str, encode: Encode, chunk: int = CHUNK) -> None:
        self._folder = folder
        self._tag = tag
        self._encode = encode
        self.chunk = chunk

    def chunk_of(self, texts: Sequence[Text]) -> np.ndarray:
        """The vectors of one chunk as a memory-map, computed first if the cache lacks them or holds them damaged.

        Raises:
            DataError: the cache cannot be written, or the encoder did not return a finite vector per text.
        """
        path = self._path(texts)
        vectors = self._read(path)
        if vectors is None:
            with FileLock(path.with_suffix(".lock")):
                vectors = self._read(path)
                if vectors is None:
                    self._write(path, texts)
                    vectors = self._read(path)
        assert vectors is not None, f"{path} was just written"
        return vectors

    def _read(self, path: Path) -> np.ndarray | None:
        try:
            return read_array(path)
        except OSError as error:
            raise DataError(f"cannot read the cache of vectors, {path}: {error}. Set UNIFIED_LM_CACHE.") from error

    def chunks(self, texts: Texts, *, start: float = 0.0, progress: Callable[[int], None] | None = None) -> list[np.ndarray]:
        """The vectors of many texts, chunk by chunk.

        Args:
            texts: in the order of the result.
            start: chunk to begin with, as a fraction of all chunks in [0, 1): processes that begin at different chunks
                rarely wait for each other.
            progress: called with the number of texts done since the last call.

        Returns:
            Memory-maps, float32 `[up to chunk, D]`.
        """
        starts = list(range(0, len(texts), self.chunk))
        # First pass: skip chunks that another process is computing. Second pass: wait for them.
        turn = int(start * len(starts))
        waiting = starts[turn:] + starts[:turn]
        found: dict[int, np.ndarray] = {}
        patient = False
        while waiting:
            busy = []
            for first in waiting:
                part = [texts[i] for i in range(first, min(first + self.chunk, len(texts)))]
                if not patient and self._is_busy(part):
                    busy.append(first)
                    continue
                found[first] = self.chunk_of(part)
                if progress is not None:
                    progress(len(part))
            waiting, patient = busy, True
        return [found[first] for first in starts]

    def _is_busy(self, texts: Sequence[Text]) -> bool:
        """Whether another process is embedding this chunk now."""
        path = self._path(texts)
        if path.exists():
            return False
        try:
            with FileLock(path.with_suffix(".lock"), timeout=0):
                return False
        except Timeout:
            return True

    def _path(self, texts: Sequence[Text]) -> Path:
        digest = blake2b(self._tag.encode(), digest_size=16)
        for text in texts:
            for part in (text.instruction, text.text):
                raw = part.encode()
                digest.update(len(raw).to_bytes(8, "little") + raw)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"cannot write the cache of vectors, {self._folder}: {error}. Set UNIFIED_LM_CACHE.") from error
        return self._folder / f"{digest.hexdigest()}.npy"

    def _write(self, path: Path, texts: Sequence[Text]) -> None:
        vectors = np.asarray(self._encode(texts), np.float32)
        if vectors.ndim != 2 or len(vectors) != len(texts):
            raise DataError(f"the model gave vectors of shape {vectors.shape} for {len(texts)} texts; expected one row each.")
        if not np.isfinite(vectors).all():
            bad = int(np.flatnonzero(~np.isfinite(vectors).all(axis=1))[0])
            raise DataError(f"the model's vector of {texts[bad].text[:60]!r} is not finite; try --dtype float32.")
        try:
            write_array(path, vectors)
        except OSError as error:
            raise DataError(f"cannot write the cache of vectors, {path}: {error}. Set UNIFIED_LM_CACHE.") from error
