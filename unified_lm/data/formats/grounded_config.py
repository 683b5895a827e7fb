"""The settings of answers that are grounded in documents."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from unified_lm.config.checks import at_least, choice
from unified_lm.config.objectives import ObjectiveKind
from unified_lm.config.parts import RehearsalSizes
from unified_lm.config.streams import GENERATE, RecordKind, StreamConfig
from unified_lm.data.prompts.layouts import LAYOUTS


@dataclass(frozen=True, kw_only=True)
class GroundedStream(StreamConfig):
    """Questions that are answered from documents, which are read as an index holds them: each on its own."""

    implementation: ClassVar[str] = "unified_lm.data.formats.grounded.Grounded"
    record_kind: ClassVar[RecordKind] = RecordKind.GROUNDED
    data_key: ClassVar[str] = "grounded"
    objective_kind: ClassVar[ObjectiveKind] = ObjectiveKind.TOKEN
    attentions: ClassVar[tuple[str, ...]] = ("bidirectional", "bidirectional_keep_first", "causal")
    modes: ClassVar[tuple[str, ...]] = (GENERATE,)
    instructed: ClassVar[bool] = True
    limit_keys: ClassVar[tuple[str, ...]] = ("max_query_tokens", "max_document_tokens", "max_turn_tokens")

    format: str = "grounded"
    """The format."""
    attention: str = "bidirectional"
    """Inside a block: "bidirectional" or "bidirectional_keep_first", as texts are embedded, or "causal". What follows the
    blocks is causal."""
    layouts: tuple[str, ...] = ("document_cache",)
    """What prompts look like (`unified_lm.data.prompts.layouts`); every draw of a row takes one of them at random."""
    num_documents: int = 3
    """Documents of a prompt: those that hold the answer, filled up with those that do not, in random order."""
    max_query_tokens: int = 128
    """Limit of a question that is a block, in tokens with its prompt; the text is cut."""
    max_document_tokens: int = 256
    """Limit of a document, in tokens with its prompt; the text is cut."""
    max_turn_tokens: int = 512
    """Limit of what follows the blocks, in tokens: the user's turn and the answer, which is cut."""

    @property
    def longest_sample(self) -> int:
        """See `StreamConfig.longest_sample`."""
        return self.max_query_tokens + self.num_documents * self.max_document_tokens + self.max_turn_tokens

    @classmethod
    def rehearsal_changes(
        cls, values: Mapping[str, Any], sizes: RehearsalSizes, *, own_data: bool
    ) -> Iterator[tuple[str, Any]]:
        """See `StreamConfig.rehearsal_changes`: one document, and a turn that has room for it."""
        changes = dict(super().rehearsal_changes(values, sizes, own_data=own_data))
        yield from {**changes, "max_turn_tokens": 2 * sizes.tokens, "num_documents": 1}.items()

    def problems(self, path: str) -> Iterator[str]:
        """See `StreamConfig.problems`."""
        yield from super().problems(path)
        yield from at_least(f"{path}.num_documents", self.num_documents, 1)
        if not self.layouts:
            yield f"{path}.layouts: is empty; expected some of {', '.join(LAYOUTS)}."
        for layout in self.layouts:
            yield from choice(f"{path}.layouts", layout, tuple(LAYOUTS))
