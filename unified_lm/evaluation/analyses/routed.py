"""Hidden states and routing of the same texts, and the vectors that are made of the two.

One forward gives both parts of a text; every method and weight is arithmetic from then on. Legend: N texts, D dimensions of a
hidden state, F experts of all layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from unified_lm.data.rows.records import Text
from unified_lm.evaluation.analyses.states import pooled_vectors
from unified_lm.inference.unified import UnifiedLM
from unified_lm.models.moee import moee_head
from unified_lm.models.standardizer import RunningMoments, Standardizer

MIN_TEXTS = 20
"""Minimum texts that statistics are fitted on here; an export requires more."""


@dataclass(frozen=True, eq=False)
class Parts:
    """What one forward says about some texts.

    Attributes:
        states: float32 `[N, D]`, pooled hidden states.
        routing: float32 `[N, F]`, pooled routing probabilities, layer by layer.
    """

    states: np.ndarray
    routing: np.ndarray

    def vectors(self, method: str, alpha: float = 1.0, standardizer: Standardizer | None = None) -> np.ndarray:
        """Unit vectors, float64 `[N, ...]`, as `UnifiedLM.encode` makes them of both parts.

        Args:
            method: one of `models.moee.METHODS`.
            alpha: weight of the routing in method "moee_sum".
            standardizer: of D + F dimensions, or None.
        """
        sizes = self.states.shape[1], self.routing.shape[1]
        both = np.concatenate([self.states, self.routing], axis=1)
        chosen = both[:, sizes[0] :] if method == "rw" else both[:, : sizes[0]] if method == "hs" else both
        vectors = torch.from_numpy(chosen)
        if method == "hs":
            vectors = vectors if standardizer is None else standardizer.part(0, sizes[0])(vectors)
        else:
            head = moee_head(method, alpha, sizes, standardizer)
            vectors = vectors if head is None else head(vectors)
        return torch.nn.functional.normalize(vectors.double(), dim=-1).numpy()


@contextmanager
def without_standardizer(model: UnifiedLM) -> Iterator[None]:
    """Context in which a model's vectors are not standardized."""
    own, model.standardizer = model.standardizer, None
    try:
        yield
    finally:
        model.standardizer = own


def embed_parts(model: UnifiedLM, texts: Sequence[str | Text], show_progress: bool = False) -> Parts:
    """Embed texts, each with its instruction, without the model's own standardizer.

    Raises:
        ModelError: the model is dense, or its routers are not understood.
    """
    features = model.embedder.routers.num_features  # refuses a dense model before anything is embedded
    given = [Text(text) if isinstance(text, str) else text for text in texts]
    with without_standardizer(model):
        both = pooled_vectors(model, given, show_progress, method="moee_concat")
    return Parts(both[:, :-features], both[:, -features:])


def fit_parts(parts: Parts) -> Standardizer:
    """Statistics of a reference corpus, that all methods share.

    Raises:
        DataError: fewer than `MIN_TEXTS` texts.
    """
    moments = RunningMoments()
    moments.update(np.concatenate([parts.states, parts.routing], axis=1))
    return Standardizer.fit(moments, MIN_TEXTS)


def prompted(model: UnifiedLM, template: str) -> UnifiedLM:
    """The same weights behind another template, read as the paper does: causal, from the last token.

    Args:
        model: not changed; its weights are shared.
        template: name of a template.
    """
    with model.borrow_backbone() as backbone:
        return UnifiedLM(
            backbone.causal_lm,
            model.prompt_encoder.tokenizer,
            template=template,
            pooling="last_token",
            attention="causal",
            projection=model.embedder.projection,
            max_tokens=model.max_tokens,
            attention_kernel=backbone.kernel,
        )
