"""Perplexity by domain: how well a model predicts texts of different kinds under causal attention.

Every document is read alone after one start token, so that its first token is predicted too and bytes are counted exactly. A
document longer than the context is read in overlapping windows; each token is scored once, with at least `context - stride`
tokens of context wherever the document has them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unified_lm.batch import OutputHead, Sample
from unified_lm.core.errors import ConfigError, DataError, did_you_mean
from unified_lm.data.prompts.encoding import Encoded, PromptEncoder
from unified_lm.data.pydocs.dataset import pydocs_file
from unified_lm.data.rows.parse import RowParser
from unified_lm.data.rows.readers import data_files, read_rows
from unified_lm.data.rows.records import ChatRecord, RecordKind, TextRecord
from unified_lm.data.rows.violations import RowError
from unified_lm.evaluation.bootstrap import bootstrap_interval
from unified_lm.evaluation.words.features import start_ids
from unified_lm.inference.unified import UnifiedLM
from unified_lm.models.embedding import sample_states
from unified_lm.models.headless import require_head
from unified_lm.objectives.cross_entropy import token_losses

CONTEXT = 1024
"""Default number of tokens per window."""

_TOKEN_BUDGET = 4096
_ENDLESS = 1 << 30
_CHAT_COLUMNS = ("messages", "conversations", "prompt")
_BUILT_IN = {"pydocs/text": ("text", RecordKind.TEXT), "pydocs/chats": ("chats", RecordKind.CHAT)}

BUILT_IN = tuple(_BUILT_IN)
"""Domains that need no file: the held-out splits of the built-in data set."""


@dataclass(frozen=True)
class Domain:
    """Documents of one kind.

    Attributes:
        name: its name in tables.
        documents: running texts, or conversations, in which the answers are scored.
    """

    name: str
    documents: tuple[TextRecord | ChatRecord, ...]

    @property
    def key(self) -> str:
        """Hash of the documents."""
        digest = blake2b(digest_size=16)
        for document in self.documents:
            digest.update(repr(document).encode())
        return digest.hexdigest()

    def limited(self, num_documents: int) -> Domain:
        """At most this many documents, evenly spaced over the domain."""
        if num_documents >= len(self.documents):
            return self
        total = len(self.documents)
        return Domain(self.name, tuple(self.documents[i * total // num_documents] for i in range(num_documents)))


@dataclass(frozen=True)
class TokenizedDocument:
    """Token ids int64 `[T]`, which of them are scored, bool `[T]` (never the first), and the bytes of the scored ones."""

    ids: np.ndarray
    scored: np.ndarray
    num_bytes: int


@dataclass(frozen=True)
class _Window:
    """Tokens `[start, stop)` of a document; those from `first` on are scored in this window."""

    document: int
    start: int
    first: int
    stop: int


def read_domain(name: str, path: Path | None) -> Domain:
    """Read the documents of a domain.

    Args:
        name: its name in tables; without a path, a built-in domain (see `BUILT_IN`).
        path: a file or a folder of files: rows with "text" (a .txt file: one document per line), or conversations.

    Raises:
        DataError: an unknown built-in name, a missing file, or a row that is neither text nor conversation.
    """
    if path is None:
        if name not in _BUILT_IN:
            raise DataError(f"unknown built-in domain '{name}'.{did_you_mean(name, BUILT_IN)} Files are given as NAME=FILE.")
        part, kind = _BUILT_IN[name]
        files = [pydocs_file(part, "test", kind)[1]]
    else:
        files = data_files(path)
    documents: list[TextRecord | ChatRecord] = []
    for file in files:
        for location, row in read_rows(file):
            chat = isinstance(row, Mapping) and any(row.get(column) is not None for column in _CHAT_COLUMNS)
            try:
                record = RowParser(RecordKind.CHAT if chat else RecordKind.TEXT)(row)
            except RowError as error:
                raise DataError(f"{file}, {location}, {error}") from error
            assert isinstance(record, TextRecord | ChatRecord), "the parser gives the kind that it was asked for"
            documents.append(record)
    if len(documents) < 2:
        where = "" if path is None else f", {path},"
        raise DataError(f"domain '{name}'{where} has {len(documents)} documents; an interval needs at least 2.")
    return Domain(name, tuple(documents))


def perplexity(
    model: UnifiedLM,
    domain: Domain,
    *,
    context: int = CONTEXT,
    stride: int | None = None,
    num_resamples: int = 1000,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Token and byte perplexity of a domain: exp(total nats / total tokens), not a mean over documents.

    Args:
        model: evaluated under causal attention, in packs.
        domain: the documents. In conversations the tokens of the answers are scored, including their end token; their
            bytes are those of the answers' texts.
        context: tokens per window, at least 2.
        stride: new tokens per further window of a long document, in [1, context); None uses half the context.
        num_resamples, seed: see `bootstrap_interval`, which resamples documents.
        progress: called with the number of windows finished since the last call; `num_windows` gives the total.

    Returns:
        "token_perplexity", "bits_per_byte" and "byte_perplexity" (2 to the power of the bits), each with a 95 % interval
        ("low", "high"), and "documents", "tokens", "bytes", "windows", "nats", "context", "stride".

    Raises:
        ConfigError: an invalid context or stride, or a template without a form for conversations.
        DataError: a document without a token to score.
    """
    documents = tokenized(model.prompt_encoder, domain)
    stride = _stride(context, stride)
    pieces = _windows(documents, context, stride)
    nats = np.zeros(len(documents))
    samples = [Sample(input_ids=documents[piece.document].ids[piece.start : piece.stop], stream="text") for piece in pieces]
    with model.borrow_backbone() as backbone:
        require_head(backbone.causal_lm)
        head = backbone.output_head()
        for index, states in sample_states(backbone, samples, token_budget=_TOKEN_BUDGET, device=model.device):
            nats[pieces[index].document] += _nats(states, documents[pieces[index].document], pieces[index], head)
            if progress is not None:
                progress(1)
    tokens = np.asarray([document.scored.sum() for document in documents], np.float64)
    num_bytes = np.asarray([document.num_bytes for document in documents], np.float64)
    rows = np.stack([nats, tokens, num_bytes], axis=1)
    scores: dict[str, Any] = {}
    for name, statistic in _STATISTICS.items():
        interval = bootstrap_interval(statistic, rows, num_resamples=num_resamples, seed=seed)
        scores[name] = {"value": interval.value, "low": interval.low, "high": interval.high}
    return scores | {
        "documents": len(documents),
        "tokens": int(tokens.sum()),
        "bytes": int(num_bytes.sum()),
        "windows": len(pieces),
        "nats": float(nats.sum()),
        "context": context,
        "stride": stride,
    }


def num_windows(model: UnifiedLM, domain: Domain, context: int = CONTEXT, stride: int | None = None) -> int:
    """The number of windows that `perplexity` reads; raises the same errors."""
    return len(_windows(tokenized(model.prompt_encoder, domain), context, _stride(context, stride)))


def _token_perplexity(rows: np.ndarray) -> float:
    nats, tokens, _ = rows.sum(axis=0)
    return float(np.exp(nats / tokens))


def _bits_per_byte(rows: np.ndarray) -> float:
    nats, _, num_bytes = rows.sum(axis=0)
    return float(nats / np.log(2) / num_bytes)


def _byte_perplexity(rows: np.ndarray) -> float:
    return float(2 ** _bits_per_byte(rows))


_STATISTICS: dict[str, Callable[[np.ndarray], float]] = {
    "token_perplexity": _token_perplexity,
    "bits_per_byte": _bits_per_byte,
    "byte_perplexity": _byte_perplexity,
}


def _stride(context: int, stride: int | None) -> int:
    stride = max(1, context // 2) if stride is None else stride
    if context < 2 or not 1 <= stride < context:
        raise ConfigError(f"context {context} and stride {stride}: expected a context of at least 2 and 1 <= stride < context.")
    return stride


def tokenized(encoder: PromptEncoder, domain: Domain) -> list[TokenizedDocument]:
    """The documents of a domain as token ids; each text after one start token.

    Raises:
        ConfigError: a template without a form for conversations.
        DataError: a document without a token to score.
    """
    texts = [document.text for document in domain.documents if isinstance(document, TextRecord)]
    chats = [document for document in domain.documents if isinstance(document, ChatRecord)]
    text_ids = iter(encoder.running_text(texts))
    turns, unlearned = [chat.turns for chat in chats], [chat.unlearned for chat in chats]
    chat_ids = iter(encoder.chat(turns, _ENDLESS, unlearned) if chats else [])
    start = start_ids(encoder) if texts else []
    result = []
    for index, document in enumerate(domain.documents):
        if isinstance(document, TextRecord):
            ids = np.asarray([*start, *next(text_ids)], np.int64)
            scored = np.arange(len(ids)) >= len(start)
            num_bytes = len(document.text.encode())
        else:
            encoded = next(chat_ids)
            if not isinstance(encoded, Encoded):
                raise DataError(f"domain '{domain.name}', document {index}: {encoded.value}.")
            ids = encoded.ids.astype(np.int64)
            scored = np.zeros(len(ids), bool)
            for first, stop in encoded.spans:
                scored[max(first, 1) : stop] = True
            num_bytes = sum(len(content.strip().encode()) for content in document.answers)
        if not scored.any() or not num_bytes:
            raise DataError(f"domain '{domain.name}', document {index}: no token to score. Leave it out.")
        result.append(TokenizedDocument(ids, scored, num_bytes))
    return result


def _windows(documents: Sequence[TokenizedDocument], context: int, stride: int) -> list[_Window]:
    """Split documents into windows, without those that score no token."""
    result = []
    for index, document in enumerate(documents):
        first, stop = 1, min(context, len(document.ids))
        while True:
            if document.scored[first:stop].any():
                result.append(_Window(index, max(0, stop - context), first, stop))
            if stop == len(document.ids):
                break
            first, stop = stop, min(stop + stride, len(document.ids))
    return result


def _nats(states: torch.Tensor, document: TokenizedDocument, piece: _Window, head: OutputHead) -> float:
    """Summed cross-entropy of the tokens scored in a window; states `[stop - start, D]`."""
    targets = piece.first + np.flatnonzero(document.scored[piece.first : piece.stop])
    # The state before a token predicts it, hence -1; positions in `states` count from the start of the window.
    before = torch.from_numpy(targets - 1 - piece.start).to(states.device)
    with torch.no_grad():
        losses = token_losses(states[before], head, torch.from_numpy(document.ids[targets]).to(states.device)).losses
    return float(losses.double().sum())
