"""The folder of `retrieval.vector_folder` while it is filled: what is to be done in it, who does it, and what is done.

Any number of processes claim shards of texts here, with locks that end with them, and mark what they have written.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import time
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from unified_lm.batch import Sample
from unified_lm.core.errors import CheckpointError, DataError
from unified_lm.core.files import replacing, sync, write_json
from unified_lm.core.user_files import naming
from unified_lm.inference import UnifiedLM
from unified_lm.retrieval.documents import Document
from unified_lm.retrieval.vector_manifest import FORMAT, MANIFEST, Settings, VectorManifest

VECTORS, DOCUMENTS, SHARDS = "vectors.npy", "documents.parquet", "shards"
PARTIAL = f"{VECTORS}.partial"
LOCK = ".embeddings.lock"

_POLL_SECONDS = 0.5
_COLUMNS = pa.schema([("id", pa.string()), ("origin", pa.string())])
_MARK = re.compile(r"[0-9]{8,}\.(json|lock)|\.[0-9]{8,}\.json\..+\.building\.json")
"""Names in the folder of marks: of marks, locks, and what a process that writes a mark leaves when it is killed."""

T = TypeVar("T")


@dataclass(frozen=True)
class Shard:
    """Texts that this process has claimed, as the model reads them."""

    number: int
    samples: list[Sample]
    lock: FileLock


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Wait for the lock of a folder, which is made where it is missing, and hold it.

    What ends in an error and has written nothing leaves no folder behind that was not there before. Others may be waiting for
    the lock that goes with it: they make the folder anew, and see for themselves.
    """
    while True:
        made = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except FileNotFoundError:  # the folder was removed between the two
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not os.fstat(lock).st_nlink:  # removed while this process waited
                continue
            try:
                yield
            except BaseException:
                with suppress(OSError):  # the error under way is what is to be told
                    if [path.name for path in folder.iterdir()] == [LOCK]:
                        (folder / LOCK).unlink()
                        if made:
                            folder.rmdir()
                raise
            return
        finally:
            os.close(lock)


class Work:
    """The folder while vectors are written, and what is known of it: settings, and a hash of each shard's texts."""

    def __init__(self, folder: Path, settings: Settings, num_rows: int, digests: list[str]) -> None:
        self.folder = folder
        self.settings = settings
        self.num_rows = num_rows
        self.digests = digests
        self._dtype = np.dtype(settings.form)

    @classmethod
    def load(cls, folder: Path, settings: Settings) -> Work | None:
        """Go on in a folder that was begun; None if it was not, or if its first pass did not end.

        Raises:
            CheckpointError: it is damaged, or of other settings.
        """
        if not (folder / MANIFEST).is_file():
            return None
        found = VectorManifest.load(folder)
        if differing := [item.name for item in fields(Settings) if getattr(found, item.name) != getattr(settings, item.name)]:
            told = "; ".join(f"{name} is {getattr(found, name)!r}, now {getattr(settings, name)!r}" for name in differing)
            raise CheckpointError(f"{folder} was begun otherwise: {told}. Use its settings, or another folder.")
        if not any((folder / name).is_file() for name in (VECTORS, PARTIAL)):
            raise CheckpointError(f"{folder} has no {VECTORS}: it was moved or removed. Embed into another folder.")
        return cls(folder, settings, found.rows, list(found.digests))

    @classmethod
    def plan(cls, folder: Path, settings: Settings, documents: Iterable[Document]) -> Work:
        """The first pass: count and check all texts, and make room for their vectors."""
        digests: list[str] = []
        num_rows = 0
        with replacing(folder / DOCUMENTS) as building, pq.ParquetWriter(building, _COLUMNS) as table:
            for shard in _batched(documents, settings.shard_rows):
                for document in shard:
                    if not document.text.strip():
                        where = document.origin or f"document {document.id!r}"
                        raise DataError(f"{where} is empty. Leave it out, or give it content.")
                table.write_table(pa.table([[d.id for d in shard], [d.origin for d in shard]], schema=_COLUMNS))
                digests.append(_digest(shard))
                num_rows += len(shard)
            if not num_rows:
                raise DataError("there are no texts to embed: the files have no rows.")
        work = cls(folder, settings, num_rows, digests)
        _remove_marks(folder / SHARDS)
        (folder / SHARDS).mkdir(exist_ok=True)
        shape = (num_rows, settings.dim)
        with naming(folder / PARTIAL):
            np.lib.format.open_memmap(folder / PARTIAL, mode="w+", dtype=work._dtype, shape=shape).flush()
        # last: a folder with a manifest has all else
        write_json(folder / MANIFEST, {"format": FORMAT, **asdict(settings), "rows": num_rows, "digests": digests})
        return work

    def claimed(self, model: UnifiedLM, documents: Iterable[Document]) -> Iterator[Shard]:
        """Pass over all texts, and claim shards that are neither finished nor in work.

        Raises:
            DataError: the texts are not those of the first pass.
        """
        number = -1
        for number, shard in enumerate(_batched(documents, self.settings.shard_rows)):
            if number >= len(self.digests) or _digest(shard) != self.digests[number]:
                raise self._changed(number)
            if (lock := self._claim(number)) is None:
                continue
            try:
                texts = [document.text for document in shard]
                samples = model.embedder.samples(texts, self.settings.instruction, None)
            except BaseException:
                lock.release()
                raise
            yield Shard(number, samples, lock)
        if number + 1 != len(self.digests):
            raise self._changed(number + 1)

    def _changed(self, number: int) -> DataError:
        first = number * self.settings.shard_rows + 1
        return DataError(
            f"the texts from row {first:,} on are not those that {self.folder} was begun with. Its vectors would belong to "
            "other texts: restore the files, or embed into another folder."
        )

    def _claim(self, number: int) -> FileLock | None:
        lock = FileLock(self._path(number, "lock"), thread_local=False)
        if self._finished(number):
            return None
        try:
            lock.acquire(blocking=False)
        except (Timeout, FileNotFoundError):  # in work; or all is finished, and the marks' folder is gone
            return None
        if self._finished(number):  # by another process, between the two
            lock.release()
            return None
        return lock

    def _path(self, number: int, ending: str) -> Path:
        return self.folder / SHARDS / f"{number:08}.{ending}"

    def _finished(self, number: int) -> bool:
        return self._path(number, "json").is_file() or (self.folder / VECTORS).is_file()

    def unfinished(self) -> list[int]:
        """Shards that have no mark."""
        return [number for number in range(len(self.digests)) if not self._finished(number)]

    def finished_rows(self) -> int:
        """Texts whose vectors are on the disk, of all processes."""
        size, last = self.settings.shard_rows, len(self.digests) - 1
        missing = sum(size if number < last else self.num_rows - size * last for number in self.unfinished())
        return self.num_rows - missing

    def store(self, number: int, vectors: np.ndarray, told: dict[str, int]) -> None:
        """Write the vectors of a shard, flush them, and mark it."""
        rows = np.ascontiguousarray(vectors, dtype=self._dtype)
        path = self.folder / PARTIAL
        with naming(path), open(path, "r+b") as handle:
            handle.seek(self._header_bytes(path) + number * self.settings.shard_rows * self.settings.dim * self._dtype.itemsize)
            handle.write(rows.tobytes())
            handle.flush()
            os.fsync(handle.fileno())
        write_json(self._path(number, "json"), {**told, "rows": len(rows), "crc32": zlib.crc32(rows.tobytes())})
        self._path(number, "lock").unlink(missing_ok=True)

    def _header_bytes(self, path: Path) -> int:
        return path.stat().st_size - self.num_rows * self.settings.dim * self._dtype.itemsize

    def wait(self) -> None:
        """Return when a shard can be claimed, or none is left: what others have in work may end with them."""
        while unfinished := self.unfinished():
            for number in unfinished:
                if (lock := self._claim(number)) is not None:
                    lock.release()
                    return
            time.sleep(_POLL_SECONDS)

    def complete(self) -> int:
        """Compare all vectors with their marks and give the file its name, once; returns the number of cut texts.

        Raises:
            CheckpointError: vectors on the disk are not those that were written; their marks are removed.
        """
        with alone_in(self.folder):
            path, manifest = self.folder / PARTIAL, self.folder / MANIFEST
            if not (self.folder / VECTORS).is_file():
                marks = [json.loads(self._path(number, "json").read_text()) for number in range(len(self.digests))]
                self._compare(path, [int(mark["crc32"]) for mark in marks])
                said = json.loads(manifest.read_text(encoding="utf-8"))
                said["truncated"], said["tokens"] = (sum(mark[name] for mark in marks) for name in ("truncated", "tokens"))
                write_json(manifest, said)
                path.rename(self.folder / VECTORS)
                sync(self.folder)
            _remove_marks(self.folder / SHARDS)
        return VectorManifest.load(self.folder).truncated

    def _compare(self, path: Path, expected: list[int]) -> None:
        size = self.settings.shard_rows * self.settings.dim * self._dtype.itemsize
        with open(path, "rb") as handle:
            handle.seek(self._header_bytes(path))
            damaged = [number for number, crc in enumerate(expected) if zlib.crc32(handle.read(size)) != crc]
        for number in damaged:
            self._path(number, "json").unlink(missing_ok=True)
        if damaged:
            raise CheckpointError(
                f"{path}: the vectors of {len(damaged)} of {len(expected)} shards are not what was written. "
                "Run the command again: it embeds these once more."
            )


def _remove_marks(shards: Path) -> None:
    """Remove the marks and locks of all shards, and their folder if nothing else is in it."""
    if not shards.is_dir() or shards.is_symlink():
        return
    for path in [path for path in shards.iterdir() if _MARK.fullmatch(path.name)]:
        path.unlink(missing_ok=True)
    with suppress(OSError):  # something else is in it, be it the lock of a process that does not know yet that all is finished
        shards.rmdir()


def _batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def _digest(documents: Iterable[Document]) -> str:
    digest = blake2b(digest_size=16)
    for document in documents:
        raw = document.text.encode()
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.hexdigest()
