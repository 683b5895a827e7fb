"""Plain values (of YAML, JSON or a command line) checked against the annotations of dataclasses, every problem collected."""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from unified_lm.core.errors import UserError, did_you_mean

T = TypeVar("T")

_LEAST, _LARGEST = 1.2e-38, 3.4e38
"""Magnitudes that a float32 holds with all its digits."""

FAILED = object()
"""What stands for a value that has another type than its annotation; a problem says which."""

Build = Callable[[type, Any, str, list[str]], Any]
"""(dataclass, value, dotted path, problems) -> an instance, or FAILED."""


@cache
def hints_of(cls: type) -> dict[str, Any]:
    """The annotations of a dataclass, resolved."""
    return get_type_hints(cls)


def read_typed(kind: Any, value: Any, path: str, problems: list[str], *, open_ended: bool = False) -> Any:
    """Check the content of a file against a type.

    Args:
        kind: a dataclass, or any annotation of `typed_value`.
        value: nested dicts, lists and scalars.
        path: its dotted place, for messages; "" at the top.
        problems: takes a sentence for everything that is wrong.
        open_ended: whether keys that a dataclass does not have are left out instead of being a problem.

    Returns:
        The value with lists as tuples and mappings as dataclasses where the annotations say so; FAILED after a problem.
        Numbers that are not finite are numbers: measurements may be so.
    """
    build = partial(_build, open_ended=open_ended)
    return typed_value(kind, value, path, problems, build, finite=False)


def require_typed(
    kind: type[T], value: Any, where: Path | str, error: type[UserError], *, fix: str, open_ended: bool = False
) -> T:
    """`read_typed` for a dataclass, or an error that lists everything that is wrong.

    Args:
        kind: the dataclass.
        value: nested dicts, lists and scalars.
        where: the file, or what the value is, for the message.
        error: the error to raise.
        fix: what to do about it, a sentence.
        open_ended: see `read_typed`.

    Raises:
        UserError: of the given kind.
    """
    problems: list[str] = []
    found = read_typed(kind, value, "", problems, open_ended=open_ended)
    if problems or not isinstance(found, kind):
        raise error(f"{where}: {' '.join(problems)} {fix}")
    return found


def _build(cls: type, value: Any, path: str, problems: list[str], *, open_ended: bool) -> Any:
    if not isinstance(value, Mapping):
        problems.append(f"{path}: got {show(value)}, expected an object.".removeprefix(": "))
        return FAILED
    prefix = f"{path}." if path else ""
    known = {field.name: field for field in dataclasses.fields(cls)}
    if not open_ended:
        problems.extend(f"unknown field '{prefix}{key}'.{did_you_mean(str(key), known)}" for key in value if key not in known)
    made: dict[str, Any] = {}
    build = partial(_build, open_ended=open_ended)
    for name, field in known.items():
        if name in value:
            made[name] = typed_value(hints_of(cls)[name], value[name], prefix + name, problems, build, finite=False)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            problems.append(f"missing field '{prefix}{name}' ({name_of(hints_of(cls)[name])}).")
            made[name] = FAILED
    return FAILED if any(item is FAILED for item in made.values()) else cls(**made)


def typed_value(kind: Any, value: Any, path: str, problems: list[str], build: Build, *, finite: bool) -> Any:
    """Convert one value to an annotated type, or record why not and return `FAILED`.

    Args:
        kind: `Any`, a scalar type, a dataclass, a union, a tuple or a mapping of these.
        value: the plain value.
        path: its dotted place.
        problems: takes a sentence for everything that is wrong.
        build: makes dataclasses.
        finite: whether a number must be finite, and neither infinite nor 0 as the float32 that training computes with.
    """
    origin, args = get_origin(kind), get_args(kind)
    inner = partial(typed_value, problems=problems, build=build, finite=finite)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        return _union(args, value, path, problems, build, finite)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return build(kind, value, path, problems)
    if origin is tuple and isinstance(value, (str, Mapping)) and hasattr(args[0], "from_text"):
        value = [value]  # one source is a list of one
    if origin in (tuple, Sequence) and isinstance(value, (list, tuple)):
        kinds = list(args) if origin is tuple and args[-1] is not Ellipsis else [args[0]] * len(value)
        if len(kinds) != len(value):
            problems.append(f"{path}: got {len(value)} values, expected {len(kinds)}.")
            return FAILED
        items = [inner(k, v, f"{path}.{index}") for index, (k, v) in enumerate(zip(kinds, value, strict=True))]
        return FAILED if any(item is FAILED for item in items) else tuple(items)
    if origin in (dict, Mapping) and isinstance(value, Mapping):
        pairs = {str(key): inner(args[1], item, f"{path}.{key}") for key, item in value.items()}
        return FAILED if any(item is FAILED for item in pairs.values()) else pairs
    return _scalar(kind, value, path, problems, finite)


def _scalar(kind: Any, value: Any, path: str, problems: list[str], finite: bool) -> Any:
    if not _is_scalar(kind, value):
        problems.append(f"{path}: got {show(value)}, expected {name_of(kind)}.")
        return FAILED
    if isinstance(value, str) and (fault := unusable_text(value)):
        problems.append(f"{path}: got {show(value)}, which {fault}.")
        return FAILED
    if kind is float:
        try:
            number = float(value)
        except OverflowError:  # a whole number beyond the range of floats
            number = math.inf
        if finite and not (number == 0 or _LEAST <= abs(number) <= _LARGEST):
            shown = f"a whole number of {len(str(abs(value)))} digits" if isinstance(value, int) else value
            problems.append(f"{path}: got {shown}, expected a finite number that 32 bits hold, up to {_LARGEST:.0e}.")
            return FAILED
        return number
    if kind is int and not -(2**63) <= value < 2**63:
        problems.append(f"{path}: got a whole number of {len(str(abs(value)))} digits, which no counter holds (64 bits).")
        return FAILED
    return value


def unusable_text(text: str) -> str | None:
    """Why a text can neither be written as UTF-8 nor handed to the operating system; None if it can."""
    if "\0" in text:
        return "holds a NUL character"
    return None if half_pair(text) is None else "holds bytes that are not UTF-8, or half of a surrogate pair"


def half_pair(text: str) -> int | None:
    """Where a text has half of a pair of surrogates, which JSON can spell and nothing can write or read; None if nowhere."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return error.start
    return None


def _union(kinds: tuple[Any, ...], value: Any, path: str, problems: list[str], build: Build, finite: bool) -> Any:
    if value is None and type(None) in kinds:
        return None
    others = [kind for kind in kinds if kind is not type(None)]
    if len(others) == 1:
        return typed_value(others[0], value, path, problems, build, finite=finite)
    for kind in others:
        attempt: list[str] = []
        made = typed_value(kind, value, path, attempt, build, finite=finite)
        if not attempt:
            return made
    problems.append(f"{path}: got {show(value)}, expected {' or '.join(name_of(kind) for kind in others)}.")
    return FAILED


def _is_scalar(kind: Any, value: Any) -> bool:
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return kind in (str, bool) and isinstance(value, kind)


def name_of(kind: Any) -> str:
    """A type in a user's words."""
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join("null" if arg is type(None) else name_of(arg) for arg in args)
    if origin in (tuple, Sequence):
        return f"a list of {name_of(args[0])}"
    if origin in (dict, Mapping) or dataclasses.is_dataclass(kind):
        return "keys and values"
    return {str: "text", int: "a whole number", float: "a number", bool: "true or false", Any: "anything"}.get(kind, str(kind))


def show(value: Any) -> str:
    """A value and its type, briefly."""
    text = show_briefly(value)
    return f"{text} ({'null' if value is None else type(value).__name__})"


def show_briefly(value: Any, most: int = 60) -> str:
    """The beginning of a value's repr."""
    try:
        text = repr(value)
    except ValueError:  # a whole number of more digits than Python writes
        text = "a number of thousands of digits"
    except RecursionError:
        text = "something nested very deeply"
    return text if len(text) < most else text[: most - 3] + "..."
