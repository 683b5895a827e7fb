"""Preferences for the built-in questions without annotators: every answer, and a bad answer derived from the chats.

A question "What does X do?" has two rows: its answer from the docstring (desirable) and an undesirable one, with one of three
failures that are typical of small models (`Failure`); the name of the object decides which one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from unified_lm.core.cached_folder import cached_folder
from unified_lm.core.files import cache_dir
from unified_lm.core.random import derive_seed

PART = "preferences"
"""Name of the subset."""
VERSION = 1
"""Increase when a change below alters the result."""
_EVASIVE = (
    "It does what its name says.",
    "Please see the documentation of {name}.",
    "{short} is a Python object. It can be used in many ways.",
    "I cannot say what {short} does without more context.",
)
_REPETITIONS = 3


class Failure(Enum):
    """How an answer fails.

    Attributes:
        WRONG: the answer to another question, about a related object.
        REPETITIVE: the first sentence of the correct answer, repeated three times.
        EVASIVE: a phrase without content.
    """

    WRONG = "wrong"
    REPETITIVE = "repetitive"
    EVASIVE = "evasive"


def failure_of(name: str) -> Failure:
    """The failure of the bad answer about `name`; each one applies to a third of the names, by hash."""
    return list(Failure)[derive_seed("failure", name) % len(Failure)]


def undesirable_answer(name: str, answer: str, other: str) -> str:
    """Make a bad answer to the question about `name`.

    Args:
        name: a dotted name.
        answer: the good answer.
        other: the good answer to another question.
    """
    failure = failure_of(name)
    if failure is Failure.WRONG:
        return other
    if failure is Failure.REPETITIVE:
        return " ".join([re.split(r"(?<=[.!?])\s", answer, maxsplit=1)[0]] * _REPETITIONS)
    phrase = _EVASIVE[derive_seed("evasive", name) % len(_EVASIVE)]
    return phrase.format(name=name, short=name.rpartition(".")[2])


def preferences_file(chats: Path, question: str) -> Path:
    """The file of preferences, built beside the file of `chats` if this machine lacks it.

    Args:
        chats: a pydocs file of chats (one split) with at least two rows.
        question: form of its questions, with "{name}" for the object.
    """
    target = cache_dir("pydocs_preferences", f"{chats.parent.name}-{chats.stem}-{VERSION}")
    cached_folder(target, f"pydocs/{PART}", lambda folder: _fill(folder, chats, question))
    return target / "preferences.jsonl"


def _fill(folder: Path, chats: Path, question: str) -> None:
    rows = [json.loads(line) for line in chats.read_text(encoding="utf-8").split("\n") if line]
    pairs = [tuple(turn["content"] for turn in row["messages"]) for row in rows]
    with open(folder / "preferences.jsonl", "w", encoding="utf-8") as handle:
        for row in preference_rows(pairs, question):
            handle.write(json.dumps(row, ensure_ascii=False) + "\n")


def preference_rows(pairs: Sequence[tuple[str, ...]], question: str) -> Iterator[dict[str, Any]]:
    """Two rows for every (question, answer), the desirable one first; wrong answers are taken from the preceding question."""
    head, _, tail = question.partition("{name}")
    for index, (prompt, answer) in enumerate(pairs):
        name = prompt.removeprefix(head).removesuffix(tail)
        bad = undesirable_answer(name, answer, pairs[index - 1][1])
        yield {"prompt": prompt, "completion": answer, "label": True}
        yield {"prompt": prompt, "completion": bad, "label": False}
