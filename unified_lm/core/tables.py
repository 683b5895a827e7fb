"""Names that users choose from: extension points (one visible name -> class table each, plus any dotted path), enumerations."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from enum import Enum
from typing import Any, TypeVar

from unified_lm.core.errors import ConfigError, UserError, did_you_mean

T = TypeVar("T")
E = TypeVar("E", bound=Enum)


def choose(kind: type[E], name: str, what: str, error: type[UserError] = ConfigError) -> E:
    """Find the member of an enumeration by its value.

    Args:
        kind: the enumeration.
        name: a member's value, as users write it.
        what: the kind of thing, for the error text ("normalization").
        error: class of the exception.

    Raises:
        UserError: of class `error`, if there is no such member.
    """
    try:
        return kind(name)
    except ValueError:
        raise error(f"unknown {what} '{name}'.{did_you_mean(name, [str(member.value) for member in kind])}") from None


def resolve(name: str, table: Mapping[str, T], what: str) -> T | Any:
    """Look a name up in a table, or import it when it is a dotted path such as ``my_package.module.Class``.

    Args:
        name: a key of `table` or a dotted path.
        table: the built-in choices.
        what: the kind of thing, for the error text ("objective", "template").

    Raises:
        ConfigError: neither a known name nor an importable path.
    """
    if name in table:
        return table[name]
    if "." not in name:
        raise ConfigError(f"unknown {what} '{name}'.{did_you_mean(name, table)}")
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:  # a module of the user's may raise anything while it is imported
        raise ConfigError(f"cannot import the {what} '{name}': {type(error).__name__}: {error}") from error
