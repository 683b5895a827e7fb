"""`model=tiny_random`: the same recipe on a tiny random model, made small and offline so that it runs anywhere in seconds.

It works on plain nested values, before they become dataclasses. Whatever was given on the command line stays as given.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from unified_lm.config.objectives import ObjectiveConfig
from unified_lm.config.parts import RehearsalSizes, find_description
from unified_lm.config.streams import StreamConfig
from unified_lm.core.errors import ConfigError
from unified_lm.data.formats import FORMATS
from unified_lm.objectives import OBJECTIVES

_SIZES = RehearsalSizes()
_TOKEN_BUDGET = 1024
_MAX_STEPS = 20
_MAX_QUERIES = 16


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
        notices += _shrink(values, given, keep_data=keep_data)
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


def _section(values: dict[str, Any], key: str) -> dict[str, Any]:
    """A section of the values, made where it is absent. In place of one of another type, which is reported with all other
    problems, something that nobody reads."""
    found = values.setdefault(key, {})
    return found if isinstance(found, dict) else {}


def _shrink(values: dict[str, Any], given: Collection[str], *, keep_data: bool) -> list[str]:
    changes = [_cap(values, "", "max_steps", _MAX_STEPS, 100, given)]
    changes.append(_cap(_section(values, "packing"), "packing", "token_budget", _TOKEN_BUDGET, 2048, given))
    for name, stream in values["streams"].items():
        if not isinstance(stream, dict):
            continue
        path = f"streams.{name}"
        kind = _description(stream.get("format"))
        if kind is None:
            continue  # an unknown format is reported with all other problems
        own_data = keep_data or _has_given_sources(name, given)
        for key, value in kind.rehearsal_changes(stream, _SIZES, own_data=own_data):
            changes.append(_set(stream, path, key, value, given))
        objective = stream.get("objective")
        described = _objective_description(objective)
        if described is not None and isinstance(objective, dict):
            batch = stream.get("batch_size", _SIZES.groups)
            sizes = replace(_SIZES, groups=batch) if isinstance(batch, int) else _SIZES
            for key, value in described.rehearsal_changes(objective, sizes):
                changes.append(_set(objective, f"{path}.objective", key, value, given))
            for key, value in described.rehearsal_needs(objective, sizes):
                changes.append(_set(objective, f"{path}.objective", key, value, ()))
    changes.append(_cap(_section(values, "optim"), "optim", "warmup_steps", 1, 0, given))
    retrieval = _section(values, "validation").get("retrieval")
    if isinstance(retrieval, dict):
        changes.append(_cap(retrieval, "validation.retrieval", "max_queries", _MAX_QUERIES, 200, given))
    listed = [change for change in changes if change]
    return [f"rehearsal: {', '.join(listed)}."] if listed else []


def _use_builtin_data(values: dict[str, Any], given: Collection[str]) -> list[str]:
    replaced = []
    for name, stream in values["streams"].items():
        if not isinstance(stream, dict) or _has_given_sources(name, given):
            continue
        kind = _description(stream.get("format"))
        source = {"builtin": "pydocs", **(kind.rehearsal_source if kind is not None else {})}
        stream["sources"] = [source]
        replaced.append(f"streams.{name}.sources")
        held_out = _section(values, "validation").get("sources")
        is_given = any(key.startswith(f"validation.sources.{name}") for key in given)
        if isinstance(held_out, dict) and name in held_out and not is_given:
            held_out[name] = [{**source, "split": "test"}]
    retrieval = _section(values, "validation").get("retrieval")
    if isinstance(retrieval, dict) and not any(key.startswith("validation.retrieval") for key in given):
        retrieval["queries"] = {"builtin": "pydocs", "split": "test", "limit": _MAX_QUERIES}
    return [f"rehearsal: built-in pydocs rows for {', '.join(replaced)}; choose data=... for others."] if replaced else []


def _has_given_sources(name: str, given: Collection[str]) -> bool:
    return any(key.startswith(f"streams.{name}.sources") for key in given)


def _description(name: Any) -> type[StreamConfig] | None:
    try:
        return find_description(name, FORMATS, StreamConfig) if isinstance(name, str) else None
    except ConfigError:
        return None


def _objective_description(values: Any) -> type[ObjectiveConfig] | None:
    try:
        return find_description(values["name"], OBJECTIVES, ObjectiveConfig) if isinstance(values, dict) else None
    except (ConfigError, KeyError, TypeError):
        return None
