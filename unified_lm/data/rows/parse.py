"""Parsing of rows (mappings of columns) into records; errors name the field, what it holds and what is expected.

Rows may have the common public formats: GritLM/E5, Echo, sentence-transformers columns, chat messages, ShareGPT conversations,
GritLM text rows, prompt and completion, preference rows. Unused columns are ignored.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from unified_lm.core.errors import DataError, did_you_mean
from unified_lm.data.rows.records import ChatRecord, PairRecord, PreferenceRecord, Record, RecordKind, Text, TextRecord

# Field of the format -> accepted column names.
FIELDS: dict[RecordKind, dict[str, tuple[str, ...]]] = {
    RecordKind.PAIR: {
        "query": ("query", "anchor"),
        "positive": ("positive", "pos"),
        "negative": ("negative", "neg"),
    },
    RecordKind.CHAT: {
        "messages": ("messages",),
        "conversations": ("conversations",),
        "text": ("text",),
        "prompt": ("prompt",),
        "completion": ("completion",),
    },
    RecordKind.TEXT: {"text": ("text",)},
    RecordKind.PREFERENCE: {
        "prompt": ("prompt",),
        "completion": ("completion",),
        "label": ("label", "desirable"),
    },
}

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
}

TEXT_OR_PAIR = "a text or [instruction, text]"
_NUMBERED_NEGATIVE = re.compile(r"negative_(\d+)")
# GritLM strips these from the instructions of its embedding rows: "Represent the query:" equals "Represent the query".
_INSTRUCTION_EDGES = "\t\n :"
_MAX_SHOWN = 60


class RowError(Exception):
    """A row violates its format. Readers add the file and the line and raise `DataError`.

    Args:
        field: path of the value in the row, such as ``pos[0]`` or ``messages[2].content``.
        got: the value, in words.
        expected: the expected value, in words.
        hint: how to fix it ("" for no hint).
    """

    def __init__(self, field: str, got: str, expected: str, hint: str = "") -> None:
        self.field = field
        self.got = got
        super().__init__(f"field '{field}': got {got}, expected {expected}.{hint}")


class EmptyTextError(RowError):
    """A text that is empty after stripping. `on_empty=skip` turns it into a counted rejection."""

    def __init__(self, field: str, got: str) -> None:
        super().__init__(
            field, got, "text with something besides whitespace", " on_empty=skip leaves such rows out and counts them."
        )
        self.reason = f"empty {re.sub(r'[0-9]+', '*', field)} after stripping"


class RowParser:
    """Parses the rows of one source.

    Args:
        kind: the kind of record to parse.
        columns: field -> column of the source, for fields whose names differ: ``{"query": "question"}``.

    Raises:
        DataError: `columns` names a field that this kind does not have.
    """

    def __init__(self, kind: RecordKind, columns: Mapping[str, str] | None = None) -> None:
        self.kind = kind
        self.columns: dict[str, str] = {}
        canonical = {name: field for field, names in FIELDS[kind].items() for name in names}
        for field, column in (columns or {}).items():
            if field not in canonical:
                raise DataError(f"columns: a {kind.value} row has no field '{field}'.{did_you_mean(field, canonical)}")
            self.columns[canonical[field]] = column
        self._parse = _PARSERS[kind]

    def __call__(self, row: object) -> Record:
        """Parse one row into a record.

        Raises:
            EmptyTextError: a text is empty after stripping.
            RowError: any other violation of the format.
        """
        if not isinstance(row, Mapping):
            raise RowError("(row)", describe(row), "an object with named columns")
        return self._parse(_Row(row, self.columns, self.kind))


class _Row:
    """A row in which fields are found under any of their accepted names."""

    def __init__(self, values: Mapping[str, Any], columns: Mapping[str, str], kind: RecordKind) -> None:
        self.values = values
        self._columns = columns
        self._kind = kind

    def names(self, field: str) -> tuple[str, ...]:
        """The columns that may hold a field."""
        mapped = self._columns.get(field)
        return (mapped,) if mapped is not None else FIELDS[self._kind][field]

    def find(self, field: str) -> tuple[str, Any] | None:
        """Column and value of a field, or None if the column is missing or null."""
        present = [name for name in self.names(field) if self.values.get(name) is not None]
        if len(present) > 1:
            both = " and ".join(f"'{name}'" for name in present)
            raise RowError(field, f"columns {both}", "only one of them", f" Say which: columns={{{field}: {present[0]}}}.")
        return (present[0], self.values[present[0]]) if present else None

    def require(self, field: str, expected: str) -> tuple[str, Any]:
        """Column and value of a required field."""
        found = self.find(field)
        if found is None:
            raise self.missing(field, expected)
        return found

    def missing(self, field: str, expected: str) -> RowError:
        """The error for a missing field."""
        names = self.names(field)
        for name in names:
            if name in self.values:  # the value is null, which `find` treats as missing
                got = "null (or an empty cell)"
                return RowError(name, got, expected) if field == "label" else EmptyTextError(name, got)
        known = ", ".join(map(str, self.values))
        # Only a close name: the message lists all columns anyway.
        close = next((hint for name in names if "Did you" in (hint := did_you_mean(name, map(str, self.values)))), "")
        also = "".join(f" (nor '{name}')" for name in names[1:])
        hint = f"{close} If another column holds it, say so: columns={{{field}: NAME}}."
        return RowError(names[0], f"no such column{also} among [{known}]", expected, hint)


def describe(value: object) -> str:
    """Describe a value briefly for an error message: its beginning and its type."""
    if value is None:
        return "null"
    shown = repr(value)
    shown = shown if len(shown) <= _MAX_SHOWN else shown[:_MAX_SHOWN] + "..."
    return f"{shown} ({type(value).__name__})"


def _string(value: object, field: str, expected: str = "a text") -> str:
    if not isinstance(value, str):
        raise RowError(field, describe(value), expected)
    if not value.strip():
        raise EmptyTextError(field, describe(value))
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(field, f"half of a surrogate pair at character {error.start}", "valid Unicode text") from error
    return value


def _text(value: object, field: str) -> Text:
    if isinstance(value, str):
        return Text(_string(value, field))
    if isinstance(value, Sequence) and len(value) == 2 and all(isinstance(part, str) for part in value):
        return Text(_string(value[1], f"{field}[1]"), value[0].strip(_INSTRUCTION_EDGES))
    raise RowError(field, describe(value), TEXT_OR_PAIR)


def _texts(value: object, field: str) -> tuple[Text, ...]:
    """One text, or a list whose items are texts or [instruction, text] (so ``["a", "b"]`` is two texts)."""
    if isinstance(value, str):
        return (Text(_string(value, field)),)
    if isinstance(value, Sequence):
        return tuple(_text(item, f"{field}[{i}]") for i, item in enumerate(value))
    raise RowError(field, describe(value), "a text, or a list of texts or [instruction, text]")


def _pair(row: _Row) -> PairRecord:
    column, value = row.require("query", TEXT_OR_PAIR)
    query = _text(value, column)
    column, value = row.require("positive", "a text, or a list of texts or [instruction, text]")
    positives = _texts(value, column)
    if not positives:
        raise RowError(column, "an empty list", "at least one text that answers the query")
    return PairRecord(query, positives, _negatives(row))


def _negatives(row: _Row) -> tuple[Text, ...]:
    found = row.find("negative")
    negatives = _texts(found[1], found[0]) if found else ()
    numbered = [name for name in row.values if isinstance(name, str) and _NUMBERED_NEGATIVE.fullmatch(name)]
    for name in sorted(numbered, key=lambda name: int(name.rpartition("_")[2])):
        if row.values[name] is not None:
            negatives += (_text(row.values[name], name),)
    return negatives


def _chat(row: _Row) -> ChatRecord:
    for field, role_key, content_key in (("messages", "role", "content"), ("conversations", "from", "value")):
        if found := row.find(field):
            return _conversation(found[1], found[0], role_key, content_key)
    if found := row.find("text"):
        return _alternating(found[1], found[0])
    if row.find("prompt") is None and row.find("completion") is None:
        raise row.missing("messages", "a list of {role, content}, or 'conversations', 'text', or 'prompt' and 'completion'")
    column, value = row.require("prompt", "a text")
    prompt = _string(value, column)
    column, value = row.require("completion", "a text")
    return ChatRecord((("user", prompt), ("assistant", _string(value, column))))


def _conversation(value: object, field: str, role_key: str, content_key: str) -> ChatRecord:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise RowError(field, describe(value), f"a list of {{{role_key}, {content_key}}}")
    turns: list[tuple[str, str]] = []
    for i, turn in enumerate(value):
        path = f"{field}[{i}]"
        if not isinstance(turn, Mapping):
            raise RowError(path, describe(turn), f"{{{role_key}, {content_key}}}")
        for key in (role_key, content_key):
            if key not in turn:
                raise RowError(f"{path}.{key}", f"only {', '.join(turn) or 'nothing'}", "a text")
        role = ROLES.get(turn[role_key]) if isinstance(turn[role_key], str) else None
        if role is None:
            raise RowError(f"{path}.{role_key}", describe(turn[role_key]), f"one of {', '.join(ROLES)}")
        if role == "system" and turn[content_key] == "":
            continue  # an empty system prompt is equivalent to none
        turns.append((role, _string(turn[content_key], f"{path}.{content_key}")))
    return _answered(turns, field)


def _alternating(value: object, field: str) -> ChatRecord:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise RowError(field, describe(value), "a list [user, assistant, ...]", " Running text is read by format=text.")
    roles = ("user", "assistant")
    return _answered([(roles[i % 2], _string(turn, f"{field}[{i}]")) for i, turn in enumerate(value)], field)


def _answered(turns: list[tuple[str, str]], field: str) -> ChatRecord:
    if not any(role == "assistant" for role, _ in turns):
        raise RowError(field, f"{len(turns)} turns and no assistant turn", "at least one assistant turn to learn from")
    return ChatRecord(tuple(turns))


def _running_text(row: _Row) -> TextRecord:
    column, value = row.require("text", "a text")
    if isinstance(value, Sequence) and not isinstance(value, str):
        raise RowError(column, describe(value), "a text", " A list [user, assistant, ...] is read by format=chat.")
    return TextRecord(_string(value, column))


def _preference(row: _Row) -> PreferenceRecord:
    column, value = row.require("prompt", "a text")
    prompt = _string(value, column)
    column, value = row.require("completion", "a text")
    completion = _string(value, column)
    column, value = row.require("label", "true or false")
    return PreferenceRecord(prompt, completion, _label(value, column))


def _label(value: object, field: str) -> bool:
    spelled = {"true": True, "1": True, "false": False, "0": False}
    if isinstance(value, bool):
        return value
    key = str(value).strip().lower()
    if isinstance(value, int | str) and key in spelled:
        return spelled[key]
    raise RowError(field, describe(value), "true or false (or 1 or 0)")


_PARSERS: dict[RecordKind, Callable[[_Row], Record]] = {
    RecordKind.PAIR: _pair,
    RecordKind.CHAT: _chat,
    RecordKind.TEXT: _running_text,
    RecordKind.PREFERENCE: _preference,
}
