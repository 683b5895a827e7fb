"""`model=tiny_random`: the same recipe on a tiny random model, made small and offline so that it runs anywhere in seconds.

It works on plain nested values, before they become dataclasses. Whatever was given on the command line stays as given.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

_TOKEN_LIMIT = 256
"""Raised to as well as lowered to: the tiny tokenizer knows little more than bytes, so that instructions take more tokens."""
_DIMENSIONS = 64
"""Of the tiny models' embeddings."""
_GROUPS_PER_STEP = 4
_TOKEN_BUDGET = 1024
_MAX_STEPS = 20
_MAX_QUERIES = 16
_BUILTIN_ROWS: dict[str, dict[str, Any]] = {
    "views": {"subset": "sentences"},
    "preference": {"limit": 64},  # full fine-tuning scores all of them before it trains
}
"""What is said about the built-in rows of a format."""


def rehearse(values: dict[str, Any], given: Collection[str], *, keep_data: bool) -> list[str]:
    """Shrink a resolved recipe to a rehearsal, in place.

    Args:
        values: the recipe's nested values.
        given: dotted keys set on the command line; these are left alone.
        keep_data: whether the data were chosen explicitly (`data=...` or `data.path=...`).

    Returns:
        One sentence for everything that was changed.
    """
    notices = [f"rehearsal: a tiny random {values['model'].get('family')} model in float32 instead of real weights."]
    values["model"]["tiny_random"] = True
    _set(values["model"], "model", "autocast", False, given)
    _set(values["model"], "model", "dtype", "float32", given)
    _set(values["model"], "model", "tokenizer", None, given)
    if isinstance(values.get("lora"), dict):
        _set(values["lora"], "lora", "quantize_4bit", False, given)
    if isinstance(values.get("streams"), dict):
        notices += _shrink(values, given)
        if not keep_data:
            notices += _use_builtin_data(values, given)
    return notices


def _set(values: dict[str, Any], path: str, key: str, value: Any, given: Collection[str]) -> str | None:
    """Set a value unless it was given; returns "key was -> is" where it changed."""
    dotted = f"{path}.{key}".removeprefix(".")
    before = values.get(key)
    if dotted in given or before == value:
        return None
    values[key] = value
    return f"{dotted} {'default' if before is None else before} -> {value}"


def _cap(values: dict[str, Any], path: str, key: str, most: int, default: int, given: Collection[str]) -> str | None:
    """Lower a whole number to `most` unless it was given; returns "key was -> is" where it changed."""
    before = values.get(key, default)
    return _set(values, path, key, most, given) if isinstance(before, int) and before > most else None


def _shrink(values: dict[str, Any], given: Collection[str]) -> list[str]:
    changes = [_cap(values, "", "max_steps", _MAX_STEPS, 100, given)]
    changes.append(_cap(values.setdefault("packing", {}), "packing", "token_budget", _TOKEN_BUDGET, 2048, given))
    for name, stream in values["streams"].items():
        if not isinstance(stream, dict):
            continue
        path = f"streams.{name}"
        changes.append(_cap(stream, path, "batch_size", _GROUPS_PER_STEP, 32, given))
        for key in ("max_query_tokens", "max_document_tokens") if stream.get("format") == "pairs" else ("max_tokens",):
            changes.append(_set(stream, path, key, _TOKEN_LIMIT, given))
        objective = stream.get("objective")
        if isinstance(objective, dict) and any(dim > _DIMENSIONS for dim in objective.get("matryoshka_dims") or ()):
            # even one that was given: the tiny model has not as many
            changes.append(_set(objective, f"{path}.objective", "matryoshka_dims", [_DIMENSIONS, _DIMENSIONS // 2], ()))
        if isinstance(objective, dict) and isinstance(objective.get("micro_batch_size"), int):
            changes.append(_cap(objective, f"{path}.objective", "micro_batch_size", stream["batch_size"], 0, given))
    optim = values.setdefault("optim", {})
    changes.append(_cap(optim, "optim", "warmup_steps", 1, 0, given))
    retrieval = (values.get("validation") or {}).get("retrieval")
    if isinstance(retrieval, dict):
        changes.append(_cap(retrieval, "validation.retrieval", "max_queries", _MAX_QUERIES, 200, given))
    listed = [change for change in changes if change]
    return [f"rehearsal: {', '.join(listed)}."] if listed else []


def _use_builtin_data(values: dict[str, Any], given: Collection[str]) -> list[str]:
    replaced = []
    for name, stream in values["streams"].items():
        if not isinstance(stream, dict) or any(key.startswith(f"streams.{name}.sources") for key in given):
            continue
        source = {"builtin": "pydocs", **_BUILTIN_ROWS.get(stream.get("format", ""), {})}
        stream["sources"] = [source]
        _set(stream, f"streams.{name}", "num_hard_negatives", 0, given)
        replaced.append(f"streams.{name}.sources")
        validation = values.get("validation") or {}
        held_out = validation.get("sources") or {}
        if name in held_out and not any(key.startswith(f"validation.sources.{name}") for key in given):
            held_out[name] = [{**source, "split": "test"}]
    retrieval = (values.get("validation") or {}).get("retrieval")
    if isinstance(retrieval, dict) and not any(key.startswith("validation.retrieval") for key in given):
        retrieval["queries"] = {"builtin": "pydocs", "split": "test", "limit": _MAX_QUERIES}
    return [f"rehearsal: built-in pydocs rows for {', '.join(replaced)}; choose data=... for others."] if replaced else []
