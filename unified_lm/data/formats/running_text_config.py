"""The settings of formats of running text: every token learned, or hidden ones predicted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from unified_lm.config.checks import choice
from unified_lm.config.objectives import ObjectiveKind
from unified_lm.config.streams import EMBED, GENERATE, RecordKind, StreamConfig

CHUNKINGS = ("record", "concatenate")


@dataclass(frozen=True, kw_only=True)
class MaskingConfig:
    """Corruption for masked next-token prediction (LLM2Vec)."""

    probability: float = 0.2
    """Share of tokens that are predicted; position 0 and special tokens are never chosen."""
    scheme: str = "bert"
    """"bert": 80 % mask token, 10 % random, 10 % kept. "all_mask": always the mask token (LLM2Vec for Mistral)."""
    mask_token: str = "_"
    """Text of an ordinary token used as the mask; it must be a single token and never becomes a special one."""

    def problems(self, path: str) -> Iterator[str]:
        """What is wrong with the settings, one sentence each; `path` is their key."""
        if not 0 < self.probability < 1:
            yield f"{path}.probability: got {self.probability}, expected a share between 0 and 1."
        yield from choice(f"{path}.scheme", self.scheme, ("bert", "all_mask"))
        if not self.mask_token:
            yield f"{path}.mask_token: is empty; name an ordinary token, such as '_'."


@dataclass(frozen=True, kw_only=True)
class TextStream(StreamConfig):
    """Running text, every token of which is learned."""

    implementation: ClassVar[str] = "unified_lm.data.formats.running_text.Text"
    record_kind: ClassVar[RecordKind] = RecordKind.TEXT
    data_key: ClassVar[str] = "text"
    objective_kind: ClassVar[ObjectiveKind] = ObjectiveKind.TOKEN
    attentions: ClassVar[tuple[str, ...]] = ("causal",)
    modes: ClassVar[tuple[str, ...]] = (GENERATE,)
    templated: ClassVar[bool] = False
    can_flow: ClassVar[bool] = True
    limit_keys: ClassVar[tuple[str, ...]] = ("max_tokens",)

    format: str = "text"
    """The format."""
    max_tokens: int = 512
    """Limit of a sample, in tokens."""
    chunking: str = "record"
    """"record" (one sample per row, cut at the limit) or "concatenate" (rows joined and split at the limit)."""

    def problems(self, path: str) -> Iterator[str]:
        """See `StreamConfig.problems`."""
        yield from super().problems(path)
        yield from choice(f"{path}.chunking", self.chunking, CHUNKINGS)


@dataclass(frozen=True, kw_only=True)
class MaskedTextStream(TextStream):
    """Running text with hidden tokens that are predicted (MNTP)."""

    implementation: ClassVar[str] = "unified_lm.data.formats.running_text.MaskedText"
    attentions: ClassVar[tuple[str, ...]] = ("causal", "bidirectional", "bidirectional_keep_first")
    modes: ClassVar[tuple[str, ...]] = (EMBED,)
    embedding_precedence: ClassVar[int] = 2  # it only prepares for embedding
    hides_tokens: ClassVar[bool] = True

    format: str = "masked_text"
    """The format."""
    masking: MaskingConfig | None = None
    """Which tokens are hidden, and how; must be given."""

    def problems(self, path: str) -> Iterator[str]:
        """See `StreamConfig.problems`."""
        yield from super().problems(path)
        if self.masking is None:
            yield f"{path}.masking: is missing; {self.format} needs probability, scheme and mask_token."
        else:
            yield from self.masking.problems(f"{path}.masking")
