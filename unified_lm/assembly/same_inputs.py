"""Whether every rank reads the same settings, weights and rows: nodes may hold stale copies, and would train on together."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from typing import Any

from unified_lm.composition.flat import flatten
from unified_lm.config.continuation import Change, change_of
from unified_lm.config.schema import RunConfig
from unified_lm.core import distributed
from unified_lm.core.errors import DataError
from unified_lm.data.stream import Stream
from unified_lm.models.loading import LoadedModel

_SHOWN = 6


def setting_facts(config: RunConfig) -> dict[str, str]:
    """The settings that make a run what it is: those that a resume may not change."""
    return {
        key: json.dumps(value, default=str) for key, value in flatten(config).items() if change_of(key) is Change.REFUSED
    } | {"max_steps": str(config.max_steps), "model.dtype": config.model.dtype}


def model_facts(loaded: LoadedModel) -> dict[str, str]:
    """What weights and tokenizer a rank has loaded."""
    tokenizer = loaded.tokenizer.backend_tokenizer.to_str()
    return {
        f"weights of {loaded.provenance['name']}": str(loaded.provenance["fingerprint"]),
        "tokenizer": blake2b(tokenizer.encode(), digest_size=8).hexdigest(),
    }


def stream_facts(streams: Mapping[str, Stream], section: str) -> dict[str, str]:
    """The rows of every source, by content, and what decides which samples are drawn from them."""
    facts: dict[str, str] = {}
    for name, stream in streams.items():
        for entry in stream.entries:
            rows = "" if entry.rows is None else f"{entry.rows:,} rows, "
            facts[f"{section}.{name}: {entry.name}"] = f"{rows}hash {entry.fingerprint[:12]}"
        facts[f"{section}.{name}"] = f"hash {stream.fingerprint[:12]}"
    return facts


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
