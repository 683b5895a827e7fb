"""`Index`: documents with their vectors and with what an answer reads of them, on disk.

    index.json      which model it is of, and its settings (`retrieval.manifest`)
    vectors/        texts and vectors, in a vector engine (`retrieval.engines`)
    key_values/     keys and values of the documents, the least recently used ones evicted (`retrieval.stored`)

Documents are read in chunks whose borders depend on the input alone, keys and values are stored before the chunk's vectors, and
a chunk is complete or is read again. So an indexer that is killed and started again ends with the same bits.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unified_lm.core.errors import CheckpointError, ConfigError
from unified_lm.core.folder_lock import hold_folder, release_folder
from unified_lm.inference import UnifiedLM
from unified_lm.inference.embedder import encode_texts
from unified_lm.models.key_values import KeyValueCache
from unified_lm.retrieval.answering import AUTO, Answer, Asked, Rerank, Turns, answer_from
from unified_lm.retrieval.documents import Document, Passage, SeenDocuments, text_id
from unified_lm.retrieval.engines import open_engine
from unified_lm.retrieval.manifest import FILE_NAME, KEY_VALUES, VECTORS, IndexManifest, check_place
from unified_lm.retrieval.splitting import fit
from unified_lm.retrieval.stored import KeyValueStore

CHUNK_TOKENS = 16_384
"""A chunk ends with the document that fills it up to so many tokens."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Added:
    """What became of documents that were added.

    Attributes:
        added: documents that were read and stored.
        unchanged: documents that were there already.
        cut: documents that were longer than the limit, and were cut.
        split: documents that were longer than the limit, and were split.
        tokens: tokens that were read.
        seconds: how long it took.
    """

    added: int = 0
    unchanged: int = 0
    cut: int = 0
    split: int = 0
    tokens: int = 0
    seconds: float = 0.0


class Index:
    """Documents that a model has read, to search and to answer from.

    `create` and `open` make one. One process writes at a time, others may search and answer.
    """

    def __init__(self, folder: Path, model: UnifiedLM, manifest: IndexManifest) -> None:
        self.folder = folder
        self.model = model
        self.manifest = manifest
        self._writer = threading.Lock()  # the folder's lock is of the process, and would let a second thread write
        with model.borrow_backbone() as backbone:
            self._dtype = backbone.causal_lm.dtype
        self._engine = open_engine(manifest.engine, manifest.address or str(folder / VECTORS), manifest.dim)
        self._store = KeyValueStore(folder / KEY_VALUES, manifest.form, manifest.budget_bytes) if manifest.states else None

    @classmethod
    def create(
        cls,
        folder: str | Path,
        model: UnifiedLM,
        *,
        name: str = "",
        engine: str = "lance",
        address: str = "",
        states: Sequence[str] | None = None,
        form: str = "bfloat16",
        budget_bytes: int | None = None,
        max_tokens: int | None = None,
        on_long: str = "cut",
    ) -> Index:
        """Make an empty index, or open one that was made with the same settings.

        Args:
            folder: a new folder, or that of an index of the same model and settings.
            model: what reads the documents.
            name: folder or Hub name of the model, for commands that open the index later.
            engine: the vector engine, a key of `retrieval.engines.ENGINES`.
            address: of the engine's server, or "" for a folder in the index.
            states: how documents are read for answers: "bidirectional", "causal", both, or () to keep vectors only. None keeps
                what embedding them computes anyway.
            form: what keys and values are stored as: "float32", "bfloat16", "float16" or "int8".
            budget_bytes: limit of keys and values on disk; those that were not used for the longest time are dropped and
                computed again when they are needed. None: no limit.
            max_tokens: limit of a document with its prompt; None takes the model's.
            on_long: "cut" longer documents, or "split" them into documents of their own.

        Raises:
            ConfigError: an unknown engine, form or state, or a setting that makes no sense.
            CheckpointError: the folder holds an index of another model or with other settings, or is in use.
            OutputError: the folder holds something else.
        """
        folder = Path(folder)
        if on_long not in ("cut", "split"):
            raise ConfigError(f"on_long: got '{on_long}', expected 'cut' or 'split'.")
        manifest = IndexManifest(
            model_key=model.embedding_key,
            model=name,
            dim=model.embedding_dim,
            max_tokens=int(max_tokens or model.max_tokens),
            on_long=on_long,
            engine=engine,
            address=address,
            states=tuple((model.attention,) if states is None else states),
            form=form,
            budget_bytes=None if budget_bytes is None else int(budget_bytes),
        )
        check_place(folder)
        if (folder / FILE_NAME).exists():
            found = IndexManifest.load(folder)
            found.check_same(folder, manifest)
            return cls(folder, model, found)
        hold_folder(folder)
        try:
            manifest.save(folder)
            return cls(folder, model, manifest)
        except BaseException:  # an engine that cannot be opened leaves nothing behind that is in another one's way
            manifest.remove(folder)
            raise
        finally:
            release_folder(folder)

    @classmethod
    def open(cls, folder: str | Path, model: UnifiedLM | None = None) -> Index:
        """Open an index.

        Args:
            folder: of the index.
            model: the one that it was made with; None loads it from where it was.

        Raises:
            CheckpointError: there is no index, it is damaged, or of another model or template.
        """
        folder = Path(folder)
        manifest = IndexManifest.load(folder)
        if model is None:
            if not manifest.model:
                raise CheckpointError(f"{folder} does not say where its model is. Name it (--model).")
            model = UnifiedLM.from_pretrained(manifest.model)
        if model.embedding_key != manifest.model_key:
            raise CheckpointError(
                f"{folder} is of another model, or of another template, pooling or attention (its key is {manifest.model_key}, "
                f"the model's {model.embedding_key}). Open it with {manifest.model or 'the model that it was made with'}, or "
                "build an index of this model in another folder."
            )
        return cls(folder, model, manifest)

    def __enter__(self) -> Index:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._engine)

    @property
    def num_bytes(self) -> int:
        """Bytes of keys and values on disk."""
        return 0 if self._store is None else self._store.num_bytes

    def close(self) -> None:
        """Let go of files and connections."""
        self._engine.close()
        if self._store is not None:
            self._store.close()

    def add(self, documents: Iterable[Document | str], progress: Callable[[int], None] | None = None) -> Added:
        """Read documents and store them; those that are there with the same text are passed over.

        Args:
            documents: documents, or texts, whose ids are hashes of them. One that is there with another text is replaced.
            progress: called with the number of documents done.

        Raises:
            DataError: a text is empty, or no text; or an id comes twice with different texts. Chunks before it are stored.
            CheckpointError: another process writes to the index.
            ConfigError: a document's keys and values are larger than the budget.
        """
        started = time.perf_counter()
        total = Added()
        with self._writing():
            for chunk, fitted in self._chunks(documents):
                new = self._add_chunk(chunk)
                unchanged = 0 if new else len(chunk)
                total = Added(
                    total.added + len(chunk) - unchanged,
                    total.unchanged + unchanged,
                    total.cut + fitted.cut,
                    total.split + fitted.split,
                    total.tokens + new,
                    time.perf_counter() - started,
                )
                if progress is not None:
                    progress(fitted.added)
            if total.added:
                self._engine.compact()
        return total

    def delete(self, ids: Sequence[str]) -> None:
        """Remove documents.

        Raises:
            DataError: some are not there, and none is removed; CheckpointError: another process writes to the index.
        """
        with self._writing():
            self._engine.get(ids)
            self._engine.delete(ids)
            if self._store is not None:
                self._store.delete(ids)

    def get(self, ids: Sequence[str]) -> list[Document]:
        """Documents by their ids, in order; DataError if some are not there."""
        return self._engine.get(ids)

    def ids(self) -> Iterator[str]:
        """The ids of all documents, in no particular order."""
        return self._engine.ids()

    def search(self, question: str, k: int = 5, instruction: str | None = None) -> list[Passage]:
        """The `k` documents nearest to a question, best first; `instruction` as in `answer`."""
        said = self.model.query_instruction if instruction is None else instruction
        return self._engine.search(self.model.encode([question], said, max_tokens=self.max_tokens), k)[0]

    def answer(
        self,
        question: str,
        *,
        k: int = 1,
        mode: str = AUTO,
        states: str | None = None,
        instruction: str | None = None,
        rerank: Rerank | None = None,
        candidates: int = 20,
        history: Turns = (),
        recompute: int = 0,
        max_new_tokens: int = 256,
        on_text: Callable[[str], None] | None = None,
        **options: Any,
    ) -> Answer:
        """Answer a question from the documents nearest to it.

        Args:
            question: the question.
            k: documents that the answer is given.
            mode: a layout of `data.prompts.layouts`, or "auto".
            states: of the blocks, "bidirectional" or "causal"; None takes what the index keeps.
            instruction: for embedding the question; None takes the model's own.
            rerank: puts `candidates` passages in a better order before the first `k` are taken.
            candidates: see `rerank`.
            history: earlier (role, content) turns.
            recompute: first tokens of every block but the first that are read again (`models.key_values.KeyValueReader.join`).
            max_new_tokens: limit of the answer, in tokens.
            on_text: called with each piece of the answer as soon as it is there.
            options: "temperature", "top_p", and further arguments of transformers' `generate`.

        Raises:
            DataError: an empty question, or an empty index.
            ConfigError, ModelError: unknown options; a prompt longer than the positions, or whose blocks cannot be moved.
        """
        asked = Asked(question, k, mode, states, instruction, rerank, candidates, history, recompute)
        return answer_from(self, asked, max_new_tokens=max_new_tokens, on_text=on_text, **options)

    # -- what answering asks of an index ------------------------------------------------------------------------------

    @property
    def max_tokens(self) -> int:
        """Limit of a text with its prompt that the model reads as a block."""
        return self.manifest.max_tokens

    @property
    def kept_states(self) -> tuple[str, ...]:
        """How its documents are read for answers."""
        return self.manifest.states

    def nearest(self, vector: np.ndarray, k: int) -> list[Passage]:
        """The documents nearest to a vector, float32 `[D]`, best first."""
        return self._engine.search(vector[None], k)[0]

    def stored(self, documents: Sequence[Document], states: str) -> bool:
        """Whether keys and values of all these documents are on disk."""
        return self._store is not None and all(self._store.has(document.id, states) for document in documents)

    def caches(self, documents: Sequence[Document], states: str) -> list[KeyValueCache]:
        """Keys and values of documents, on the model's device: from the disk, or else read now, and stored if possible."""
        found: dict[int, KeyValueCache] = {}
        ids = self._tokens([document.text for document in documents])
        for number, document in enumerate(documents):
            cache = None if self._store is None else self._store.get(document.id, states, self.model.device, self._dtype)
            # An indexer that was killed between the two may have left those of another text under this id.
            if cache is not None and np.array_equal(cache.token_ids.numpy(), ids[number]):
                found[number] = cache
        if missing := [number for number in range(len(documents)) if number not in found]:
            read = self._read([documents[number].text for number in missing], states)
            found |= {missing[index]: cache for index, _, cache in read}
            self._keep({documents[number].id: found[number] for number in missing}, states)
        return [found[number] for number in range(len(documents))]

    def written(self, text: str) -> str:
        """A document as a prompt writes it out: cut where its block would be."""
        return fit(self.model, Document("", text), self.manifest.max_tokens, "cut")[0][0].text

    def _tokens(self, texts: Sequence[str]) -> list[np.ndarray]:
        """What a block of each text holds."""
        return [item.ids for item in encode_texts(self.model.prompt_encoder, texts, "", self.max_tokens)]

    def _read(self, texts: Sequence[str], states: str) -> Iterator[tuple[int, np.ndarray, KeyValueCache]]:
        return self.model.read(texts, attention=states, max_tokens=self.max_tokens)

    def _keep(self, caches: dict[str, KeyValueCache], states: str) -> None:
        """Store what had to be read again, unless another process writes just now."""
        if self._store is None or states not in self.manifest.states:
            return
        try:
            with self._writing():
                for id, cache in caches.items():
                    self._store.put(id, states, cache)
        except CheckpointError as busy:
            _log.info("not stored: %s", busy)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Hold the index against other writers, of this process too."""
        if not self._writer.acquire(blocking=False):
            raise CheckpointError(f"{self.folder} is being written by another thread of this process; nothing was changed.")
        try:
            if notice := hold_folder(self.folder):
                _log.warning("%s", notice)
            try:
                yield
                if self._store is not None:
                    self._store.flush()
            finally:
                release_folder(self.folder)
        finally:
            self._writer.release()

    def _chunks(self, documents: Iterable[Document | str]) -> Iterator[tuple[list[Document], Added]]:
        """Documents as they are stored, in chunks whose borders depend on the documents alone, with what was done to them."""
        chunk: dict[str, Document] = {}
        seen = SeenDocuments()
        tokens, taken, cut, split = 0, 0, 0, 0
        for given in documents:
            document = Document(text_id(given), given) if isinstance(given, str) else given
            seen.check(document)
            parts, num_tokens = fit(self.model, document, self.manifest.max_tokens, self.manifest.on_long)
            taken, split = taken + 1, split + (len(parts) > 1)
            cut += self.manifest.on_long == "cut" and parts[0].text != document.text
            # The whole text stays in the index; what is cut is what the model reads of it.
            chunk |= {part.id: part for part in (parts if len(parts) > 1 else [document])}
            tokens += num_tokens
            if tokens >= CHUNK_TOKENS:
                yield list(chunk.values()), Added(taken, cut=cut, split=split)
                chunk, tokens, taken, cut, split = {}, 0, 0, 0, 0
        if chunk:
            yield list(chunk.values()), Added(taken, cut=cut, split=split)

    def _add_chunk(self, documents: list[Document]) -> int:
        """Read and store a chunk, unless all of it is there; returns the number of tokens read."""
        there = self._engine.find([document.id for document in documents])
        if all(there.get(document.id) == document for document in documents):
            return 0
        texts = [document.text for document in documents]
        own = self.model.attention
        vectors = np.empty((len(documents), self.manifest.dim), dtype=np.float32)
        tokens = 0
        if own not in self.manifest.states:
            vectors[:] = self.model.encode(texts, max_tokens=self.max_tokens)
        for states in self.manifest.states:
            for index, vector, cache in self._read(texts, states):
                assert self._store is not None, "an index that keeps states has a store"
                self._store.put(documents[index].id, states, cache)
                tokens += len(cache) * (states == self.manifest.states[0])
                if states == own:
                    vectors[index] = vector
        self._engine.upsert(documents, vectors)
        return tokens or sum(map(len, self._tokens(texts)))
