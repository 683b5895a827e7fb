"""What is wrong with a row, in words; readers add the file and the line."""

from __future__ import annotations

import re

_MAX_SHOWN = 60


class RowError(Exception):
    """A row violates its format. Readers add the file and the line and raise `DataError`.

    Args:
        field: path of the value in the row, such as ``pos[0]`` or ``messages[2].content``.
        got: the value, in words.
        expected: the expected value, in words.
        hint: how to fix it ("" for no hint).

    Attributes:
        reason: what rows like it are counted under where they are left out.
    """

    def __init__(self, field: str, got: str, expected: str, hint: str = "") -> None:
        self.field = field
        self.got = got
        self.reason = f"{_any_number(field)}: not {expected}"
        super().__init__(f"field '{field}': got {got}, expected {expected}.{hint}")


class EmptyTextError(RowError):
    """A text that is empty after stripping. `on_empty=skip` turns it into a counted rejection."""

    def __init__(self, field: str, got: str) -> None:
        super().__init__(
            field, got, "text with something besides whitespace", " on_empty=skip leaves such rows out and counts them."
        )
        self.reason = f"empty {_any_number(field)} after stripping"


class MeaningfulKeyError(RowError):
    """A key that is not read and that says something about its row."""

    def __init__(self, field: str, value: object, says: str, fix: str) -> None:
        super().__init__(field, describe(value), f"no such key: it seems to say {says}, which is not read", f" Fix: {fix}.")
        self.reason = f"{_any_number(field)}: a key that bears meaning and is not read"


def _any_number(field: str) -> str:
    """The path of a value without its indices, so that equal mistakes count as one."""
    return re.sub(r"[0-9]+", "*", field)


def describe(value: object) -> str:
    """Describe a value briefly for an error message: its beginning and its type."""
    if value is None:
        return "null"
    try:
        shown = repr(value)
    except RecursionError:
        shown = "something nested very deeply"
    shown = shown if len(shown) <= _MAX_SHOWN else shown[:_MAX_SHOWN] + "..."
    return f"{shown} ({type(value).__name__})"
