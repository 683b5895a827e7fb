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

import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from unified_lm.core.errors import ConfigError
from unified_lm.core.outputs import check_folder
from unified_lm.inference import UnifiedLM
from unified_lm.inference.embedder import TOKEN_BUDGET
from unified_lm.retrieval.documents import Document
from unified_lm.retrieval.vector_manifest import MANIFEST, Settings
from unified_lm.retrieval.vector_work import DOCUMENTS, LOCK, PARTIAL, SHARDS, Shard, Work, alone_in

FORMS = ("float32", "float16")
SHARD_ROWS = 2048
"""Texts of a shard: what a killed process loses at most, and what one packing of similar lengths chooses from."""


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


def check_place(folder: Path) -> None:
    """Check that vectors may be written into a folder, or that a folder of vectors is there already.

    Raises:
        OutputError: something else is there.
    """
    if (folder / MANIFEST).is_file():
        return
    # What a process has there in its first pass, or left when it was killed in it; the lock comes first.
    own, temporary = (LOCK, PARTIAL, DOCUMENTS, MANIFEST, SHARDS), (f".{DOCUMENTS}.", f".{MANIFEST}.")
    found = [path.name for path in folder.iterdir()] if folder.is_dir() and not folder.is_symlink() else []
    if LOCK not in found or not all(name in own or name.startswith(temporary) for name in found):
        check_folder(folder, None)


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
    with alone_in(folder):  # others wait for the first pass
        work = Work.load(folder, settings) or Work.plan(folder, settings, read())
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


def _ahead(shards: Iterator[Shard]) -> Generator[Shard, None, None]:
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
