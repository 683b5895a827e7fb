"""The settings of formats whose samples are embedded: pairs, and two views of a text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from unified_lm.config.checks import at_least, choice
from unified_lm.config.objectives import ObjectiveKind
from unified_lm.config.parts import RehearsalSizes, RunFacts
from unified_lm.config.streams import EMBED, RecordKind, StreamConfig


@dataclass(frozen=True, kw_only=True)
class GroupStream(StreamConfig):
    """A stream of groups that are embedded and scored together."""

    objective_kind: ClassVar[ObjectiveKind] = ObjectiveKind.EMBEDDING
    attentions: ClassVar[tuple[str, ...]] = ("causal", "bidirectional", "bidirectional_keep_first")
    modes: ClassVar[tuple[str, ...]] = (EMBED,)

    mix_sources: bool = False
    """Whether one batch has groups of several sources; false takes one source a batch, so that negatives are of one kind."""

    @property
    def one_source_per_batch(self) -> bool:
        """See `StreamConfig.one_source_per_batch`."""
        return not self.mix_sources


@dataclass(frozen=True, kw_only=True)
class PairsStream(GroupStream):
    """Queries with a positive each, and hard negatives."""

    implementation: ClassVar[str] = "unified_lm.data.formats.embedded.Pairs"
    record_kind: ClassVar[RecordKind] = RecordKind.PAIR
    data_key: ClassVar[str] = "pairs"
    instructed: ClassVar[bool] = True
    unit: ClassVar[str] = "pairs"
    limit_keys: ClassVar[tuple[str, ...]] = ("max_query_tokens", "max_document_tokens")

    format: str = "pairs"
    """The format."""
    num_hard_negatives: int = 0
    """Hard negatives per query; rows with more are sampled from."""
    on_few_negatives: str = "error"
    """Rows with fewer hard negatives than that: "error", "skip" (left out and counted), or "pad" (those they have count)."""
    max_query_tokens: int = 256
    """Limit of a query, in tokens; the text is cut, never the instruction or the template."""
    max_document_tokens: int = 256
    """Limit of a document, in tokens; cut likewise."""

    @property
    def group_size(self) -> int:
        """See `StreamConfig.group_size`."""
        return 2 + self.num_hard_negatives

    @property
    def tokens_per_group(self) -> int:
        """See `StreamConfig.tokens_per_group`."""
        return self.max_query_tokens + (1 + self.num_hard_negatives) * self.max_document_tokens

    @property
    def embedding_limits(self) -> tuple[int, int]:
        """See `StreamConfig.embedding_limits`."""
        return self.max_query_tokens, self.max_document_tokens

    def problems(self, path: str) -> Iterator[str]:
        """See `StreamConfig.problems`."""
        yield from super().problems(path)
        yield from at_least(f"{path}.num_hard_negatives", self.num_hard_negatives, 0)
        yield from choice(f"{path}.on_few_negatives", self.on_few_negatives, ("error", "skip", "pad"))
        if self.on_few_negatives == "pad" and not getattr(self.objective, "leaves_out_missing", False):
            yield (
                f"{path}.on_few_negatives: 'pad' leaves places of a group empty, and the objective {self.objective.name} does "
                "not say that it leaves them out (leaves_out_missing); use skip, or fewer hard negatives."
            )

    @classmethod
    def rehearsal_changes(
        cls, values: Mapping[str, Any], sizes: RehearsalSizes, *, own_data: bool
    ) -> Iterator[tuple[str, Any]]:
        """See `StreamConfig.rehearsal_changes`: the built-in rows have no hard negatives."""
        yield from super().rehearsal_changes(values, sizes, own_data=own_data)
        if not own_data:
            yield "num_hard_negatives", 0


@dataclass(frozen=True, kw_only=True)
class ViewsStream(GroupStream):
    """The same text twice: only dropout tells the two apart (SimCSE, arXiv:2104.08821)."""

    implementation: ClassVar[str] = "unified_lm.data.formats.embedded.Views"
    record_kind: ClassVar[RecordKind] = RecordKind.TEXT
    data_key: ClassVar[str] = "sentences"
    embedding_precedence: ClassVar[int] = 1
    held_out_obstacle: ClassVar[str] = "two views are equal without dropout, so a held-out loss would say nothing"
    limit_keys: ClassVar[tuple[str, ...]] = ("max_tokens",)
    rehearsal_source: ClassVar[Mapping[str, Any]] = {"subset": "sentences"}

    format: str = "views"
    """The format."""
    max_tokens: int = 512
    """Limit of a view, in tokens."""

    @property
    def group_size(self) -> int:
        """See `StreamConfig.group_size`."""
        return 2

    def run_problems(self, path: str, run: RunFacts) -> Iterator[str]:
        """See `StreamConfig.run_problems`."""
        yield from super().run_problems(path, run)
        if run.attention_dropout == 0 and not run.adapter_dropout:
            yield f"{path}: two views differ by dropout alone, and model.attention_dropout and lora.dropout are 0."

    def run_notices(self, name: str, run: RunFacts) -> Iterator[str]:
        """See `StreamConfig.run_notices`."""
        yield from super().run_notices(name, run)
        if run.attention_dropout is None and not run.adapter_dropout:
            yield (
                f"stream {name}: two views of a text differ by dropout alone, and here only the checkpoint's own settings can "
                "give some; set model.attention_dropout."
            )
