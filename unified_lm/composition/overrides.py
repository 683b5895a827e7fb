"""What is merged into the nested values of a recipe before these become dataclasses: `key=value` arguments, absent data."""

from __future__ import annotations

import re
from typing import Any

from unified_lm.composition.convert import schema_keys
from unified_lm.config.streams import source_values
from unified_lm.core.errors import did_you_mean
from unified_lm.data.formats import FORMATS


def overlay(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` over `below`, nested mappings merged key by key; neither is changed.

    An objective that is named anew takes nothing from the one below but its weight: other settings would mean nothing to it.
    """
    merged = dict(below)
    for key, value in above.items():
        merged[key] = _over(key, merged.get(key), value)
    return merged


def _over(key: str, below: Any, above: Any) -> Any:
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    if key == "objective" and above.get("name", below.get("name")) != below.get("name"):
        return {**({"weight": below["weight"]} if "weight" in below else {}), **above}
    return overlay(below, above)


def apply_override(tree: dict[str, Any], key: str, value: Any, delete: bool, problems: list[str]) -> bool:
    """Set or delete one dotted key of nested values, in place.

    Args:
        tree: the values of a recipe.
        key: dotted; a number is a position in a list.
        value: what to set; a mapping is merged over a mapping that is there, unless it names another objective.
        delete: whether the key is removed instead.
        problems: takes a sentence when the key cannot exist.

    Returns:
        False when the way leads through an interpolation that is not resolved yet, and nothing was done.
    """
    *parents, leaf = key.split(".")
    node: Any = tree
    for depth, name in enumerate(parents):
        below = _child(node, name)
        if isinstance(below, str) and "${" in below:
            return False
        if below is None:
            reason = _missing_parent(tree, node, parents[: depth + 1], key)
            if reason:
                problems.append(reason)
                return True
            node[name] = below = {}
        if not isinstance(below, (dict, list)):
            problems.append(f"unknown key '{key}': {'.'.join(parents[: depth + 1])} is a single value.")
            return True
        node = below
    if delete and _child(node, leaf, missing=...) is ...:
        problems.append(f"~{key}: there is no such key to remove.{did_you_mean(leaf, map(str, node))}")
    elif delete:
        node.pop(leaf if isinstance(node, dict) else int(leaf))
    elif isinstance(node, list):
        _set_item(node, leaf, value, key, problems)
    elif parents[:1] == ["data"] and leaf not in node:
        problems.append(f"unknown key '{key}'.{did_you_mean(key, _paths(node, parents))}")
    elif not parents and leaf not in node and leaf in _mapping(node.get("data")):
        problems.append(f"unknown key '{key}'. Did you mean 'data.{key}'?")
    else:
        node[leaf] = _over(leaf, node.get(leaf), value)
    return True


def spell_out_sources(tree: dict[str, Any]) -> None:
    """Write sources that are given as one text, or as one mapping, as lists of mappings, in place: keys lead into those."""
    held_out = _mapping(_mapping(tree.get("validation")).get("sources"))
    holders = [(stream, "sources") for stream in _mapping(tree.get("streams")).values()]
    holders += [(held_out, name) for name in held_out]
    for holder, key in holders:
        given = holder.get(key) if isinstance(holder, dict) else None
        if isinstance(given, (str, dict)):
            holder[key] = [given]
        if isinstance(given, (str, dict, list)):
            holder[key] = [source_values(item) if isinstance(item, str) else item for item in holder[key]]


def _mapping(value: Any) -> dict[str, Any]:
    """A section of a tree that may be of another type, which is refused later by name."""
    return value if isinstance(value, dict) else {}


def _paths(node: Any, parents: list[str]) -> list[str]:
    return [".".join([*parents, str(name)]) for name in node]


def _child(node: Any, name: str, missing: Any = None) -> Any:
    if isinstance(node, list):
        return node[int(name)] if name.isdigit() and int(name) < len(node) else missing
    return node.get(name, missing)


def _set_item(node: list[Any], leaf: str, value: Any, key: str, problems: list[str]) -> None:
    if leaf.isdigit() and int(leaf) < len(node):
        node[int(leaf)] = value
    else:
        problems.append(f"'{key}': expected a position below {len(node)}, got '{leaf}'.")


def _missing_parent(tree: dict[str, Any], node: Any, parents: list[str], key: str) -> str | None:
    """Why a key cannot be set below a parent that is absent or null; None where an empty parent may be made."""
    path = ".".join(parents)
    if parents[0] == "streams" and len(parents) == 2:
        return f"unknown stream in '{key}'.{did_you_mean(parents[1], tree.get('streams') or {})}"
    if isinstance(node, list):
        return f"unknown key '{key}'."
    if parents[0] == "data" and parents[-1] not in node:
        return f"unknown key '{key}'.{did_you_mean(path, _paths(node, parents[:-1]))}"
    if parents == ["lora"]:
        return f"'{key}': no adapter is trained here (lora is none); choose one first, such as lora=llm2vec."
    if parents[-1] in node:
        return f"'{key}': {path} is null here; set it as a whole first ({path}={{...}})."
    if not any(_matches(path, known) for known in schema_keys()):
        top = {known.partition(".")[0] for known in schema_keys()}
        return f"unknown key '{key}'.{did_you_mean(parents[0], top) if parents[0] not in top else ''}"
    return None


def _matches(path: str, known: str) -> bool:
    return re.fullmatch(re.escape(known).replace(r"\*", r"[^.]+"), path) is not None


def absent_data() -> dict[str, Any]:
    """What the kinds of rows that a data group does not offer resolve to. Made anew each time: it is changed in place."""
    kinds = sorted({kind.data_key for kind in FORMATS.values()})
    return {
        **{kind: [] for kind in kinds},
        "hard_negatives": 0,
        "held_out": {**{kind: [] for kind in kinds}, "retrieval": None},
    }


def drop_absent_validation(tree: dict[str, Any]) -> None:
    """Leave out streams whose data group offers no held-out rows: they are not validated."""
    validation = tree.get("validation")
    sources = validation.get("sources") if isinstance(validation, dict) else None
    if isinstance(sources, dict):
        tree["validation"]["sources"] = {name: rows for name, rows in sources.items() if rows != []}
