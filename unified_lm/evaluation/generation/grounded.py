"""Answers from documents: how good and how fast they are in every mode, on held-out questions.

Per mode and states of the blocks: the loss of the right answer after the prompt (in one packed forward under the same blocks,
which is what a cache gives), exact match and token F1 of the greedy answer (SQuAD's, arXiv:1606.05250), and the time to its
first token with keys and values from the disk. Retrieval is measured once: it is the same for all modes.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from unified_lm.batch import IGNORE, Sample, consecutive_blocks, make_pack
from unified_lm.core.errors import DataError
from unified_lm.data.prompts.encoding import Encoded, Rejection
from unified_lm.data.prompts.layouts import DOCUMENTS, LAYOUTS, QUESTION
from unified_lm.data.rows.records import GroundedRecord, answers_of
from unified_lm.evaluation.bootstrap import Interval, bootstrap_interval
from unified_lm.models.embedding import sample_states
from unified_lm.models.headless import require_head
from unified_lm.objectives.cross_entropy import token_losses
from unified_lm.retrieval.answering import Rerank
from unified_lm.retrieval.documents import Document, Passage, text_id
from unified_lm.retrieval.index import Index

_TOKEN_BUDGET = 8192
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True, kw_only=True)
class ModeScores:
    """What a mode gives.

    Attributes:
        mode: the layout's name.
        states: of the blocks; "" without blocks.
        recompute: first tokens of every block but the first that were read again.
        loss: nats per token of the right answers, with an interval over questions.
        nats: of each question's right answer.
        tokens: of each question's right answer.
        exact_match: share of greedy answers that equal a right one after normalization; None if none was generated.
        f1: token F1 of greedy answers with the nearest right one; None likewise.
        first_token_seconds: median time from the call to the first token, search and reading from disk included.
        prompt_tokens: mean length of a prompt.
        cached_tokens: mean number of its tokens that came from a cache.
    """

    mode: str
    states: str
    recompute: int
    loss: Interval
    nats: tuple[float, ...]
    tokens: tuple[int, ...]
    exact_match: Interval | None
    f1: Interval | None
    first_token_seconds: float | None
    prompt_tokens: float
    cached_tokens: float


def corpus(rows: Sequence[GroundedRecord]) -> Iterator[Document]:
    """The documents of all rows, each once: those with an answer and those without."""
    seen = set[str]()
    for row in rows:
        for text in (*row.pair.positives, *row.pair.negatives):
            if (id := text_id(text.text)) not in seen:
                seen.add(id)
                yield Document(id, text.text)


def retrieve(
    index: Index,
    rows: Sequence[GroundedRecord],
    k: int,
    rerank: Rerank | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[list[list[Passage]], dict[int, float]]:
    """The passages of every question, and their recall (`recall`).

    Args:
        index: of the documents.
        rows: the questions.
        k: passages of a question.
        rerank: puts them in another order.
        progress: called after each question.
    """
    found = []
    for row in rows:
        passages = index.search(row.pair.query.text, k, row.pair.query.instruction or None)
        found.append(passages if rerank is None else rerank(row.pair.query.text, passages))
        if progress is not None:
            progress(1)
    return found, recall(rows, found, k)


def recall(rows: Sequence[GroundedRecord], found: Sequence[Sequence[Passage]], k: int) -> dict[int, float]:
    """Recall at 1, 3, 5, ... k: the share of questions with a right document among so many passages."""
    right = [{text_id(text.text) for text in answers} for answers in answers_of([row.pair for row in rows])]
    ranks = [
        next((rank for rank, passage in enumerate(passages, 1) if passage.document.id in ids), k + 1)
        for passages, ids in zip(found, right, strict=True)
    ]
    return {limit: float(np.mean([rank <= limit for rank in ranks])) for limit in sorted({1, 3, 5, 10, k}) if limit <= k}


def measure_mode(
    index: Index,
    rows: Sequence[GroundedRecord],
    passages: Sequence[Sequence[Passage]],
    mode: str,
    states: str,
    *,
    num_generated: int,
    max_new_tokens: int = 64,
    recompute: int = 0,
    reranked: bool = False,
    progress: Callable[[int], None] | None = None,
) -> ModeScores:
    """Measure one mode.

    Args:
        index: of the documents.
        rows: at least two questions.
        passages: the documents that each answer is given, best first.
        mode: a layout of `data.prompts.layouts`.
        states: of its blocks.
        num_generated: for how many of the first questions an answer is generated.
        max_new_tokens: limit of those answers.
        recompute: first tokens of every block but the first that are read again (`KeyValueReader.join`).
        reranked: whether `passages` are in another order than the search's, which answers are then given, too.
        progress: called after each generated answer.

    Raises:
        DataError: a prompt leaves no room for its answer.
    """
    losses, tokens, prompts, cached = _losses(index, rows, passages, mode, states, recompute)
    matches, overlaps, seconds = [], [], []
    for row, found in zip(rows[:num_generated], passages, strict=False):
        answer = index.answer(
            row.pair.query.text,
            k=max(1, len(found)),
            mode=mode,
            states=states,
            instruction=row.pair.query.instruction or None,
            max_new_tokens=max_new_tokens,
            recompute=recompute,
            rerank=partial(_as_given, found) if reranked else None,
        )
        matches.append(max(float(normalized(answer.text) == normalized(right)) for right in row.answers))
        overlaps.append(max(token_f1(answer.text, right) for right in row.answers))
        seconds.append(answer.first_token_seconds)
        if progress is not None:
            progress(1)
    mean = lambda values: float(np.mean(values))  # noqa: E731 - a statistic of one line
    several = len(matches) > 1
    return ModeScores(
        mode=mode,
        states=states if LAYOUTS[mode].blocks else "",
        recompute=recompute if LAYOUTS[mode].blocks else 0,
        loss=bootstrap_interval(lambda nats, count: float(nats.sum() / count.sum()), losses, tokens),
        nats=tuple(losses.tolist()),
        tokens=tuple(tokens.astype(int).tolist()),
        exact_match=bootstrap_interval(mean, np.array(matches)) if several else None,
        f1=bootstrap_interval(mean, np.array(overlaps)) if several else None,
        first_token_seconds=float(np.median(seconds)) if seconds else None,
        prompt_tokens=float(prompts.mean()),
        cached_tokens=float(cached.mean()),
    )


def _as_given(found: Sequence[Passage], question: str, passages: Sequence[Passage]) -> list[Passage]:
    """What was retrieved and reranked before, in place of what a search finds now."""
    return list(found)


def loss_beside(scores: ModeScores, other: ModeScores) -> Interval:
    """How much larger the loss is than in another mode, in nats per token: paired, with an interval over questions."""
    pairs = (np.array(scores.nats), np.array(other.nats), np.array(scores.tokens))
    return bootstrap_interval(lambda mine, theirs, count: float((mine - theirs).sum() / count.sum()), *pairs)


def _losses(
    index: Index, rows: Sequence[GroundedRecord], passages: Sequence[Sequence[Passage]], mode: str, states: str, recompute: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Nats and tokens of each right answer, and tokens of its prompt and of the prompt's blocks, float64 `[N]` each."""
    samples = [_sample(index, row, found, mode, states) for row, found in zip(rows, passages, strict=True)]
    nats = np.zeros(len(samples))
    with index.model.borrow_backbone() as backbone:
        require_head(backbone.causal_lm)
        head = backbone.output_head()
    for number, hidden in _states(index, samples, recompute if LAYOUTS[mode].blocks else 0):
        supervised = samples[number].labels
        assert supervised is not None, "every sample has an answer"
        labels = torch.from_numpy(supervised[len(supervised) - len(hidden) :]).to(hidden.device)
        learned = torch.nonzero(labels != IGNORE)[:, 0]
        with torch.no_grad():
            nats[number] = float(token_losses(hidden[learned - 1], head, labels[learned]).losses.double().sum())
    tokens = np.array([sample.num_supervised for sample in samples], dtype=np.float64)
    blocks = np.array([sum(block.stop - block.start for block in sample.blocks) for sample in samples], dtype=np.float64)
    return nats, tokens, np.array([len(sample) for sample in samples]) - tokens, blocks


def _states(index: Index, samples: Sequence[Sample], recompute: int) -> Iterator[tuple[int, torch.Tensor]]:
    """The number of each sample and its last states `[T, D]`: all of them, or those of what follows repaired blocks.

    No mask gives the second: a token that is read again was seen as it was before by the rest of its block.
    """
    device = index.model.device
    if not recompute:
        with index.model.borrow_backbone() as backbone:
            yield from sample_states(backbone, samples, token_budget=_TOKEN_BUDGET, device=device)
        return
    with index.model.borrow_reader() as reader, torch.no_grad():
        for number, sample in enumerate(samples):
            alone = [
                Sample(
                    input_ids=sample.input_ids[block.start : block.stop],
                    stream=sample.stream,
                    bidirectional=(block.span[0] - block.start, block.span[1] - block.start) if block.bidirectional else (0, 0),
                )
                for block in sample.blocks
            ]
            pack = make_pack(alone).to(device)  # in an order of its own
            caches = dict(zip(map(id, pack.samples), reader.read(pack)[1], strict=True))
            past = reader.join([caches[id(text)] for text in alone], recompute)
            tail = torch.from_numpy(sample.input_ids[len(past) :])[None].to(device)
            with reader.backbone.stock_attention() as causal_lm:
                read = causal_lm.get_decoder()(input_ids=tail, past_key_values=past.to_transformers(causal_lm.config))
            yield number, read.last_hidden_state[0]


def _sample(index: Index, row: GroundedRecord, found: Sequence[Passage], mode: str, states: str) -> Sample:
    """A prompt with the right answer, as one sample under the mode's blocks."""
    layout, encoder = LAYOUTS[mode], index.model.prompt_encoder
    query = row.pair.query
    instruction = query.instruction or index.model.query_instruction
    parts = {QUESTION: [(query.text, instruction)], DOCUMENTS: [(passage.document.text, "") for passage in found]}
    blocks = [encoder.embed(parts[part], index.manifest.max_tokens) for part in layout.blocks]
    read = [item for part in blocks for item in part]
    texts = [index.written(passage.document.text) for passage in found] if layout.writes_documents else []
    turns = [("user", layout.say(query.text, texts)), ("assistant", row.answers[0])]
    (tail,) = encoder.chat([turns], 1 << 30, continued=bool(read))
    if failed := [item for item in (*read, tail) if isinstance(item, Rejection)]:
        raise DataError(f"question {query.text[:80]!r} cannot be asked in mode {mode}: {failed[0].value}.")
    pieces = [item.ids for item in (*read, tail) if isinstance(item, Encoded)]
    assert isinstance(tail, Encoded), "rejected above otherwise"
    ids = np.concatenate(pieces).astype(np.int64)
    labels = np.full(len(ids), IGNORE, dtype=np.int64)
    first = len(ids) - len(tail.ids)
    for start, stop in tail.spans:
        labels[first + start : first + stop] = ids[first + start : first + stop]
    borders = consecutive_blocks([len(piece) for piece in pieces[:-1]], states)
    return Sample(input_ids=ids, stream="rag", blocks=borders, labels=labels)


def normalized(text: str) -> str:
    """SQuAD's form of an answer: lower case, without punctuation, articles and extra white space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def token_f1(answer: str, right: str) -> float:
    """Harmonic mean of precision and recall over the words of two normalized answers; 1 if both are empty."""
    given, wanted = normalized(answer).split(), normalized(right).split()
    if not given or not wanted:
        return float(given == wanted)
    shared = sum((Counter(given) & Counter(wanted)).values())
    return 2 * shared / (len(given) + len(wanted))


def as_dict(scores: ModeScores, plain: ModeScores | None) -> dict[str, Any]:
    """Plain values, for a result file; "beside" is `loss_beside` the plain mode, None without it and for itself."""
    values = {**vars(scores), "beside": None if plain in (None, scores) else loss_beside(scores, plain)}
    return {
        name: {"value": value.value, "low": value.low, "high": value.high} if isinstance(value, Interval) else value
        for name, value in values.items()
    }
