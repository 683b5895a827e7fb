"""Held-out retrieval: queries that search among all the documents of a set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from unified_lm.batch.plan import attention_span
from unified_lm.batch.sample import Sample
from unified_lm.config.schema import RetrievalConfig, RunConfig, StreamConfig
from unified_lm.core.errors import ConfigError, DataError, about
from unified_lm.data.formats.base import hash_text
from unified_lm.data.prompts.encoding import Encoded, PromptEncoder
from unified_lm.data.prompts.templates import get_template
from unified_lm.data.rows.records import PairRecord, RecordKind, Text, answers_of
from unified_lm.data.sources import HELD_OUT_SEED, open_source


@dataclass(frozen=True)
class RetrievalSet:
    """Queries, the documents they search, and which documents answer them.

    Attributes:
        queries: samples with a pool span.
        documents: samples with a pool span, each text once.
        relevant: per query the indices of the documents that answer it.
    """

    queries: Sequence[Sample]
    documents: Sequence[Sample]
    relevant: Sequence[set[int]]


def build_retrieval(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> RetrievalSet | None:
    """The held-out retrieval set of a run, formatted as its contrastive stream of pairs; None where none is asked for.

    Raises:
        ConfigError: retrieval is asked for and no stream of pairs says how queries and documents are written.
        DataError: no query is left.
    """
    retrieval = config.validation.retrieval
    if retrieval is None:
        return None
    name = next((name for name, stream in config.streams.items() if stream.pooled), None)
    if name is None:
        raise ConfigError(
            "validation.retrieval needs a stream that trains embeddings, whose template, attention and limits it uses; "
            f"this recipe has {', '.join(f'{n} ({s.format})' for n, s in config.streams.items())}. "
            "Set validation.retrieval=null."
        )
    with about("validation.retrieval"):
        return retrieval_set(name, config.streams[name], retrieval, tokenizer, HELD_OUT_SEED)


def retrieval_set(
    name: str,
    stream: StreamConfig,
    retrieval: RetrievalConfig,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
) -> RetrievalSet:
    """Format held-out pairs for retrieval.

    Every document of the source (positives and negatives, of all rows) is searched, each text once; the first `max_queries`
    rows ask. Equal texts are one document, so that a query finds every copy of its answer, and rows of one query have each
    other's answers (MS MARCO and lists of questions have a row per answer).

    Args:
        name: the stream's name, written into the samples.
        stream: gives template, attention and limits.
        retrieval: the source and how many of its queries are used.
        tokenizer: a fast tokenizer.
        seed: chooses rows under the source's `limit`.
    """
    source = open_source(retrieval.queries, RecordKind.PAIR, seed)
    records = [record for record in source if isinstance(record, PairRecord)]
    encoder = PromptEncoder(get_template(stream.template), tokenizer)
    query_limit, document_limit = stream.embedding_limits
    unique: dict[int, Text] = {}
    for record in records:
        for text in (*record.positives, *record.negatives):
            unique.setdefault(hash_text(text.text), text)
    documents: list[Sample] = []
    place: dict[int, int] = {}
    for key, encoded in zip(
        unique, encoder.embed([(t.text, t.instruction) for t in unique.values()], document_limit), strict=True
    ):
        if isinstance(encoded, Encoded):
            place[key] = len(documents)
            documents.append(_sample(encoded, name, stream, key))
    asking = records[: retrieval.max_queries]
    queries: list[Sample] = []
    relevant: list[set[int]] = []
    encoded_queries = encoder.embed([(r.query.text, r.query.instruction) for r in asking], query_limit)
    for record, answers, encoded in zip(asking, answers_of(records), encoded_queries, strict=False):
        right = {place[key] for key in (hash_text(text.text) for text in answers) if key in place}
        if isinstance(encoded, Encoded) and right:
            queries.append(_sample(encoded, name, stream, hash_text(record.query.text)))
            relevant.append(right)
    if not queries:
        raise DataError(f"{source.name}: no query with a usable text and answer; held-out retrieval measures nothing")
    return RetrievalSet(queries, documents, relevant)


def _sample(encoded: Encoded, name: str, stream: StreamConfig, text_id: int) -> Sample:
    return Sample(
        input_ids=encoded.ids.astype("int64"),
        stream=name,
        bidirectional=attention_span(stream.attention, len(encoded.ids)),
        pool=encoded.spans[0],
        text_id=text_id,
        truncated=encoded.truncated,
    )
