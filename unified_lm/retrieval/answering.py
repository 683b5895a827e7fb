"""Prompts from cached parts, and answers to them.

A mode is a layout (`data.prompts.layouts`) and the states of its blocks: "bidirectional", as texts are embedded, or "causal".
The blocks come from caches, which are moved behind one another; what the user's turn says is read after them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import numpy as np
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from unified_lm.config.checks import at_least
from unified_lm.core.errors import ConfigError, DataError, did_you_mean
from unified_lm.data.prompts.layouts import DOCUMENTS, LAYOUTS, QUESTION, Layout, get_layout
from unified_lm.inference import UnifiedLM
from unified_lm.inference.embedder import encode_texts
from unified_lm.inference.generation import generate_text
from unified_lm.models.key_values import KeyValueCache
from unified_lm.retrieval.documents import Document, Passage
from unified_lm.retrieval.stored import STATES

AUTO = "auto"
MODES = (AUTO, *LAYOUTS)
"""What `mode` may be: "auto" chooses by `choose_mode`."""

LONG_QUESTION = 256
"""From so many tokens on a question is worth reading from the forward that embedded it."""

Turns = Sequence[tuple[str, str]]
"""Earlier (role, content) turns of a conversation."""


@dataclass(frozen=True, eq=False)
class Prompt:
    """What an answer is generated after.

    Attributes:
        ids: int64 `[T]`, on the CPU.
        past: keys and values of its first tokens, or None.
        recomputed: how many of those were read again after what stands before them.
    """

    ids: torch.Tensor
    past: KeyValueCache | None = None
    recomputed: int = 0

    @property
    def num_cached(self) -> int:
        """Tokens that need not be read again."""
        return 0 if self.past is None else len(self.past) - self.recomputed


@dataclass(frozen=True, kw_only=True)
class Answer:
    """An answer, and what it was made of.

    Attributes:
        text: the answer.
        passages: the documents that it was given, best first.
        mode: the layout's name.
        states: of the blocks, "bidirectional" or "causal"; "" without blocks.
        prompt_tokens: length of the prompt.
        cached_tokens: how many of them came from caches.
        search_seconds: time to find the passages; the question is embedded there.
        first_token_seconds: time from the call to the first piece of the answer, search included.
        seconds: time of the whole call.
    """

    text: str
    passages: tuple[Passage, ...] = field(default=())
    mode: str
    states: str = ""
    prompt_tokens: int
    cached_tokens: int
    search_seconds: float = 0.0
    first_token_seconds: float
    seconds: float


Rerank = Callable[[str, Sequence[Passage]], list[Passage]]
"""Question and passages -> the passages in a better order (`retrieval.rerank`)."""


class Source(Protocol):
    """What answering needs of an index; `retrieval.index.Index` has it."""

    model: UnifiedLM

    def __len__(self) -> int: ...

    @property
    def max_tokens(self) -> int:
        """Limit of a text with its prompt that the model reads as a block."""

    @property
    def kept_states(self) -> tuple[str, ...]:
        """How its documents are read for answers; the first is the default."""

    def nearest(self, vector: np.ndarray, k: int) -> list[Passage]:
        """The documents nearest to a vector, float32 `[D]`, best first."""

    def stored(self, documents: Sequence[Document], states: str) -> bool:
        """Whether keys and values of all these documents are on disk."""

    def caches(self, documents: Sequence[Document], states: str) -> list[KeyValueCache]:
        """Keys and values of documents, on the model's device."""

    def written(self, text: str) -> str:
        """A document as a prompt writes it out."""


@dataclass(frozen=True)
class Asked:
    """A question, and how it is to be answered; `Index.answer` says what each means."""

    question: str
    k: int = 1
    mode: str = AUTO
    states: str | None = None
    instruction: str | None = None
    rerank: Rerank | None = None
    candidates: int = 20
    history: Turns = ()
    recompute: int = 0

    def problems(self) -> Iterator[str]:
        """What is wrong with it, one sentence each."""
        if self.mode not in MODES:
            yield f"unknown mode '{self.mode}'.{did_you_mean(self.mode, MODES)}"
        if self.states not in (None, *STATES):
            yield f"unknown states '{self.states}'.{did_you_mean(str(self.states), STATES)}"
        yield from at_least("k", self.k, 1)
        yield from at_least("candidates", self.candidates, 1)
        yield from at_least("recompute", self.recompute, 0)


def choose_mode(question_tokens: int, documents_stored: bool) -> str:
    """The mode that reads the least, for "auto".

    Args:
        question_tokens: length of the question as it was embedded.
        documents_stored: whether the documents' keys and values are stored.
    """
    long = question_tokens >= LONG_QUESTION
    if documents_stored:
        return "document_query_cache" if long else "document_cache"
    return "query_cache" if long else "document_then_query"


def make_prompt(
    model: UnifiedLM,
    layout: Layout,
    question: str,
    documents: Sequence[str],
    caches: Mapping[str, Sequence[KeyValueCache]],
    history: Turns = (),
    recompute: int = 0,
) -> Prompt:
    """Join the blocks of a layout and encode what follows them.

    Args:
        model: the model that read the caches.
        layout: the parts.
        question: the question.
        documents: the documents' texts, for layouts that write them.
        caches: for each part that is a block (`QUESTION`, `DOCUMENTS`) its caches, on the model's device.
        history: earlier turns, which follow the blocks.
        recompute: first tokens of every block but the first that are read again (`KeyValueReader.join`).

    Raises:
        ModelError: the caches cannot be moved, or the prompt is longer than the model's positions.
    """
    parts = [cache for part in layout.blocks for cache in caches[part]]
    turns = [*history, ("user", layout.say(question, documents))]
    tail = torch.from_numpy(model.prompt_encoder.generation_prompt(turns, continued=bool(parts)).astype(np.int64))
    past = None
    if parts:  # a model that keeps no keys and values can still read whole prompts
        with model.borrow_reader() as reader:
            past = reader.join(parts, recompute)
    ids = tail if past is None else torch.cat([past.token_ids, tail])
    with model.borrow_backbone() as backbone:
        backbone.check_length(len(ids))
    return Prompt(ids, past, sum(min(recompute, len(part)) for part in parts[1:]))


def generate_answer(model: UnifiedLM, prompt: Prompt, **options: Any) -> tuple[str, float]:
    """Generate after a prompt, holding the model.

    Args:
        model: the model.
        prompt: the prompt.
        options: "max_new_tokens", "on_text", "temperature" and others of `inference.generation.generate_text`.

    Returns:
        The answer, and the time of the first token by `time.perf_counter`.
    """
    clock = _Clock()
    with model.borrow_backbone() as backbone, backbone.stock_attention() as causal_lm:
        text = generate_text(
            causal_lm,
            model.prompt_encoder,
            prompt.ids,
            past=None if prompt.past is None else prompt.past.to_transformers(causal_lm.config),
            stopping_criteria=StoppingCriteriaList([clock]),
            **options,
        )
    return text, clock.first


def answer_from(source: Source, asked: Asked, **generation: Any) -> Answer:
    """Answer a question from the documents of an index; `Index.answer` says what can be asked.

    Args:
        source: the index.
        asked: the question.
        generation: see `generate_answer`.
    """
    started = time.perf_counter()
    if problems := list(asked.problems()):
        raise ConfigError(problems)
    if not asked.question.strip():
        raise DataError("the question is empty.")
    model = source.model
    states = asked.states or (source.kept_states or (model.attention,))[0]
    question = _Question(model, asked, source.max_tokens)
    passages = _find(source, asked, question) if asked.mode == AUTO or get_layout(asked.mode).retrieves else []
    found = time.perf_counter()
    documents = [passage.document for passage in passages]
    mode = choose_mode(question.num_tokens, source.stored(documents, states)) if asked.mode == AUTO else asked.mode
    layout = get_layout(mode)
    blocks: dict[str, Sequence[KeyValueCache]] = {}
    if QUESTION in layout.blocks:
        blocks[QUESTION] = [question.cache(states, mode)]
    if DOCUMENTS in layout.blocks:
        blocks[DOCUMENTS] = source.caches(documents, states)
    texts = [source.written(document.text) for document in documents] if layout.writes_documents else []
    prompt = make_prompt(model, layout, asked.question, texts, blocks, asked.history, asked.recompute)
    text, first = generate_answer(model, prompt, **generation)
    return Answer(
        text=text,
        passages=tuple(passages),
        mode=mode,
        states=states if layout.blocks else "",
        prompt_tokens=len(prompt.ids),
        cached_tokens=prompt.num_cached,
        search_seconds=found - started,
        first_token_seconds=first - started,
        seconds=time.perf_counter() - started,
    )


class _Question:
    """A question, embedded; what that computed is kept where an answer may be read from it."""

    def __init__(self, model: UnifiedLM, asked: Asked, limit: int) -> None:
        self._model, self._text, self._limit = model, asked.question, limit
        self._instruction = model.query_instruction if asked.instruction is None else asked.instruction
        (encoded,) = encode_texts(model.prompt_encoder, [asked.question], self._instruction, limit)
        self._cut = encoded.truncated
        self.num_tokens = 0 if encoded.truncated else len(encoded.ids)
        may_be_block = self.num_tokens >= LONG_QUESTION if asked.mode == AUTO else QUESTION in get_layout(asked.mode).blocks
        self._read = self._read_as(model.attention) if may_be_block and not self._cut else None

    def vector(self) -> np.ndarray:
        """Its vector, float32 `[D]`."""
        if self._read is not None:
            return self._read[0]
        return self._model.encode([self._text], self._instruction, max_tokens=self._limit)[0]

    def cache(self, states: str, mode: str) -> KeyValueCache:
        """Its keys and values.

        Raises:
            DataError: a block would cut it.
        """
        if self._cut:
            raise DataError(
                f"the question is longer than the {self._limit} tokens of a block, which mode {mode} would cut. Make the index "
                "with more (max_tokens), or answer in mode document_cache or document_then_query."
            )
        kept = self._read if states == self._model.attention else None
        return (kept or self._read_as(states))[1]

    def _read_as(self, states: str) -> tuple[np.ndarray, KeyValueCache]:
        read = self._model.read([self._text], self._instruction, attention=states, max_tokens=self._limit)
        ((_, vector, cache),) = read
        return vector, cache


def _find(source: Source, asked: Asked, question: _Question) -> list[Passage]:
    if not len(source):
        raise DataError("the index has no documents. Add some (unified-lm index), or answer with mode no_retrieval.")
    if asked.rerank is None:
        return source.nearest(question.vector(), asked.k)
    return asked.rerank(asked.question, source.nearest(question.vector(), max(asked.k, asked.candidates)))[: asked.k]


class _Clock(StoppingCriteria):
    """Never stops anything: it is asked after every token, and notes when that was for the first time."""

    first = 0.0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.BoolTensor:
        self.first = self.first or time.perf_counter()
        return cast("torch.BoolTensor", torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device))
