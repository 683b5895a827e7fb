"""Parsing of rows (mappings of columns) into records; errors name the field, what it holds and what is expected.

Rows may have the common public formats: GritLM/E5, Echo, sentence-transformers columns, chat messages, ShareGPT conversations,
GritLM text rows, prompt and completion, preference rows. Other keys are ignored and counted, unless they bear meaning
(`keys.py`): those are refused.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from unified_lm.core.errors import DataError, did_you_mean
from unified_lm.core.typed import half_pair
from unified_lm.data.rows.keys import LEARNED_KEYS, TURN_KEYS, RefusedKeys, near_miss
from unified_lm.data.rows.records import (
    ChatRecord,
    GroundedRecord,
    PairRecord,
    PreferenceRecord,
    Record,
    RecordKind,
    Text,
    TextRecord,
)
from unified_lm.data.rows.violations import EmptyTextError, MeaningfulKeyError, RowError, describe

_PAIR = {
    "query": ("query", "anchor"),
    "positive": ("positive", "pos", "positives"),
    "negative": ("negative", "neg", "negatives", "negs", "hard_negative", "hard_negatives", "hard_neg", "hard_negs"),
    "instruction": ("instruction", "prompt", "query_instruction"),
}
# Field of the format -> accepted column names.
FIELDS: dict[RecordKind, dict[str, tuple[str, ...]]] = {
    RecordKind.PAIR: _PAIR,
    RecordKind.CHAT: {
        "messages": ("messages",),
        "conversations": ("conversations",),
        "system": ("system", "system_prompt"),
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
    RecordKind.GROUNDED: {
        **_PAIR,
        "query": ("query", "question"),
        "positive": (*_PAIR["positive"], "documents", "document"),
        "answer": ("answers", "answer"),
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

_TURN_NAMES = (*LEARNED_KEYS, *TURN_KEYS)
_FIELD_NAMES = frozenset(name for fields in FIELDS.values() for names in fields.values() for name in names)
TEXT_OR_PAIR = "a text or [instruction, text]"
_NUMBERED_NEGATIVE = re.compile(r"(?:hard_)?neg(?:ative)?_?([0-9]+)")
_NUMBERED_POSITIVE = re.compile(r"pos(?:itive)?_?(\d+)")
# GritLM strips these from the instructions of its embedding rows: "Represent the query:" equals "Represent the query".
_INSTRUCTION_EDGES = "\t\n :"


class RowParser:
    """Parses the rows of one source.

    Args:
        kind: the kind of record to parse.
        columns: field -> column of the source, for fields whose names differ: ``{"query": "question"}``.
        ignore: keys of rows and of turns that are left out of account although they bear meaning.

    Attributes:
        ignored: number of rows (or turns, as ``messages[].name``) with a value under a key that is not read, by key.
        used: those columns of `columns` that a row had.

    Raises:
        DataError: `columns` names a field that this kind does not have.
    """

    def __init__(self, kind: RecordKind, columns: Mapping[str, str] | None = None, ignore: Collection[str] = ()) -> None:
        self.kind = kind
        self.ignore = frozenset(ignore)
        self.ignored: Counter[str] = Counter()
        self.used: set[str] = set()
        self.columns: dict[str, str] = {}
        canonical = {name: field for field, names in FIELDS[kind].items() for name in names}
        for field, column in (columns or {}).items():
            if field not in canonical:
                raise DataError(f"columns: a {kind.value} row has no field '{field}'.{did_you_mean(field, canonical)}")
            self.columns[canonical[field]] = column
        if both := sorted(self.ignore & set(self.columns.values())):
            raise DataError(f"ignore: names '{both[0]}', which columns says is read. Leave it out of one of the two.")
        taken = {*self.columns.values(), *self.ignore}
        named = {field: [name for name in names if name not in taken] for field, names in FIELDS[kind].items()}
        fields = {field: names for field, names in named.items() if field not in self.columns}
        self._refused = RefusedKeys(kind, fields, _FIELD_NAMES)
        self._parse = _PARSERS[kind]

    def __call__(self, row: object) -> Record:
        """Parse one row into a record.

        Raises:
            EmptyTextError: a text is empty after stripping.
            RowError: any other violation of the format.
        """
        if not isinstance(row, Mapping):
            raise RowError("(row)", describe(row), "an object with named columns")
        view = _Row(row, self.columns, self.kind, self.ignore)
        record = self._parse(view)
        view.refuse_meaningful(self._refused)
        # names are told and recorded, and JSON can spell such as nothing can write
        self.ignored.update({name.encode("utf-8", "backslashreplace").decode(): count for name, count in view.ignored.items()})
        self.used.update(column for column in self.columns.values() if column in row and column not in view.ignored)
        return record


class _Row:
    """A row in which fields are found under any of their accepted names."""

    def __init__(self, values: Mapping[str, Any], columns: Mapping[str, str], kind: RecordKind, ignore: frozenset[str]) -> None:
        self.values = values
        self.ignore = ignore
        self.ignored: Counter[str] = Counter()
        self.read: set[str] = set()
        self._columns = columns
        self._kind = kind
        self._asked: set[str] = set()
        self._missing: set[str] = set()

    def names(self, field: str) -> tuple[str, ...]:
        """The columns that may hold a field: those that hold another one and those to ignore may not."""
        mapped = self._columns.get(field)
        if mapped is not None:
            return (mapped,)
        taken = {*self._columns.values(), *self.ignore}
        return tuple(name for name in FIELDS[self._kind][field] if name not in taken)

    def find(self, field: str) -> tuple[str, Any] | None:
        """Column and value of a field, or None if the column is missing or null."""
        self._asked.add(field)
        present = [name for name in self.names(field) if self.values.get(name) is not None]
        if len(present) > 1:
            both = " and ".join(f"'{name}'" for name in present)
            raise RowError(field, f"columns {both}", "only one of them", f" Say which: columns={{{field}: {present[0]}}}.")
        if not present:
            if field in self._columns:
                self._missing.update(self.names(field))
            return None
        self.read.add(present[0])
        return present[0], self.values[present[0]]

    def refuse_meaningful(self, refused: RefusedKeys) -> None:
        """Refuse keys that were not read and bear meaning, or miss narrowly a name that does; count the others."""
        for name, value in self.values.items():
            if name in self.read or value is None or not isinstance(name, str):
                continue
            if name not in self.ignore:
                refused.check(name, value, self._asked, self._missing)
            self.ignored[name] += 1

    def require(self, field: str, expected: str) -> tuple[str, Any]:
        """Column and value of a required field."""
        found = self.find(field)
        if found is None:
            raise self.missing(field, expected)
        return found

    def missing(self, field: str, expected: str) -> RowError:
        """The error for a missing field."""
        names = self.names(field) or FIELDS[self._kind][field]
        for name in names:
            if name in self.values and name not in self.ignore:  # the value is null, which `find` treats as missing
                got = "null (or an empty cell)"
                return RowError(name, got, expected) if field == "label" else EmptyTextError(name, got)
        known = ", ".join(map(str, self.values))
        # Only a close name: the message lists all columns anyway.
        close = next((hint for name in names if "Did you" in (hint := did_you_mean(name, map(str, self.values)))), "")
        also = "".join(f" (nor '{name}')" for name in names[1:])
        hint = f"{close} If another column holds it, say so: columns={{{field}: NAME}}."
        return RowError(names[0], f"no such column{also} among [{known}]", expected, hint)


def _string(value: object, field: str, expected: str = "a text") -> str:
    if not isinstance(value, str):
        raise RowError(field, describe(value), expected)
    if not value.strip():
        raise EmptyTextError(field, describe(value))
    return _unicode(value, field)


def _unicode(value: str, field: str) -> str:
    if (place := half_pair(value)) is not None:
        raise RowError(field, f"half of a surrogate pair at character {place}", "valid Unicode text")
    return value


def _text(value: object, field: str) -> Text:
    if isinstance(value, str):
        return Text(_string(value, field))
    if isinstance(value, Sequence) and len(value) == 2 and all(isinstance(part, str) for part in value):
        return Text(_string(value[1], f"{field}[1]"), _unicode(value[0], f"{field}[0]").strip(_INSTRUCTION_EDGES))
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
    if (found := row.find("instruction")) and not query.instruction:
        if not isinstance(found[1], str):
            raise RowError(found[0], describe(found[1]), "the instruction of the query, a text")
        query = Text(query.text, _unicode(found[1], found[0]).strip(_INSTRUCTION_EDGES))
    column, value = row.require("positive", "a text, or a list of texts or [instruction, text]")
    positives = _texts(value, column)
    if not positives:
        raise RowError(column, "an empty list", "at least one text that answers the query")
    return PairRecord(query, positives, _negatives(row))


def _grounded(row: _Row) -> GroundedRecord:
    pair = _pair(row)
    column, value = row.require("answer", "a text, or a list of texts that are all right")
    answers = [value] if isinstance(value, str) else value
    if not isinstance(answers, Sequence) or not answers:
        raise RowError(column, describe(value), "a text, or a list of texts that are all right")
    return GroundedRecord(pair, tuple(_string(answer, f"{column}[{i}]") for i, answer in enumerate(answers)))


def _negatives(row: _Row) -> tuple[Text, ...]:
    found = row.find("negative")
    negatives = _texts(found[1], found[0]) if found else ()
    numbered = {name: match for name in row.values if isinstance(name, str) and (match := _NUMBERED_NEGATIVE.fullmatch(name))}
    # by number; of thousands of digits Python makes none
    for name in sorted(numbered, key=lambda name: (len(digits := numbered[name][1].lstrip("0")), digits)):
        if row.values[name] is not None and name not in row.ignore and name not in row.read:
            row.read.add(name)
            negatives += (_text(row.values[name], name),)
    for name, value in row.values.items():
        if isinstance(name, str) and _NUMBERED_POSITIVE.fullmatch(name) and value is not None and name not in row.ignore:
            raise MeaningfulKeyError(name, value, "another positive", "write all of them as a list under 'pos'")
    return negatives


def _chat(row: _Row) -> ChatRecord:
    record = _turns(row)
    if found := row.find("system"):
        if record.turns[0][0] == "system":
            raise RowError(found[0], describe(found[1]), "no system text beside a system turn")
        if found[1] != "":
            turns = (("system", _string(found[1], found[0])), *record.turns)
            record = ChatRecord(turns, tuple(number + 1 for number in record.unlearned))
    return record


def _turns(row: _Row) -> ChatRecord:
    for field, role_key, content_key in (("messages", "role", "content"), ("conversations", "from", "value")):
        if found := row.find(field):
            return _conversation(row, found[1], found[0], role_key, content_key)
    if found := row.find("text"):
        return _alternating(found[1], found[0])
    if row.find("prompt") is None and row.find("completion") is None:
        raise row.missing("messages", "a list of {role, content}, or 'conversations', 'text', or 'prompt' and 'completion'")
    column, value = row.require("prompt", "a text")
    prompt = _string(value, column)
    column, value = row.require("completion", "a text")
    return ChatRecord((("user", prompt), ("assistant", _string(value, column))))


def _conversation(row: _Row, value: object, field: str, role_key: str, content_key: str) -> ChatRecord:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise RowError(field, describe(value), f"a list of {{{role_key}, {content_key}}}")
    turns: list[tuple[str, str]] = []
    unlearned: list[int] = []
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
        learned = _is_learned(row, turn, path, role, (role_key, content_key))
        if role == "system" and turn[content_key] == "":
            continue  # an empty system prompt is equivalent to none
        if role == "assistant" and not learned:
            unlearned.append(len(turns))
        turns.append((role, _string(turn[content_key], f"{path}.{content_key}")))
    return _answered(turns, field, unlearned)


def _is_learned(row: _Row, turn: Mapping[str, Any], path: str, role: str, own: tuple[str, str]) -> bool:
    """What the keys of a turn say about learning it; other keys are counted, or refused where they bear meaning."""
    learned = True
    for key, value in turn.items():
        if key in own or value is None:
            continue
        if key in row.ignore or not isinstance(key, str):
            row.ignored[_turn_key(path, key)] += 1
        elif key in LEARNED_KEYS:
            wanted = _label(value, f"{path}.{key}") == LEARNED_KEYS[key]
            if wanted and role != "assistant" and key != "weight":  # exporters write a weight of 1 everywhere
                raise RowError(f"{path}.{key}", describe(value), f"only turns of the assistant learned, not of the {role}")
            learned &= wanted
        elif key in TURN_KEYS and TURN_KEYS[key].matters(value):
            raise MeaningfulKeyError(f"{path}.{key}", value, TURN_KEYS[key].says, TURN_KEYS[key].fix.format(key=key))
        elif close := near_miss(key, _TURN_NAMES):
            raise MeaningfulKeyError(f"{path}.{key}", value, f"'{close}'", f"rename it, or say ignore=[{key}]")
        else:
            row.ignored[_turn_key(path, key)] += 1
    return learned


def _turn_key(path: str, key: object) -> str:
    return f"{path.partition('[')[0]}[].{key}"


def _alternating(value: object, field: str) -> ChatRecord:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise RowError(field, describe(value), "a list [user, assistant, ...]", " Running text is read by format=text.")
    roles = ("user", "assistant")
    return _answered([(roles[i % 2], _string(turn, f"{field}[{i}]")) for i, turn in enumerate(value)], field)


def _answered(turns: list[tuple[str, str]], field: str, unlearned: Sequence[int] = ()) -> ChatRecord:
    answers = [number for number, (role, _) in enumerate(turns) if role == "assistant"]
    if not answers:
        raise RowError(field, f"{len(turns)} turns and no assistant turn", "at least one assistant turn to learn from")
    if len(answers) == len(unlearned):
        raise RowError(field, "no answer that is to be learned", "at least one assistant turn to learn from")
    return ChatRecord(tuple(turns), tuple(unlearned))


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
    spelled = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
    if isinstance(value, bool):
        return value
    key = str(value).strip().lower()
    if isinstance(value, int | float | str) and key in spelled:
        return spelled[key]
    raise RowError(field, describe(value), "true or false (or 1 or 0)")


_PARSERS: dict[RecordKind, Callable[[_Row], Record]] = {
    RecordKind.PAIR: _pair,
    RecordKind.CHAT: _chat,
    RecordKind.TEXT: _running_text,
    RecordKind.PREFERENCE: _preference,
    RecordKind.GROUNDED: _grounded,
}
