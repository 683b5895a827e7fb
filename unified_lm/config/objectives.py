"""What every objective says about itself. Each kind's own settings stand beside its loss (`objectives/*_config.py`)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar, Protocol

from unified_lm.config.checks import choice
from unified_lm.config.parts import PartConfig, RehearsalSizes, RunFacts

NORMALIZATIONS = ("token", "sample", "mixed", "sum_per_sample")
EMBEDDING_METHODS = ("hs", "rw", "moee_concat", "moee_sum")
"""What a vector is made of: hidden states, routing, both (`models.moee`)."""


class ObjectiveKind(Enum):
    """What an objective is computed from.

    Attributes:
        TOKEN: hidden states at supervised positions, pack by pack.
        EMBEDDING: pooled vectors of the whole global batch.
        SEQUENCE: log-probabilities of whole samples under the model and under a reference model.
    """

    TOKEN = "token"
    EMBEDDING = "embedding"
    SEQUENCE = "sequence"


class StreamFacts(Protocol):
    """What an objective may ask of the stream it belongs to, a `StreamConfig`."""

    @property
    def format(self) -> str:
        """Name of the format."""

    @property
    def batch_size(self) -> int:
        """Groups or samples of a step, over all ranks."""

    @property
    def group_size(self) -> int:
        """Samples of a group."""

    @property
    def objective_kind(self) -> ObjectiveKind:
        """What kind of objective trains its samples."""

    @property
    def hides_tokens(self) -> bool:
        """Whether the tokens to predict are hidden from the model."""


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig(PartConfig):
    """What a stream's samples are trained for."""

    selector: ClassVar[str] = "name"
    role: ClassVar[str] = "objective"
    required: ClassVar[tuple[str, ...]] = ("kind",)
    kind: ClassVar[ObjectiveKind]
    """What it is computed from; given by the base class of the kind."""
    uses_logits: ClassVar[bool] = True
    """Whether it reads the output head."""

    name: str
    """A name of the table `unified_lm.objectives.OBJECTIVES`, or the dotted path of a class."""
    weight: float = 1.0
    """Factor of this term in the total loss."""

    @classmethod
    def description_problems(cls) -> Iterator[str]:
        """See `PartConfig.description_problems`: each kind has settings that the engine reads."""
        base = _BASES.get(cls.kind)
        if base is None or not issubclass(cls, base):
            expected = "one of ObjectiveKind" if base is None else f"a subclass of {base.__name__}"
            yield f"kind is {cls.kind!r}, so it must be {expected}"

    @property
    def router_balance(self) -> float:
        """Factor of the router balance over the stream's tokens; 0 where routers are not balanced."""
        return 0.0

    @property
    def coupled(self) -> tuple[str, ...]:
        """Dotted paths of the coupled terms (`engine.coupled.CoupledTerm`) that the stream takes part in."""
        return ()

    def needs_reference_scores(self, has_adapters: bool) -> bool:
        """Whether all rows are scored by the initial weights before the first step.

        Args:
            has_adapters: whether switching adapters off shows the initial weights instead.
        """
        return False

    def batch_bytes(self, num_groups: int, group_size: int, dim: int) -> int:
        """Bytes on every rank that grow with the step's batch and belong to no pack: gathered vectors, scores.

        Args:
            num_groups: of the step, over all ranks.
            group_size: samples of a group.
            dim: dimensions of an embedding.
        """
        return 0

    def problems(self, path: str, stream: StreamFacts) -> Iterator[str]:
        """What is wrong with the settings, and with this objective for this stream, one sentence each.

        Args:
            path: the objective's key, as "streams.embedding.objective".
            stream: whose objective it is.
        """
        if not math.isfinite(self.weight) or self.weight < 0:
            yield f"{path}.weight: got {self.weight}, expected a number of at least 0."
        if self.kind is not stream.objective_kind:
            yield (
                f"{path}.name: format {stream.format} is trained by an objective over {_OVER[stream.objective_kind]}, and "
                f"{self.name} is one over {_OVER[self.kind]}."
            )

    def run_problems(self, path: str, run: RunFacts) -> Iterator[str]:
        """What is wrong with this objective in this run; `problems` has what concerns the stream alone."""
        yield from ()

    @classmethod
    def rehearsal_changes(cls, values: Mapping[str, Any], sizes: RehearsalSizes) -> Iterator[tuple[str, Any]]:
        """Settings that a rehearsal changes, unless they were given on the command line.

        Args:
            values: the objective's plain settings.
            sizes: of the rehearsal; `groups` is the batch of this stream.

        Yields:
            (key, value).
        """
        yield from ()

    @classmethod
    def rehearsal_needs(cls, values: Mapping[str, Any], sizes: RehearsalSizes) -> Iterator[tuple[str, Any]]:
        """Settings that the tiny model cannot do without, even where others were given; arguments as `rehearsal_changes`."""
        yield from ()


_OVER = {
    ObjectiveKind.TOKEN: "tokens",
    ObjectiveKind.EMBEDDING: "embeddings",
    ObjectiveKind.SEQUENCE: "scores of whole samples",
}


@dataclass(frozen=True, kw_only=True)
class TokenObjectiveConfig(ObjectiveConfig):
    """An objective over supervised positions."""

    kind: ClassVar[ObjectiveKind] = ObjectiveKind.TOKEN
    predicts_hidden: ClassVar[bool] = False
    """Whether the predicted tokens are hidden from the model: then a bidirectional sample may be trained."""

    normalization: str = "token"
    """"token", "sample", "mixed" (GritLM's mean of micro-batch means) or "sum_per_sample" (GritLM's "token")."""
    micro_batch_size: int | None = None
    """Samples of one micro-batch under "mixed"."""
    router_aux_loss_coef: float = 0.0
    """Factor of the router balance over the stream's tokens (mixtures of experts), not scaled by `weight`."""
    router_uniformity_coef: float | None = None
    """MONET: factor of the uniformity of its routers' keys over the stream's tokens, not scaled by `weight`. None for this and
    the next leaves also the statistics as they are by which routers choose keys, as in fine-tuning; 0 does not."""
    router_ambiguity_coef: float | None = None
    """MONET: factor of the ambiguity of its routers, likewise."""

    @property
    def router_balance(self) -> float:
        """See `ObjectiveConfig.router_balance`."""
        return self.router_aux_loss_coef

    @property
    def _router_factors(self) -> dict[str, float]:
        names = ("router_aux_loss_coef", "router_uniformity_coef", "router_ambiguity_coef")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    @property
    def coupled(self) -> tuple[str, ...]:
        """See `ObjectiveConfig.coupled`; how often an expert is chosen is that of the whole step."""
        spread = self.router_uniformity_coef is not None or self.router_ambiguity_coef is not None
        return (
            *(["unified_lm.engine.router_balance.RouterBalance"] if self.router_aux_loss_coef else []),
            *(["unified_lm.engine.routing_spread.RoutingSpread"] if spread else []),
        )

    def problems(self, path: str, stream: StreamFacts) -> Iterator[str]:
        """See `ObjectiveConfig.problems`."""
        yield from super().problems(path, stream)
        yield from choice(f"{path}.normalization", self.normalization, NORMALIZATIONS)
        for name, factor in self._router_factors.items():
            if not math.isfinite(factor) or factor < 0:
                yield f"{path}.{name}: got {factor}, expected a number of at least 0."
        if stream.hides_tokens and not self.predicts_hidden:
            yield f"{path}.name: format {stream.format} hides the tokens to predict, which {self.name} does not expect."
        if self.predicts_hidden and not stream.hides_tokens:
            yield f"{path}.name: {self.name} predicts tokens that are hidden, and format {stream.format} hides none."
        if self.normalization == "mixed":
            if self.micro_batch_size is None or self.micro_batch_size < 1:
                yield f"{path}.micro_batch_size: 'mixed' needs the samples of one micro-batch (GritLM's 7B: 32)."
            elif stream.batch_size % self.micro_batch_size:
                yield (
                    f"{path}.micro_batch_size: got {self.micro_batch_size}, which does not divide the batch of "
                    f"{stream.batch_size} samples."
                )
        elif self.micro_batch_size is not None:
            yield f"{path}.micro_batch_size: only applies to normalization 'mixed', got '{self.normalization}'."

    def run_problems(self, path: str, run: RunFacts) -> Iterator[str]:
        """See `ObjectiveConfig.run_problems`."""
        for name, factor in self._router_factors.items():
            if (factor or name != "router_aux_loss_coef") and run.pads:
                off = "0" if name == "router_aux_loss_coef" else "null"
                yield (
                    f"{path}.{name}: the attention kernel mixes padding tokens into the router logits; choose another "
                    f"model.attention_kernel, or {off}."
                )

    @classmethod
    def rehearsal_changes(cls, values: Mapping[str, Any], sizes: RehearsalSizes) -> Iterator[tuple[str, Any]]:
        """See `ObjectiveConfig.rehearsal_changes`: a micro-batch is no larger than the small batch."""
        size = values.get("micro_batch_size")
        if isinstance(size, int) and size > sizes.groups:
            yield "micro_batch_size", sizes.groups


@dataclass(frozen=True, kw_only=True)
class EmbeddingObjectiveConfig(ObjectiveConfig):
    """An objective over the pooled vectors of the whole global batch."""

    kind: ClassVar[ObjectiveKind] = ObjectiveKind.EMBEDDING
    uses_logits: ClassVar[bool] = False
    leaves_out_missing: ClassVar[bool] = False
    """Whether places of a group without a text (`MISSING` among the text ids) are in no sum: rows may lack hard negatives."""

    vectors: str = "hs"
    """What is compared: hidden states ("hs"), or, of a mixture of experts, its routing ("rw") or both ("moee_concat",
    "moee_sum"). The export embeds so."""
    alpha: float | None = None
    """Weight of the routing in "moee_sum"; None is 1."""

    @property
    def coupled(self) -> tuple[str, ...]:
        """See `ObjectiveConfig.coupled`."""
        if self.vectors == "hs":
            return ("unified_lm.engine.embedding_term.EmbeddingTerm",)
        return ("unified_lm.engine.routed_embedding.RoutedEmbeddingTerm",)

    def batch_bytes(self, num_groups: int, group_size: int, dim: int) -> int:
        """See `ObjectiveConfig.batch_bytes`: float32 vectors and a matrix of scores, each with its gradient."""
        documents = num_groups * (group_size - 1)
        return 2 * 4 * (num_groups * group_size * dim + num_groups * documents)

    def problems(self, path: str, stream: StreamFacts) -> Iterator[str]:
        """See `ObjectiveConfig.problems`."""
        yield from super().problems(path, stream)
        if stream.batch_size < 2:
            owner = path.rpartition(".")[0]
            yield f"{owner}.batch_size: got {stream.batch_size}; {self.name} training needs at least 2 groups."
        yield from choice(f"{path}.vectors", self.vectors, EMBEDDING_METHODS)
        if self.alpha is not None and (not math.isfinite(self.alpha) or self.alpha < 0):
            yield f"{path}.alpha: got {self.alpha}, expected a number of at least 0."
        if self.alpha is not None and self.vectors != "moee_sum":
            yield f"{path}.alpha: only applies to vectors=moee_sum, got {self.vectors}."

    def run_problems(self, path: str, run: RunFacts) -> Iterator[str]:
        """See `ObjectiveConfig.run_problems`."""
        yield from super().run_problems(path, run)
        if self.vectors != "hs" and run.pads:
            yield (
                f"{path}.vectors: the attention kernel mixes padding tokens into the router logits; choose another "
                "model.attention_kernel, or hs."
            )


@dataclass(frozen=True, kw_only=True)
class SequenceObjectiveConfig(ObjectiveConfig):
    """An objective over log-probabilities of whole samples, beside those under a reference model."""

    kind: ClassVar[ObjectiveKind] = ObjectiveKind.SEQUENCE

    reference: str = "auto"
    """Where the reference's log-probabilities come from: "adapter_off" (LoRA), "cached" (all rows scored before training),
    or "auto" (adapter_off where there is a LoRA, else cached)."""

    @property
    def coupled(self) -> tuple[str, ...]:
        """See `ObjectiveConfig.coupled`."""
        return ("unified_lm.engine.sequences.SequenceScoring",)

    def needs_reference_scores(self, has_adapters: bool) -> bool:
        """See `ObjectiveConfig.needs_reference_scores`."""
        return self.reference == "cached" or (self.reference == "auto" and not has_adapters)

    def problems(self, path: str, stream: StreamFacts) -> Iterator[str]:
        """See `ObjectiveConfig.problems`."""
        yield from super().problems(path, stream)
        yield from choice(f"{path}.reference", self.reference, ("auto", "adapter_off", "cached"))

    def run_problems(self, path: str, run: RunFacts) -> Iterator[str]:
        """See `ObjectiveConfig.run_problems`."""
        if self.reference == "adapter_off" and not run.has_adapters:
            yield f"{path}.reference: 'adapter_off' needs adapters, and lora is none; use lora=all_linear, or reference=cached."


_BASES = {
    ObjectiveKind.TOKEN: TokenObjectiveConfig,
    ObjectiveKind.EMBEDDING: EmbeddingObjectiveConfig,
    ObjectiveKind.SEQUENCE: SequenceObjectiveConfig,
}
"""Per kind the class that its descriptions extend."""
