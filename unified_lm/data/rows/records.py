"""Validated rows, which sources yield and formats turn into samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from unified_lm.config.streams import RecordKind

__all__ = [
    "ChatRecord",
    "GroundedRecord",
    "PairRecord",
    "PreferenceRecord",
    "Record",
    "RecordKind",
    "Text",
    "TextRecord",
    "answers_of",
]


@dataclass(frozen=True, slots=True)
class Text:
    """A text to embed, with its instruction ("" for none)."""

    text: str
    instruction: str = ""


@dataclass(frozen=True, slots=True)
class PairRecord:
    """A query, one or more texts that answer it, and any number of texts that do not."""

    query: Text
    positives: tuple[Text, ...]
    negatives: tuple[Text, ...] = ()


def answers_of(pairs: Sequence[PairRecord]) -> list[tuple[Text, ...]]:
    """Per row the texts that answer its query (under its instruction) in any row: some sets have one row per answer."""
    keys = [(pair.query.instruction, pair.query.text.strip()) for pair in pairs]
    answers: dict[tuple[str, str], dict[Text, None]] = {}
    for key, pair in zip(keys, pairs, strict=True):
        answers.setdefault(key, {}).update(dict.fromkeys(pair.positives))
    return [tuple(answers[key]) for key in keys]


@dataclass(frozen=True, slots=True)
class ChatRecord:
    """A conversation: (role, content) turns, role one of "system", "user", "assistant"; at least one assistant turn.

    Attributes:
        unlearned: indices of assistant turns that are read but not learned, ascending; never all of them.
    """

    turns: tuple[tuple[str, str], ...]
    unlearned: tuple[int, ...] = ()

    @property
    def answers(self) -> list[str]:
        """The contents of the assistant turns that are learned."""
        return [text for i, (role, text) in enumerate(self.turns) if role == "assistant" and i not in self.unlearned]


@dataclass(frozen=True, slots=True)
class TextRecord:
    """Running text or a sentence."""

    text: str


@dataclass(frozen=True, slots=True)
class PreferenceRecord:
    """A prompt, a completion, and whether the completion is desirable."""

    prompt: str
    completion: str
    desirable: bool


@dataclass(frozen=True, slots=True)
class GroundedRecord:
    """A question with documents that answer it, documents that do not, and its answer.

    Attributes:
        pair: the question (query) and the documents (positives: those that hold the answer).
        answers: at least one; the first is learned, all of them count as right.
    """

    pair: PairRecord
    answers: tuple[str, ...]


Record = PairRecord | ChatRecord | TextRecord | PreferenceRecord | GroundedRecord
