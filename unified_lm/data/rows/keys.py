"""Keys of a row and of a turn that bear meaning, and names that miss them narrowly: none of them is ignored in silence.

Where a format reads a key it is a field (`parse.FIELDS`). The tables here hold the keys that it cannot read: a row that has
one, with a value that says something, is refused, since it would train on something else than the row says. All other keys
are ignored and counted.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache

from unified_lm.config.streams import RecordKind
from unified_lm.data.rows.violations import MeaningfulKeyError

_ONE = frozenset({"1", "1.0", "true"})
_LABELED = "drop such rows, or say with ignore=[{key}] that the column has no bearing here"
_JOINED = "join it to the prompt (of a row with documents: to the query), or "
_SHORTEST_NEAR_MISS = 5
"""Characters of the shortest name of which another name is a near miss: short ones resemble too much."""


def is_empty(value: object) -> bool:
    """Whether a value is none, or a text or a collection without anything in it: such values never bear meaning."""
    return value is None or (isinstance(value, str | list | tuple | Mapping) and not value)


@dataclass(frozen=True)
class MeaningfulKey:
    """A key that says something about its row which a kind of record cannot hold.

    Attributes:
        says: what a value says.
        kinds: the kinds of record that it means something to.
        harmless: values, as lower-case text, that say nothing; empty values never do.
        fix: what to do about it; "{key}" stands for the key.
    """

    says: str
    kinds: frozenset[RecordKind]
    harmless: frozenset[str] = frozenset()
    fix: str = "ignore=[{key}] reads such rows without it"

    def matters(self, value: object) -> bool:
        """Whether a value says something."""
        return not is_empty(value) and str(value).strip().lower() not in self.harmless


_ALL = frozenset(RecordKind)
_ANSWERED = frozenset({RecordKind.CHAT, RecordKind.PREFERENCE, RecordKind.GROUNDED})
_PAIR = frozenset({RecordKind.PAIR, RecordKind.GROUNDED})
_weight = MeaningfulKey("how much the row counts", _ALL, _ONE, "repeat rows, or give their source a weight; " + _LABELED)
_loss = MeaningfulKey("what of the row is learned", _ALL, _ONE, _LABELED)
_label = MeaningfulKey("whether the texts belong together", _PAIR, _ONE, _LABELED)
_wanted = MeaningfulKey(
    "whether the answer is wanted", frozenset({RecordKind.CHAT}), _ONE, "use format=preference, or " + _LABELED
)
_input = MeaningfulKey("a part of the prompt", _ANSWERED, fix=_JOINED + _LABELED)
_system = MeaningfulKey("the system turn", frozenset({RecordKind.PREFERENCE, RecordKind.GROUNDED}), fix=_JOINED + _LABELED)
_tools = MeaningfulKey("tools that answers call", _ANSWERED, fix="turns of tools are not read; " + _LABELED)
_document_instruction = MeaningfulKey(
    "the instruction of documents", _PAIR, fix="write [instruction, text], or give the source document_instruction"
)
_choice = MeaningfulKey(
    "answers compared with one another",
    frozenset({RecordKind.PREFERENCE}),
    fix="write a row with a label for each answer, or " + _LABELED,
)

ROW_KEYS: Mapping[str, tuple[MeaningfulKey, ...]] = {
    **dict.fromkeys(("weight", "sample_weight", "loss_weight"), (_weight,)),
    **dict.fromkeys(("loss_mask", "train", "train_on"), (_loss,)),
    **dict.fromkeys(("label", "desirable"), (_label, _wanted)),
    **dict.fromkeys(("labels", "score", "similarity", "similarity_score", "relevance", "is_duplicate"), (_label,)),
    **dict.fromkeys(("input", "context", "history"), (_input,)),
    **dict.fromkeys(("tools", "functions", "tool_calls", "images", "image", "audio", "videos"), (_tools,)),
    **dict.fromkeys(
        ("document_instruction", "passage_instruction", "pos_instruction", "neg_instruction"), (_document_instruction,)
    ),
    **dict.fromkeys(("chosen", "rejected"), (_choice,)),
    **dict.fromkeys(("system", "system_prompt"), (_system,)),
}
"""Keys of a row. A kind that has a field of that name reads it instead."""

ORDINARY = frozenset(
    {
        *("brain", "grain", "rain", "strain", "trail", "trails", "trains", "trait"),  # as train
        *("core", "scope", "scored", "scorer", "store"),  # as score
        *("height", "eight"),  # as weight
        *("content", "contest"),  # as context
        *("chose", "libel"),  # as chosen, label
    }
)
"""Words that resemble a key, and name something else: such a key is no near miss."""

_CHAT = frozenset({RecordKind.CHAT})
_called = MeaningfulKey("a call of a tool, or its result", _CHAT, fix="turns of tools are not read: leave the row out")
_thought = MeaningfulKey(
    "text that the answer is preceded by", _CHAT, fix="write it into the content of the turn, or " + _LABELED
)
_media = MeaningfulKey("what is not text", _CHAT, fix="leave the row out")

TURN_KEYS: Mapping[str, MeaningfulKey] = {
    **dict.fromkeys(("tool_calls", "function_call", "tool_call_id", "tools"), _called),
    **dict.fromkeys(("reasoning_content", "reasoning", "thinking"), _thought),
    **dict.fromkeys(("images", "image", "audio", "video"), _media),
    **dict.fromkeys(
        ("training_detail", "train_detail", "token_weights"), MeaningfulKey("which of its tokens are learned", _CHAT)
    ),
}
"""Keys of a turn of a conversation."""

LEARNED_KEYS: Mapping[str, bool] = {
    "weight": True,
    "loss_mask": True,
    "loss": True,
    "train": True,
    "training": True,
    "masked": False,
}
"""Keys of a turn that say whether an answer is learned, and the value that says so: those of OpenAI (weight), axolotl (train,
training), ms-swift (loss) and torchtune (masked)."""


@lru_cache(maxsize=4096)
def near_miss(name: str, known: Collection[str], others: Collection[str] = frozenset()) -> str | None:
    """The known name that another one misses by one edit, or only by its case, its spaces or its hyphens; None without one.

    Args:
        name: a key of a row.
        known: hashable; the names that would be read, or refused.
        others: hashable; names that are none of these whatever they resemble.
    """
    if name in known:
        return None
    low = name.strip().lower().replace("-", "_").replace(" ", "_")
    if low in known or low in others:
        return low if low in known else None
    return next((k for k in known if low == k.lower() or (len(k) >= _SHORTEST_NEAR_MISS and _one_edit(low, k))), None)


def _one_edit(a: str, b: str) -> bool:
    """Whether two different texts differ by one character more, less or other, or by two neighbors in the other order."""
    if len(a) > len(b):
        a, b = b, a
    start = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), len(a))
    if len(a) != len(b):
        return len(b) - len(a) == 1 and a[start:] == b[start + 1 :]
    swapped = a[start : start + 2] == b[start : start + 2][::-1] and a[start + 2 :] == b[start + 2 :]
    return a[start + 1 :] == b[start + 1 :] or swapped


class RefusedKeys:
    """The keys that rows of one kind may not have beside those that are read.

    Args:
        kind: of the rows.
        fields: the names under which each field is read, where they are those of the format.
        others: names that mean something to some kind, and are near misses of nothing.
    """

    def __init__(self, kind: RecordKind, fields: Mapping[str, Collection[str]], others: Collection[str]) -> None:
        self.keys = {name: key for name, keys in ROW_KEYS.items() for key in keys if kind in key.kinds}
        self._fields = fields
        self._lists = tuple(name for field in ("negative", "positive") for name in fields.get(field, ()))
        self._others = frozenset({*others, *ROW_KEYS, *ORDINARY})

    def check(self, name: str, value: object, asked: Collection[str], missing: Collection[str]) -> None:
        """Refuse a key that was not read, where it bears meaning or its name is a near miss of one that is read or does.

        Args:
            name: the key.
            value: what the row has under it.
            asked: the fields that were looked for in the row.
            missing: columns that the user named and the row lacks.

        Raises:
            MeaningfulKeyError: it does.
        """
        if is_empty(value):
            return
        read = tuple(known for field, names in self._fields.items() if field in asked for known in names)
        if name in self.keys:
            key, says = self.keys[name], self.keys[name].says
        elif close := near_miss(name, read, self._others) or near_miss(name, tuple(missing)):
            raise MeaningfulKeyError(name, value, f"'{close}'", f"rename it or leave it out, or say ignore=[{name}]")
        elif close := near_miss(name, tuple(self.keys), self._others):
            key, says = self.keys[close], f"'{close}', {self.keys[close].says}"
        else:
            self._check_number(name, value)
            return
        if key.matters(value):
            raise MeaningfulKeyError(name, value, says, key.fix.format(key=name))

    def _check_number(self, name: str, value: object) -> None:
        base = name.rstrip("0123456789").rstrip("_- ")
        close = base if base in self._lists else near_miss(base, self._lists, self._others)
        if base != name and close:
            fix = f"write all of them as a list under '{close}', or say ignore=[{name}]"
            raise MeaningfulKeyError(name, value, f"one of several '{close}'", fix)
