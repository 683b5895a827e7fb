"""Contrastive learning over the whole global batch.

Legend: `batch/__init__.py`. Here also M documents (positives first, then all hard negatives), R rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import Enum
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from unified_lm.batch import MISSING, LossTerm
from unified_lm.core.errors import ConfigError, did_you_mean
from unified_lm.core.tables import choose
from unified_lm.objectives.contrastive_config import ContrastiveConfig

SCORE_BYTES = 2**20
"""Scores larger than this are computed in chunks of rows, each of which is computed again in the backward.

The whole matrix and what is derived from it take about four times its size while the last pack's graph is alive, at the very
peak of a step: 17 MiB for 1,024 pairs (5 MiB in chunks), some 512 MiB for 4,096 groups of three.
A chunk's work is next to nothing beside a model's forward.
"""
MIN_ROWS = 64
"""Rows of a chunk at least: fewer would read all documents too often. Their scores take no more than 64 dimensions of them."""


class GradientScale(Enum):
    """What the embeddings' gradient is multiplied by.

    Attributes:
        EXACT: nothing: the gradient of the loss.
        INVERSE_WORLD_SIZE: 1 / world size of the published run. GritLM gathers embeddings without gradient and lets the
            trainer average gradients over ranks, so that its contrastive gradient (not its loss) shrinks by the world size
            and its published settings contain that factor.
    """

    EXACT = "exact"
    INVERSE_WORLD_SIZE = "inverse_world_size"

    @classmethod
    def parse(cls, name: str) -> GradientScale:
        """The scale of that name.

        Raises:
            ConfigError: there is none.
        """
        return choose(cls, name, "gradient_scale")


class ContrastiveSums(NamedTuple):
    """Scalars summed over queries.

    Attributes:
        loss: cross-entropy in nats, with gradient.
        correct: queries that score their positive above every other document that counts, without gradient.
        positive: cosine with the positive, without gradient.
        negative: cosine with all other documents, without gradient.
    """

    loss: torch.Tensor
    correct: torch.Tensor
    positive: torch.Tensor
    negative: torch.Tensor


class Contrastive:
    """InfoNCE with hard negatives (van den Oord et al., arXiv:1807.03748, eq. 4; GRIT, arXiv:2402.09906, eq. 1).

    ``L = -sum_i log( exp(cos(q_i, p_i) / t) / sum_j exp(cos(q_i, d_j) / t) )``, d running over the positives and hard negatives
    of *every* query of the global batch. The temperature t divides (the GRIT paper prints a product, its code divides;
    LLM2Vec's scale of 50 is a temperature of 0.02). Runs in float32 (float64 for float64 embeddings) with autocast off; with
    `similarity_dtype` "bfloat16" vectors are rounded, normalized and multiplied in bfloat16, and the softmax stays in float32.

    Args:
        config: `temperature`, `symmetric`, `mask_same_text`, `matryoshka_dims`, `gradient_scale`, `reference_world_size`,
            `similarity_dtype`.
        score_bytes: the most that a chunk's scores may take; None: `SCORE_BYTES`, or `MIN_ROWS` rows where those are more.

    Raises:
        ConfigError: a temperature that is not positive, dimensions below 1, an unknown gradient scale or similarity type, or a
            scale by world size without a world size.
    """

    Config = ContrastiveConfig

    def __init__(self, config: ContrastiveConfig, *, score_bytes: int | None = None) -> None:
        if not config.temperature > 0:
            raise ConfigError(f"temperature: got {config.temperature}, expected a number above 0, such as 0.02.")
        if any(dim < 1 for dim in config.matryoshka_dims):
            raise ConfigError(f"matryoshka_dims: got {config.matryoshka_dims}, expected numbers of dimensions from 1.")
        self.temperature = config.temperature
        self.symmetric = config.symmetric
        self.mask_same_text = config.mask_same_text
        self.matryoshka_dims = config.matryoshka_dims
        self.similarity_dtype = _similarity_dtype(config.similarity_dtype)
        self.gradient_factor = _gradient_factor(config)
        self.score_bytes = score_bytes
        self._metrics: dict[str, torch.Tensor] = {}

    @property
    def metrics(self) -> Mapping[str, float]:
        """Of the last call (the longest of `matryoshka_dims`, query to document).

        "accuracy": share of queries that score their positive above all negatives; "positive_similarity" and
        "negative_similarity": mean cosine with the positive, and with all other documents. Reading waits for the device.
        """
        # One copy for all: each waits for the device.
        values = torch.stack(list(self._metrics.values())).tolist() if self._metrics else []
        return dict(zip(self._metrics, values, strict=True))

    def __call__(self, embeddings: torch.Tensor, text_ids: torch.Tensor | None = None) -> LossTerm:
        """See `EmbeddingObjective`.

        Args:
            embeddings: `[G, K, D]`, K at least 2; normalized here. G may be 0.
            text_ids: int64 `[G, K]` of the whole batch (all ranks); needed with `mask_same_text`, where 0 equals nothing, not
                even 0. A hard negative whose id is `MISSING` is in no sum.

        Returns:
            Sum over the G queries, and G.

        Raises:
            ConfigError: groups of one, more Matryoshka dimensions than the embeddings have, or `mask_same_text` without
                text ids.
        """
        num_groups, size, dim = embeddings.shape
        self._metrics = {}
        if num_groups == 0:
            return LossTerm(embeddings.sum(), 0.0)
        if size < 2:
            raise ConfigError(f"contrastive: groups need a query and a positive (2 samples or more), got groups of {size}.")
        if self.mask_same_text and text_ids is None:
            raise ConfigError("contrastive: mask_same_text needs the text ids of the batch, got none.")
        dims = self.matryoshka_dims or (dim,)
        if max(dims) > dim:
            raise ConfigError(f"matryoshka_dims: got {max(dims)}, but embeddings have only {dim} dimensions.")
        ids = text_ids if self.mask_same_text else None
        missing = None if text_ids is None else text_ids[:, 1:].T.flatten() == MISSING
        if missing is not None and not bool(missing.any()):
            missing = None
        with torch.autocast(embeddings.device.type, enabled=False):
            embeddings = embeddings.to(self.similarity_dtype or torch.promote_types(embeddings.dtype, torch.float32))
            losses = [self._loss(embeddings[..., :part], ids, missing, record=part == max(dims)) for part in dims]
            loss = torch.stack(losses).mean()
        if self.gradient_factor != 1.0:
            loss = loss * self.gradient_factor + loss.detach() * (1.0 - self.gradient_factor)
        return LossTerm(loss, float(num_groups))

    def _loss(
        self, embeddings_GKD: torch.Tensor, ids_GK: torch.Tensor | None, missing_M: torch.Tensor | None, *, record: bool
    ) -> torch.Tensor:
        query_GD, positive_GD = embeddings_GKD[:, 0], embeddings_GKD[:, 1]
        document_MD = embeddings_GKD[:, 1:].transpose(0, 1).flatten(0, 1)  # slot-major: the positive of query i is row i
        document_ids = None if ids_GK is None else ids_GK[:, 1:].T.flatten()
        own_ids = None if ids_GK is None else ids_GK[:, :2]
        forward = info_nce(query_GD, document_MD, self.temperature, own_ids, document_ids, self.score_bytes, missing_M)
        if record:
            self._record(forward, len(query_GD), len(document_MD) if missing_M is None else int((~missing_M).sum()))
        if not self.symmetric:
            return forward.loss
        query_ids = None if ids_GK is None else ids_GK[:, 0]
        swapped_ids = None if own_ids is None else own_ids.flip(1)
        backward = info_nce(positive_GD, query_GD, self.temperature, swapped_ids, query_ids, self.score_bytes)
        return (forward.loss + backward.loss) / 2

    def _record(self, sums: ContrastiveSums, num_queries: int, num_documents: int) -> None:
        self._metrics = {
            "accuracy": sums.correct / num_queries,
            "positive_similarity": sums.positive / num_queries,
        }
        if num_documents > 1:
            self._metrics["negative_similarity"] = sums.negative / (num_queries * (num_documents - 1))


def info_nce(
    queries: torch.Tensor,
    documents: torch.Tensor,
    temperature: float,
    own_ids: torch.Tensor | None = None,
    document_ids: torch.Tensor | None = None,
    score_bytes: int | None = None,
    missing: torch.Tensor | None = None,
) -> ContrastiveSums:
    """Cross-entropy of every query over all documents, query i's positive being document i.

    Args:
        queries: `[G, D]`, float32 or float64, normalized here.
        documents: `[M, D]`, M at least G: all positives, then any number of negatives; normalized here.
        temperature: cosines are divided by it; above 0.
        own_ids: int64 `[G, 2]`, text ids of each query and its positive; None compares no texts.
        document_ids: int64 `[M]`, text ids of the documents; the first G are those of the positives. See `_SameTexts` for what
            is left out of a query's sum.
        score_bytes: see `Contrastive`.
        missing: bool `[M]`, True for rows of `documents` that are none: they are in no sum. None: there is no such row.
    """
    same = None if own_ids is None or document_ids is None else _SameTexts(own_ids, document_ids)
    left_GD, right_MD = F.normalize(queries, dim=-1), F.normalize(documents, dim=-1)
    chunks = list(_row_chunks(len(left_GD), len(right_MD) * left_GD.element_size(), score_bytes))
    parts = []
    for rows in chunks:
        arguments = (left_GD[rows], right_MD, same, missing, rows.start, temperature)
        if len(chunks) > 1 and torch.is_grad_enabled():
            parts.append(checkpoint(_score_rows, *arguments, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(_score_rows(*arguments))
    return ContrastiveSums(*(torch.stack(values).sum() for values in zip(*parts, strict=True)))


def _score_rows(
    left_RD: torch.Tensor,
    right_MD: torch.Tensor,
    same: _SameTexts | None,
    missing_M: torch.Tensor | None,
    first: int,
    temperature: float,
) -> ContrastiveSums:
    """Sums over the rows `[first, first + R)` of the score matrix."""
    similarity_RM = left_RD @ right_MD.T
    similarity_RM = similarity_RM.to(torch.promote_types(similarity_RM.dtype, torch.float32))
    target_R = torch.arange(first, first + len(left_RD), device=left_RD.device)
    score_RM = similarity_RM / temperature
    if same is not None:
        score_RM = score_RM.masked_fill(same.excluded(target_R), -torch.inf)
    if missing_M is not None:
        similarity_RM, score_RM = similarity_RM.masked_fill(missing_M, 0.0), score_RM.masked_fill(missing_M, -torch.inf)
    loss = F.cross_entropy(score_RM, target_R, reduction="sum")
    with torch.no_grad():
        positive_R = similarity_RM.gather(1, target_R[:, None])[:, 0]
        chosen_R = score_RM.gather(1, target_R[:, None])[:, 0]
        rivals_R = score_RM.scatter(1, target_R[:, None], -torch.inf).amax(1)
        correct = (chosen_R > rivals_R).sum().to(loss.dtype)
        negative = similarity_RM.sum() - positive_R.sum()
    return ContrastiveSums(loss, correct, positive_R.sum(), negative)


class _SameTexts:
    """Which documents are no negatives of a query, by their texts; an id of 0 is unknown and equals nothing.

    A document is left out where it has the text of the query, of its positive, or of another positive of the same query
    anywhere in the batch (data with one row per answer), and where it is such a positive itself. Left and right may change
    places: the other queries of a shared positive are no negatives of it.

    Args:
        own_ids: int64 `[G, 2]`, text ids of each row and its target.
        document_ids: int64 `[M]`, of the columns; column i is the target of row i.
    """

    def __init__(self, own_ids: torch.Tensor, document_ids: torch.Tensor) -> None:
        self._left_G, self._ids_M = own_ids[:, 0], document_ids
        # Texts are numbered, so that a row's answers are a table of flags; it costs the same however often a query occurs.
        texts, numbers = torch.cat([own_ids[:, 1], document_ids]).unique(return_inverse=True)
        self._num_texts = len(texts)
        self._target_G, self._column_M = numbers[: len(own_ids)], numbers[len(own_ids) :]

    def excluded(self, rows_R: torch.Tensor) -> torch.Tensor:
        """Bool `[R, M]`, True where a column is left out of the sum of a row; never the row's own target."""
        left_R1 = self._left_G[rows_R][:, None]
        same_RG = (left_R1 == self._left_G) & (left_R1 != 0)
        same_RG = same_RG.scatter(1, rows_R[:, None], True)  # a row whose own text is unknown still knows its target
        answers_RU = torch.zeros(len(rows_R), self._num_texts, dtype=torch.int32, device=rows_R.device)
        answers_RU.scatter_add_(1, self._target_G.expand(len(rows_R), -1), same_RG.int())
        excluded_RM = answers_RU.index_select(1, self._column_M) > 0
        excluded_RM |= left_R1 == self._ids_M
        excluded_RM &= self._ids_M != 0
        excluded_RM[:, : same_RG.shape[1]] |= same_RG  # answers of the same query, also where their own texts are unknown
        return excluded_RM.scatter(1, rows_R[:, None], False)


def _row_chunks(num_rows: int, row_bytes: int, limit: int | None) -> Iterator[slice]:
    height = max(MIN_ROWS, SCORE_BYTES // max(1, row_bytes)) if limit is None else max(1, limit // max(1, row_bytes))
    for start in range(0, num_rows, height):
        yield slice(start, min(start + height, num_rows))


def _similarity_dtype(name: str) -> torch.dtype | None:
    """bfloat16, or None for the embeddings' own type, float32 at least."""
    if name not in ("float32", "bfloat16"):
        raise ConfigError(f"unknown similarity_dtype '{name}'.{did_you_mean(name, ('float32', 'bfloat16'))}")
    return torch.bfloat16 if name == "bfloat16" else None


def _gradient_factor(config: ContrastiveConfig) -> float:
    if GradientScale.parse(config.gradient_scale) is GradientScale.EXACT:
        return 1.0
    if config.reference_world_size is None or config.reference_world_size < 1:
        raise ConfigError(
            "gradient_scale 'inverse_world_size' needs reference_world_size, the number of devices of the run to reproduce "
            f"(GRIT 7B: 8); got {config.reference_world_size}."
        )
    return 1.0 / config.reference_world_size
