"""Whether every rank reads the same settings, weights and rows: nodes may hold stale copies, and would train on together."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from hashlib import blake2b
from typing import Any

from unified_lm.composition.flat import flatten
from unified_lm.config.schema import RunConfig
from unified_lm.core import distributed
from unified_lm.core.errors import DataError
from unified_lm.data.retrieval import RetrievalSet
from unified_lm.data.stream import Stream
from unified_lm.models.identity import configuration_facts, held_weights_key
from unified_lm.models.loading import LoadedModel
from unified_lm.models.pooling import Projection

_SHOWN = 6


_OWN = (
    *("model.name", "model.init_from", "model.tokenizer"),
    *("streams.*.sources", "validation.sources", "validation.retrieval.queries"),
    *("run_dir", "description", "notices", "checkpoint.copy_to"),
    *("logging.progress", "logging.wandb", "logging.wandb_*"),
)
"""Settings that may differ between ranks: where weights and rows lie, of which the content is compared, and what rank 0 alone
says or does. `*` is any one name, or its end."""


def setting_facts(config: RunConfig) -> dict[str, str]:
    """Every setting in which ranks may not differ: what is trained, and when they meet to measure, to save and to export."""
    return {key: json.dumps(value, default=str) for key, value in flatten(config).items() if not _is_own(key)}


def _is_own(key: str) -> bool:
    parts = key.split(".")
    return any(
        len(names) <= len(parts) and all(map(fnmatchcase, parts, names)) for names in (entry.split(".") for entry in _OWN)
    )


def input_facts(
    loaded: LoadedModel,
    projection: Projection | None,
    streams: Mapping[str, Stream],
    held_out: Mapping[str, Stream],
    retrieval: RetrievalSet | None,
) -> dict[str, str]:
    """What a rank has loaded, by content, wherever it lies.

    Args:
        loaded: weights and tokenizer.
        projection: the head on pooled vectors, new or that of the export that the run starts from.
        streams: of training.
        held_out: of validation.
        retrieval: what held-out retrieval asks and searches.
    """
    tokenizer = loaded.tokenizer.backend_tokenizer.to_str()
    facts = {"weights": f"hash {weights_key(loaded)}", "tokenizer": f"hash {_hash(tokenizer.encode())}"}
    facts |= {f"configuration of the model: {key}": value for key, value in configuration_facts(loaded.causal_lm).items()}
    if projection is not None:
        values = (value.detach().float().cpu().numpy().tobytes() for value in projection.state_dict().values())
        facts["projection"] = f"hash {_hash(*values)}"
    facts |= {**_stream_facts(streams, "streams"), **_stream_facts(held_out, "validation.sources")}
    if retrieval is not None:
        answers = json.dumps([sorted(found) for found in retrieval.relevant])
        texts = (sample.input_ids.tobytes() + b"|" for sample in (*retrieval.queries, *retrieval.documents))
        counts = f"{len(retrieval.queries):,} queries, {len(retrieval.documents):,} documents"
        facts["validation.retrieval.queries"] = f"{counts}, hash {_hash(answers.encode(), *texts)}"
    return facts


def weights_key(loaded: LoadedModel) -> str:
    """A hash of what a rank holds. Frozen weights stay what it read, so ranks compare every byte; a single process need not."""
    return held_weights_key(loaded.causal_lm) if distributed.world_size() > 1 else str(loaded.provenance["fingerprint"])


def _stream_facts(streams: Mapping[str, Stream], section: str) -> dict[str, str]:
    """The rows of every source, by content, and what decides which samples are drawn from them."""
    facts: dict[str, str] = {}
    for name, stream in streams.items():
        for entry in stream.entries:
            rows = "" if entry.rows is None else f"{entry.rows:,} rows, "
            facts[f"{section}.{name}: {entry.name}"] = f"{rows}hash {entry.fingerprint[:12]}"
        facts[f"{section}.{name}"] = f"hash {stream.fingerprint[:12]}"
    return facts


def _hash(*parts: bytes) -> str:
    digest = blake2b(digest_size=6)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def require_same(facts: Mapping[str, str]) -> None:
    """Compare what every rank has. Collective.

    Raises:
        DataError: ranks differ; raised on every rank, with what each of them has.
    """
    by_rank = distributed.all_gather_objects(dict(facts))
    keys = list(dict.fromkeys(key for found in by_rank for key in found))
    problems = [_difference(key, [found.get(key) for found in by_rank]) for key in keys if _differs(key, by_rank)]
    if problems:
        more = f"\n  and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise DataError(
            "the ranks of this run do not have the same settings, weights or rows:\n  "
            + "\n  ".join(problems[:_SHOWN])
            + f"{more}\nA node may hold a stale copy: bring the files of all nodes up to date, or read from a shared disk."
        )


def _differs(key: str, by_rank: Iterable[Mapping[str, Any]]) -> bool:
    return len({found.get(key) for found in by_rank}) > 1


def _difference(key: str, values: list[str | None]) -> str:
    ranks: dict[str | None, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(rank)
    return f"{key}: " + "; ".join(f"{_ranks(found)} {'nothing' if v is None else v}" for v, found in ranks.items())


def _ranks(found: list[int]) -> str:
    shown = ", ".join(map(str, found[:4])) + (f" and {len(found) - 4} more" if len(found) > 4 else "")
    return f"rank {shown} has" if len(found) == 1 else f"ranks {shown} have"
