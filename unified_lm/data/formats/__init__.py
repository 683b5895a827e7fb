"""From records to token rows, and from a row to the samples of one draw.

A format has two halves: `rows` runs once per source (its result is cached), `samples` runs at every draw and makes the random
choices (which positive, which negatives, what to mask).
"""

from __future__ import annotations

from unified_lm.core.tables import resolve
from unified_lm.data.formats.answered import Chat, Preference
from unified_lm.data.formats.base import ATTENTIONS, Format, hash_text
from unified_lm.data.formats.embedded import Pairs, Views
from unified_lm.data.formats.running_text import CHUNKINGS, MaskedText, Text

__all__ = [
    "ATTENTIONS",
    "CHUNKINGS",
    "FORMATS",
    "Chat",
    "Format",
    "MaskedText",
    "Pairs",
    "Preference",
    "Text",
    "Views",
    "get_format",
    "hash_text",
]

FORMATS: dict[str, type[Format]] = {
    "pairs": Pairs,
    "chat": Chat,
    "preference": Preference,
    "text": Text,
    "masked_text": MaskedText,
    "views": Views,
}
"""Formats by name."""


def get_format(name: str) -> type[Format]:
    """The format class of that name or at that dotted path.

    Raises:
        ConfigError: there is none.
    """
    return resolve(name, FORMATS, "format")
