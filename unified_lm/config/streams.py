"""Streams: where rows come from, and what every format says about itself.

Each format's own settings stand beside its code (`data/formats/*_config.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any, ClassVar

from unified_lm.config.checks import above, at_least, choice
from unified_lm.config.objectives import ObjectiveConfig, ObjectiveKind
from unified_lm.config.parts import PartConfig, RehearsalSizes, RunFacts

MODES = (EMBED, GENERATE) = ("embed", "generate")
"""What an export can do."""
ATTENTIONS = ("causal", "bidirectional", "bidirectional_keep_first", "bidirectional_prompt")


class RecordKind(Enum):
    """The shapes a row can have."""

    PAIR = "pair"
    CHAT = "chat"
    TEXT = "text"
    PREFERENCE = "preference"
    GROUNDED = "grounded"


HUB_PREFIX, BUILTIN_PREFIX, STREAM_PREFIX = "hub:", "builtin:", "stream:"
"""What a source that is given as one text begins with where it is no path."""


def source_values(text: str) -> dict[str, Any]:
    """The settings of a source given as one text: a path, ``hub:NAME[:SUBSET[:SPLIT]]``, or ``builtin:pydocs[:SUBSET]``; each
    also after ``stream:``, to be read along while training."""
    if text.startswith(STREAM_PREFIX):
        return source_values(text.removeprefix(STREAM_PREFIX)) | {"streaming": True}
    for key, prefix in (("hub", HUB_PREFIX), ("builtin", BUILTIN_PREFIX)):
        if text.startswith(prefix):
            parts = text.removeprefix(prefix).split(":", 2)
            return {name: part for name, part in zip((key, "subset", "split"), parts, strict=False) if part}
    return {"path": text}


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One place that rows come from. As one text: a path, ``hub:NAME[:SUBSET[:SPLIT]]``, or ``builtin:pydocs[:SUBSET]``; each
    also after ``stream:``."""

    path: str | None = None
    """A jsonl, jsonl.gz, parquet, csv, tsv or txt file, or a folder of them."""
    hub: str | None = None
    """Name of a Hub dataset."""
    subset: str | None = None
    """Configuration name of the Hub dataset, or part of a built-in one."""
    data_dir: str | None = None
    """Folder of the Hub dataset to read alone."""
    revision: str | None = None
    """Hub revision of the dataset (branch, tag or commit)."""
    builtin: str | None = None
    """The data set built on the spot, "pydocs"; its `subset`: pairs, chats, preferences, grounded, text or sentences."""
    split: str | None = None
    """Split of a Hub or built-in data set (null: "train"); of a folder, the files that are named so, or "all"."""
    streaming: bool = False
    """With `limit`: the first rows of a Hub data set, the rest is not downloaded. Without: running text is read along while
    training, whatever its length, and neither counted nor tokenized beforehand (all sources of the stream)."""
    weight: float = 1.0
    """Relative share of draws, before temperature, multiplied with the number of rows where that is known."""
    limit: int | None = None
    """Use at most this many rows (a seeded random choice; the first ones when streaming)."""
    instruction: str | None = None
    """Instruction for every query of the source; rows that carry their own keep it."""
    document_instruction: str | None = None
    """Instruction for every document of the source; None embeds documents without one."""
    columns: dict[str, str] = field(default_factory=dict)
    """Column for each field of the format whose name differs: {"query": "anchor"}; one that no row has is refused."""
    ignore: tuple[str, ...] = ()
    """Keys of rows or turns to leave out of account although they bear meaning ("label", "weight"); else they are refused."""
    on_empty: str = "error"
    """Rows with an empty text: "error", or "skip" (left out and counted). Running text always skips blank rows."""
    on_unusable: str = "error"
    """Rows that break their format in any way: "error", or "skip" (left out, counted by reason; empty texts too)."""

    @classmethod
    def from_text(cls, text: str) -> SourceConfig:
        """The source that one text names, see `source_values`."""
        return cls(**source_values(text))

    @property
    def flows(self) -> bool:
        """Whether its rows are read along while training."""
        return self.streaming and self.limit is None

    @property
    def split_or_train(self) -> str:
        """The split of a data set that has splits."""
        return self.split or "train"

    def problems(self, path: str) -> Iterator[str]:
        """What is wrong with a source, one sentence each; `path` is its key."""
        given = [name for name in ("path", "hub", "builtin") if getattr(self, name)]
        if len(given) != 1:
            yield f"{path}: got {' and '.join(given) or 'none'} of path, hub, builtin; expected exactly one."
        if self.builtin is not None:
            yield from choice(f"{path}.builtin", self.builtin, ("pydocs",))
        if self.path and self.subset:
            yield f"{path}.subset: belongs to a Hub or built-in data set, got the path {self.path}."
        if self.data_dir and not self.hub:
            yield f"{path}.data_dir: belongs to a Hub data set (hub=NAME), and none is given."
        if self.revision and not self.hub:
            yield f"{path}.revision: belongs to a Hub data set (hub=NAME), and none is given."
        if self.split == "":
            yield f"{path}.split: is empty; leave it out, or name one, such as train."
        if self.streaming and self.limit is not None and not self.hub:
            yield f"{path}.streaming: with a limit it belongs to a Hub data set (hub=NAME), and none is given."
        yield from above(f"{path}.weight", self.weight, 0)
        yield from choice(f"{path}.on_empty", self.on_empty, ("error", "skip"))
        yield from choice(f"{path}.on_unusable", self.on_unusable, ("error", "skip"))
        if self.limit is not None:
            yield from at_least(f"{path}.limit", self.limit, 1)


@dataclass(frozen=True, kw_only=True)
class StreamConfig(PartConfig):
    """One stream: rows of one kind, one attention mode, one objective."""

    selector: ClassVar[str] = "format"
    role: ClassVar[str] = "format"

    # --- facts; a format's description sets those that differ from here
    required: ClassVar[tuple[str, ...]] = ("record_kind", "data_key", "objective_kind")
    record_kind: ClassVar[RecordKind]
    """The records it reads."""
    data_key: ClassVar[str]
    """What a data group (`configs/data`) calls such rows."""
    objective_kind: ClassVar[ObjectiveKind]
    """What kind of objective trains its samples."""
    attentions: ClassVar[tuple[str, ...]] = ATTENTIONS
    """The attention modes that make sense for it."""
    modes: ClassVar[tuple[str, ...]] = ()
    """What an export can do after training on it: "embed", "generate"."""
    embedding_precedence: ClassVar[int] = 0
    """Of several streams that train embeddings, the one with the lowest number says how an export writes texts."""
    adjusts_only: ClassVar[bool] = False
    """Whether it only changes what a finished model prefers to say: what that model could do before, it still can."""
    templated: ClassVar[bool] = True
    """Whether its samples are written with prompts of the template (running text is not)."""
    instructed: ClassVar[bool] = False
    """Whether a source's instruction means anything to it."""
    hides_tokens: ClassVar[bool] = False
    """Whether the tokens to predict are hidden from the model."""
    held_out_obstacle: ClassVar[str] = ""
    """Why a loss over held-out rows would say nothing; empty where it says something."""
    unit: ClassVar[str] = "samples"
    """What `batch_size` counts."""
    can_flow: ClassVar[bool] = False
    """Whether it can read rows along while training."""
    limit_keys: ClassVar[tuple[str, ...]] = ()
    """Its settings that are limits in tokens."""
    rehearsal_source: ClassVar[Mapping[str, Any]] = {}
    """What a rehearsal says about the built-in rows beside their name."""

    format: str
    """A name of the table `unified_lm.data.formats.FORMATS`, or the dotted path of a class."""
    sources: tuple[SourceConfig, ...] = ()
    """Where its rows come from."""
    objective: ObjectiveConfig
    """What its samples are trained for."""
    attention: str = "causal"
    """"causal", "bidirectional", "bidirectional_keep_first" (the first token sees itself alone, as in causal attention), or
    "bidirectional_prompt" (a chat's prompt turns see each other, the answer is causal)."""
    template: str = "grit"
    """Prompt template by name ("grit", "plain", "chatml", ...), or a dotted path."""
    batch_size: int = 32
    """Groups (pairs, views) or samples (chat, preference, text) per optimizer step, over all ranks."""
    source_temperature: float = 1.0
    """Sources are drawn in proportion to (weight * rows) ** temperature; 0 draws them equally."""

    @classmethod
    def description_problems(cls) -> Iterator[str]:
        """See `PartConfig.description_problems`."""
        names = {field.name for field in fields(cls)}
        if not cls.limit_keys or not names.issuperset(cls.limit_keys):
            yield f"limit_keys is {cls.limit_keys}, expected the names of its settings that are limits in tokens"
        if unknown := set(cls.modes) - set(MODES):
            yield f"modes has {', '.join(sorted(unknown))}, expected some of {', '.join(MODES)}"

    @property
    def pooled(self) -> bool:
        """Whether its samples come in groups that are embedded (else they carry labels)."""
        return self.objective_kind is ObjectiveKind.EMBEDDING

    @property
    def scored(self) -> bool:
        """Whether a sample's labels count as a whole, with a control beside each."""
        return self.objective_kind is ObjectiveKind.SEQUENCE

    @property
    def group_size(self) -> int:
        """Samples that one draw of one group yields."""
        return 1

    @property
    def one_source_per_batch(self) -> bool:
        """Whether all groups of a batch come from one source, so that a group's negatives are of its own kind."""
        return self.pooled

    @property
    def is_flowing(self) -> bool:
        """Whether rows of its sources are read along while training."""
        return any(source.flows for source in self.sources)

    @property
    def longest_sample(self) -> int:
        """The limit of its longest sample, in tokens."""
        return max(getattr(self, key) for key in self.limit_keys)

    @property
    def tokens_per_group(self) -> int:
        """Upper bound of the tokens of one group: every sample at its limit."""
        return self.group_size * self.longest_sample

    @property
    def tokens_per_step(self) -> int:
        """Upper bound of the tokens of one step over all ranks."""
        return self.batch_size * self.tokens_per_group

    @property
    def embedding_limits(self) -> tuple[int, int]:
        """Limits of a query and of a document, in tokens, for measuring retrieval."""
        return self.longest_sample, self.longest_sample

    def problems(self, path: str) -> Iterator[str]:
        """What is wrong with a stream, its sources and its objective, one sentence each; `path` is its key."""
        if not self.sources:
            yield f"{path}.sources: is empty; choose data=... that offers such rows, or give {path}.sources=FILE."
        for index, source in enumerate(self.sources):
            yield from source.problems(f"{path}.sources.{index}")
            if (source.instruction or source.document_instruction) and not self.instructed:
                yield f"{path}.sources.{index}.instruction: only pairs have instructions, got format {self.format}."
        yield from self._flow_problems(path)
        yield from choice(f"{path}.attention", self.attention, ATTENTIONS)
        if self.attention in ATTENTIONS and self.attention not in self.attentions:
            yield (
                f"{path}.attention: format {self.format} cannot use '{self.attention}': its tokens would see what they must "
                f"predict, or it has no prompt of its own. Possible: {', '.join(self.attentions)}."
            )
        yield from at_least(f"{path}.batch_size", self.batch_size, 1)
        for key in self.limit_keys:
            yield from at_least(f"{path}.{key}", getattr(self, key), 4)
        if not 0 <= self.source_temperature <= 1:
            yield f"{path}.source_temperature: got {self.source_temperature}, expected 0 to 1."
        yield from self.objective.problems(f"{path}.objective", self)

    def _flow_problems(self, path: str) -> Iterator[str]:
        flowing = [source.flows for source in self.sources]
        if any(flowing) and not self.can_flow:
            index = flowing.index(True)
            yield (
                f"{path}.sources.{index}.streaming: rows can be read along while training only as running text, got format "
                f"{self.format}; set limit, to read the first rows of a Hub data set."
            )
        elif any(flowing) and not all(flowing):
            index = flowing.index(False)
            yield f"{path}.sources.{index}.streaming: got false; set it for all sources of a stream (and no limit) or for none."

    def run_problems(self, path: str, run: RunFacts) -> Iterator[str]:
        """What is wrong with this stream in this run; `problems` has what concerns the stream alone."""
        yield from self.objective.run_problems(f"{path}.objective", run)

    def run_notices(self, name: str, run: RunFacts) -> Iterator[str]:
        """What is allowed in this run but rarely meant; `name` is the stream's."""
        if self.longest_sample > run.token_budget:
            yield (
                f"packing.token_budget={run.token_budget} is below stream {name}'s limit of {self.longest_sample} "
                "tokens: longer samples get a pack of their own."
            )

    @classmethod
    def rehearsal_changes(
        cls, values: Mapping[str, Any], sizes: RehearsalSizes, *, own_data: bool
    ) -> Iterator[tuple[str, Any]]:
        """Settings that a rehearsal changes, unless they were given on the command line.

        Args:
            values: the stream's plain settings.
            sizes: of the rehearsal.
            own_data: whether the recipe's sources are kept; else the built-in rows take their place.

        Yields:
            (key, value).
        """
        if isinstance(size := values.get("batch_size", 32), int) and size > sizes.groups:
            yield "batch_size", sizes.groups
        for key in cls.limit_keys:
            yield key, sizes.tokens
