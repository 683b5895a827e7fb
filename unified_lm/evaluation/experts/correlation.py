"""Which experts go with a score of texts (how toxic they are, say): Pearson correlation over tokens, from streaming moments.

The weight of expert (i, j) for a token is w = sum over heads of g1[h, i] g2[h, j]. Sums of w and of w times the score are one
product of matrices each; the sum of squares is one for each pair of heads, `[E, T] @ [T, E]`, of g1[h] g1[k] and g2[h] g2[k].
No token's experts are ever listed. The score of a token is that of its text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from unified_lm.core.errors import DataError
from unified_lm.evaluation.experts.statistics import gates_of
from unified_lm.evaluation.generation.perplexity import Domain
from unified_lm.inference.unified import UnifiedLM
from unified_lm.models.monet.masks import ExpertMask, router_key, routers_of

_FORMAT = "unified_lm expert correlation 1"


@dataclass(frozen=True, eq=False)
class Correlation:
    """Correlation of each expert's weight with a score.

    Attributes:
        values: float32 `[G, E, E]`, from -1 to 1; 0 for experts that no token uses.
        tokens: that were read.
        texts: that were read.
        routers: `router_key` of the model.
    """

    values: np.ndarray
    tokens: int
    texts: int
    routers: str

    def mask_above(self, threshold: float, note: str) -> ExpertMask:
        """A mask that leaves out the experts whose correlation is above a threshold."""
        return ExpertMask(self.values <= threshold, self.routers, note)

    def save(self, path: Path) -> None:
        """Write it.

        Raises:
            OSError: it cannot be written.
        """
        about = {"tokens": self.tokens, "texts": self.texts, "routers": self.routers}
        save_file({"correlation": self.values}, path, {"format": _FORMAT, "about": json.dumps(about)})

    @classmethod
    def load(cls, path: Path) -> Correlation:
        """Read what `save` wrote.

        Raises:
            DataError: no such file, or another one.
        """
        try:
            with safe_open(path, framework="np") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise ValueError("a file of another format")
                about = json.loads(metadata["about"])
                values = file.get_tensor("correlation")
            return cls(values, int(about["tokens"]), int(about["texts"]), str(about["routers"]))
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            raise DataError(
                f"{path} holds no correlation of experts ({error}). `unified-lm experts correlate` writes it."
            ) from error


def score_correlation(
    model: UnifiedLM,
    texts: Domain,
    scores: Sequence[float],
    *,
    context: int,
    progress: Callable[[int], None] | None = None,
) -> Correlation:
    """Read texts causally, and correlate each expert's weight for a token with the score of the token's text.

    Args:
        model: a MONET model.
        texts: N of them.
        scores: `[N]`, one for each text, finite.
        context: tokens of a window; longer texts are read in several.
        progress: called with the number of tokens that were read since the last call.

    Raises:
        ModelError: the model is none.
        DataError: scores that are all equal, too many or too few, or a text without a token.
    """
    of_text = np.asarray(scores, np.float64)
    if of_text.shape != (len(texts.documents),) or not np.isfinite(of_text).all():
        raise DataError(f"{len(of_text)} scores for {len(texts.documents)} texts: expected a finite number for each.")
    if len(of_text) < 2 or of_text.std() == 0:
        raise DataError(f"the {len(of_text)} texts all have the same score: nothing can be correlated with it.")
    with model.borrow_backbone() as backbone:
        key, router = router_key(backbone.causal_lm), routers_of(backbone.causal_lm)[0]
    first, second = torch.triu_indices(router.heads, router.heads)
    twice = torch.where(first == second, 1.0, 2.0)
    sums = np.zeros(3)
    total: torch.Tensor | None = None
    for gates_NGSHE, places in gates_of(model, texts, context):
        s_N = of_text[[document for document, _ in places]] - of_text.mean()  # centered, for the sake of the sums
        sums += (len(s_N), s_N.sum(), np.square(s_N).sum())
        s_N = torch.from_numpy(s_N).to(gates_NGSHE)
        parts = []
        for group in range(gates_NGSHE.shape[1]):
            left_NHE, right_NHE = gates_NGSHE[:, group].unbind(1)
            left_PE = (left_NHE[:, first] * left_NHE[:, second] * twice.to(left_NHE)[:, None]).flatten(0, 1)
            right_PE = (right_NHE[:, first] * right_NHE[:, second]).flatten(0, 1)
            columns_E = right_NHE.flatten(0, 1)
            with_score = (left_NHE * s_N[:, None, None]).flatten(0, 1).t() @ columns_E
            parts.append(torch.stack([left_NHE.flatten(0, 1).t() @ columns_E, with_score, left_PE.t() @ right_PE]))
        of_pack = torch.stack(parts).double()
        total = of_pack if total is None else total.add_(of_pack)
        if progress is not None:
            progress(len(places))
    assert total is not None, "a domain has documents, and a document a token"
    count, score_sum, score_squares = sums
    w_GEE, ws_GEE, ww_GEE = total.cpu().unbind(1)
    covariance = ws_GEE / count - w_GEE / count * (score_sum / count)
    variance = (ww_GEE / count - (w_GEE / count).square()).clamp_min(0)
    deviation = (variance * (score_squares / count - (score_sum / count) ** 2)).sqrt()
    values = torch.where(deviation > 0, covariance / deviation.clamp_min(1e-300), 0.0).clamp(-1, 1)
    return Correlation(values.float().numpy(), int(count), len(of_text), key)
