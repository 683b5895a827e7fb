"""The settings of the contrastive objective."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from unified_lm.config.checks import above, choice
from unified_lm.config.objectives import EmbeddingObjectiveConfig, StreamFacts
from unified_lm.config.parts import RehearsalSizes


@dataclass(frozen=True, kw_only=True)
class ContrastiveConfig(EmbeddingObjectiveConfig):
    """InfoNCE over the positives and hard negatives of the whole global batch."""

    implementation: ClassVar[str] = "unified_lm.objectives.contrastive.Contrastive"
    leaves_out_missing: ClassVar[bool] = True

    name: str = "contrastive"
    """The objective."""
    temperature: float = 0.02
    """Cosine similarities are divided by it."""
    symmetric: bool = False
    """Also score every positive against all queries, and average both directions."""
    mask_same_text: bool = True
    """Leave out what is no negative by its text: the query itself, its positive, and other positives of the same query."""
    matryoshka_dims: tuple[int, ...] = ()
    """Average the loss over these leading dimensions, largest first; empty uses the whole vector."""
    gradient_scale: str = "exact"
    """"exact", or "inverse_world_size" to reproduce GritLM, whose gather shrinks the gradient by the world size."""
    reference_world_size: int | None = None
    """The world size that "inverse_world_size" divides by: that of the published run."""
    similarity_dtype: str = "float32"
    """"float32", or "bfloat16": vectors are normalized and multiplied in it (GRIT's precision ablation)."""

    def problems(self, path: str, stream: StreamFacts) -> Iterator[str]:
        """See `ObjectiveConfig.problems`."""
        yield from super().problems(path, stream)
        yield from above(f"{path}.temperature", self.temperature, 0)
        yield from choice(f"{path}.gradient_scale", self.gradient_scale, ("exact", "inverse_world_size"))
        yield from choice(f"{path}.similarity_dtype", self.similarity_dtype, ("float32", "bfloat16"))
        if self.matryoshka_dims and self.vectors != "hs":
            yield f"{path}.matryoshka_dims: leading dimensions are those of hidden states, and vectors is {self.vectors}."
        if self.gradient_scale == "inverse_world_size" and (self.reference_world_size or 0) < 1:
            yield f"{path}.reference_world_size: 'inverse_world_size' needs the world size of the published run."
        dims = self.matryoshka_dims
        if any(dim < 1 for dim in dims) or sorted(set(dims), reverse=True) != list(dims):
            yield f"{path}.matryoshka_dims: got {list(dims)}, expected different positive numbers, largest first."

    @classmethod
    def rehearsal_needs(cls, values: Mapping[str, Any], sizes: RehearsalSizes) -> Iterator[tuple[str, Any]]:
        """See `ObjectiveConfig.rehearsal_needs`: the tiny model has few dimensions."""
        if any(isinstance(dim, int) and dim > sizes.dimensions for dim in values.get("matryoshka_dims") or ()):
            yield "matryoshka_dims", [sizes.dimensions, sizes.dimensions // 2]
