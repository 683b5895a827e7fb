"""The settings of formats of prompts and answers: conversations, and completions that are desirable or not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from unified_lm.config.objectives import ObjectiveKind
from unified_lm.config.streams import GENERATE, RecordKind, StreamConfig


@dataclass(frozen=True, kw_only=True)
class ChatStream(StreamConfig):
    """Conversations whose answers are learned."""

    implementation: ClassVar[str] = "unified_lm.data.formats.answered.Chat"
    record_kind: ClassVar[RecordKind] = RecordKind.CHAT
    data_key: ClassVar[str] = "chat"
    objective_kind: ClassVar[ObjectiveKind] = ObjectiveKind.TOKEN
    attentions: ClassVar[tuple[str, ...]] = ("causal", "bidirectional_prompt")
    modes: ClassVar[tuple[str, ...]] = (GENERATE,)
    limit_keys: ClassVar[tuple[str, ...]] = ("max_tokens",)

    format: str = "chat"
    """The format."""
    max_tokens: int = 512
    """Limit of a sample, in tokens."""


@dataclass(frozen=True, kw_only=True)
class PreferenceStream(ChatStream):
    """Prompts with completions that are desirable or not (KTO)."""

    implementation: ClassVar[str] = "unified_lm.data.formats.answered.Preference"
    record_kind: ClassVar[RecordKind] = RecordKind.PREFERENCE
    data_key: ClassVar[str] = "preference"
    objective_kind: ClassVar[ObjectiveKind] = ObjectiveKind.SEQUENCE
    adjusts_only: ClassVar[bool] = True
    rehearsal_source: ClassVar[Mapping[str, Any]] = {"limit": 64}  # full fine-tuning scores all of them before it trains

    format: str = "preference"
    """The format."""
