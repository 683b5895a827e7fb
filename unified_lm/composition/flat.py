"""Configurations as one level of dotted keys, to compare them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from unified_lm.composition.convert import to_plain


def flatten(config: Any) -> dict[str, Any]:
    """Dotted key -> value of a configuration dataclass or of nested mappings; lists and empty mappings are values."""
    return dict(_leaves(to_plain(config), ""))


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else str(key))
    else:
        yield path, value
