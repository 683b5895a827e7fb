"""From records to token rows, and from a row to the samples of one draw.

A format has two halves: `rows` runs once per source (its result is cached), `samples` runs at every draw and makes the random
choices (which positive, which negatives, what to mask). Its settings and facts are a `StreamConfig` beside it
(`*_config.py`), which the table below lists; this package can be imported without torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from unified_lm.config.parts import find_implementation
from unified_lm.config.streams import StreamConfig
from unified_lm.core.errors import ConfigError
from unified_lm.data.formats.answered_config import ChatStream, PreferenceStream
from unified_lm.data.formats.embedded_config import PairsStream, ViewsStream
from unified_lm.data.formats.grounded_config import GroundedStream
from unified_lm.data.formats.running_text_config import MaskedTextStream, MaskingConfig, TextStream

if TYPE_CHECKING:
    from unified_lm.data.formats.base import Format

__all__ = [
    "FORMATS",
    "ChatStream",
    "GroundedStream",
    "MaskedTextStream",
    "MaskingConfig",
    "PairsStream",
    "PreferenceStream",
    "TextStream",
    "ViewsStream",
    "get_format",
]

FORMATS: Mapping[str, type[StreamConfig]] = {
    "pairs": PairsStream,
    "chat": ChatStream,
    "preference": PreferenceStream,
    "grounded": GroundedStream,
    "text": TextStream,
    "masked_text": MaskedTextStream,
    "views": ViewsStream,
}
"""Formats by name: the description of each."""


def get_format(config: StreamConfig) -> type[Format]:
    """The class that reads and writes a stream's format.

    Raises:
        ConfigError: it cannot be imported, or is no `Format`.
    """
    from unified_lm.data.formats.base import Format  # here: the table above must not need torch

    found = find_implementation(config, FORMATS)
    if not (isinstance(found, type) and issubclass(found, Format)):
        raise ConfigError(
            f"format '{config.format}': got {found!r}, expected a subclass of unified_lm.data.formats.base.Format. "
            "Extend it, or one of the built-in formats."
        )
    return found
