"""Vectors of a corpus in one memory-mapped file, written in shards by any number of processes.

    DIR/vectors.npy            float32 or float16 [N, D], once all are there; until then `vectors.npy.partial`
    DIR/documents.parquet      id and origin of each row
    DIR/embeddings.json        model, settings, and a hash of each shard's texts
    DIR/shards/                while work goes on: a mark for each finished shard, a lock for each one in work

A first pass over the texts counts them, refuses what cannot be embedded, and makes room for all vectors. From then on a shard
is a piece of work on its own: its vectors depend on its texts alone, it is claimed with a lock that ends with its process, and
marked once its vectors are on the disk. Processes (those of torchrun, of other machines with the same folder, or the same
command run again after SIGKILL) need not know of one another; each takes the next shard that nobody has. Vectors are therefore
equal whoever computed them, on machines of one kind.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
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
from unified_lm.core.errors import CheckpointError, ConfigError, DataError
from unified_lm.core.files import replacing, sync, write_json
from unified_lm.core.outputs import check_folder
from unified_lm.core.user_files import naming
from unified_lm.inference import UnifiedLM
from unified_lm.inference.embedder import TOKEN_BUDGET
from unified_lm.retrieval.documents import Document
from unified_lm.retrieval.vector_manifest import FORMAT, MANIFEST, Settings, VectorManifest

VECTORS, DOCUMENTS, SHARDS = "vectors.npy", "documents.parquet", "shards"
FORMS = ("float32", "float16")
SHARD_ROWS = 2048
"""Texts of a shard: what a killed process loses at most, and what one packing of similar lengths chooses from."""

_PARTIAL = f"{VECTORS}.partial"
_LOCK = ".embeddings.lock"
_POLL_SECONDS = 0.5
_COLUMNS = pa.schema([("id", pa.string()), ("origin", pa.string())])

T = TypeVar("T")
Read = Callable[[], Iterable[Document]]
"""Gives all documents, in the same order at every call."""


@dataclass(frozen=True)
class Embedded:
    """What a call of `embed_documents` did.

    Attributes:
        rows: texts of the whole folder.
        own_rows, own_tokens: texts that this process embedded, and their tokens.
        truncated: texts of the whole folder that were cut to the limit.
        seconds: how long this process took.
    """

    rows: int
    own_rows: int
    own_tokens: int
    truncated: int
    seconds: float


@dataclass(frozen=True)
class _Shard:
    """Texts that this process has claimed, as the model reads them."""

    number: int
    samples: list[Sample]
    lock: FileLock


def check_place(folder: Path) -> None:
    """Check that vectors may be written into a folder, or that a folder of vectors is there already.

    Raises:
        OutputError: something else is there.
    """
    if (folder / MANIFEST).is_file():
        return
    # What a process has there in its first pass, or left when it was killed in it; the lock comes first.
    own, temporary = (_LOCK, _PARTIAL, DOCUMENTS, MANIFEST, SHARDS), (f".{DOCUMENTS}.", f".{MANIFEST}.")
    found = [path.name for path in folder.iterdir()] if folder.is_dir() and not folder.is_symlink() else []
    if _LOCK not in found or not all(name in own or name.startswith(temporary) for name in found):
        check_folder(folder)


def embed_documents(
    folder: Path,
    model: UnifiedLM,
    read: Read,
    *,
    instruction: str = "",
    form: str = "float32",
    shard_rows: int = SHARD_ROWS,
    token_budget: int = TOKEN_BUDGET,
    progress: Callable[[int, int], None] | None = None,
) -> Embedded:
    """Embed documents into a folder, or go on with what other processes began there; returns once all vectors are there.

    Texts of the next shard are read and tokenized while the model works on the present one.

    Args:
        folder: a new folder, or one of the same model, settings and documents.
        model: its method, limit and attention are those of its loading.
        read: the documents; called at least twice.
        instruction: of all texts, "" for none.
        form: dtype of the file, "float32" or "float16".
        shard_rows: texts of a shard.
        token_budget: most tokens of one forward.
        progress: called after every shard with the number of finished texts of all processes, and of all.

    Raises:
        ConfigError: an unknown form.
        DataError: no documents, one without content, or others than when the folder was begun.
        CheckpointError: the folder is of another model or other settings, or damaged; or the model only generates.
        OutputError: the folder holds something else.
    """
    if form not in FORMS:
        raise ConfigError(f"form: got '{form}', expected one of {', '.join(FORMS)}.")
    model.require("embed")
    with model.borrow_backbone() as backbone:
        dtype = str(backbone.causal_lm.dtype).removeprefix("torch.")
    settings = Settings(
        model_key=model.embedding_key,
        dtype=dtype,
        dim=model.embedding_dim,
        instruction=instruction,
        max_tokens=model.max_tokens,
        form=form,
        shard_rows=shard_rows,
        token_budget=token_budget,
    )
    started = time.perf_counter()
    check_place(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / _LOCK):  # others wait for the first pass
        work = _Work.load(folder, settings) or _Work.plan(folder, settings, read())
    rows = tokens = 0
    while True:
        with closing(_ahead(work.claimed(model, read()))) as shards:
            for shard in shards:
                try:
                    with model.borrow_backbone():
                        vectors = model.embedder.embed(shard.samples, token_budget=token_budget)
                    size, cut = sum(map(len, shard.samples)), sum(sample.truncated for sample in shard.samples)
                    work.store(shard.number, vectors.numpy(), {"tokens": size, "truncated": cut})
                finally:
                    shard.lock.release()
                rows, tokens = rows + len(shard.samples), tokens + size
                if progress is not None:
                    progress(work.finished_rows(), work.num_rows)
        if not work.unfinished():
            break
        work.wait()
    truncated = work.complete()
    return Embedded(work.num_rows, rows, tokens, truncated, time.perf_counter() - started)


class _Work:
    """The folder while vectors are written, and what is known of it: settings, and a hash of each shard's texts."""

    def __init__(self, folder: Path, settings: Settings, num_rows: int, digests: list[str]) -> None:
        self.folder = folder
        self.settings = settings
        self.num_rows = num_rows
        self.digests = digests
        self._dtype = np.dtype(settings.form)

    @classmethod
    def load(cls, folder: Path, settings: Settings) -> _Work | None:
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
        if not any((folder / name).is_file() for name in (VECTORS, _PARTIAL)):
            raise CheckpointError(f"{folder} has no {VECTORS}: it was moved or removed. Embed into another folder.")
        return cls(folder, settings, found.rows, list(found.digests))

    @classmethod
    def plan(cls, folder: Path, settings: Settings, documents: Iterable[Document]) -> _Work:
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
        shutil.rmtree(folder / SHARDS, ignore_errors=True)
        (folder / SHARDS).mkdir()
        shape = (num_rows, settings.dim)
        with naming(folder / _PARTIAL):
            np.lib.format.open_memmap(folder / _PARTIAL, mode="w+", dtype=work._dtype, shape=shape).flush()
        # last: a folder with a manifest has all else
        write_json(folder / MANIFEST, {"format": FORMAT, **asdict(settings), "rows": num_rows, "digests": digests})
        return work

    def claimed(self, model: UnifiedLM, documents: Iterable[Document]) -> Iterator[_Shard]:
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
            yield _Shard(number, samples, lock)
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
        path = self.folder / _PARTIAL
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
        with FileLock(self.folder / _LOCK):
            path, manifest = self.folder / _PARTIAL, self.folder / MANIFEST
            if not (self.folder / VECTORS).is_file():
                marks = [json.loads(self._path(number, "json").read_text()) for number in range(len(self.digests))]
                self._compare(path, [int(mark["crc32"]) for mark in marks])
                said = json.loads(manifest.read_text(encoding="utf-8"))
                said["truncated"], said["tokens"] = (sum(mark[name] for mark in marks) for name in ("truncated", "tokens"))
                write_json(manifest, said)
                path.rename(self.folder / VECTORS)
                sync(self.folder)
            shutil.rmtree(self.folder / SHARDS, ignore_errors=True)
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


def _ahead(shards: Iterator[_Shard]) -> Generator[_Shard, None, None]:
    """The same shards, one drawn ahead in a thread; to be closed, since that one is claimed."""
    with ThreadPoolExecutor(1, "next shard") as pool:
        future = pool.submit(next, shards, None)
        while (shard := future.result()) is not None:
            future = pool.submit(next, shards, None)
            try:
                yield shard
            except GeneratorExit:
                if future.exception() is None and (claimed := future.result()) is not None:
                    claimed.lock.release()
                raise
