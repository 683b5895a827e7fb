"""Objectives over embeddings as a coupled term: the gradient of each embedding, known before the first backward.

A contrastive loss compares every embedding of the step, over all ranks, with all others. Embeddings are small, so the whole
loss is computed at once on those of graph-free forwards. Its gradient with respect to this rank's embeddings is from then on a
constant, and a pack's share is the inner product of its embeddings with their part of it (GradCache, `engine.step`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch

from unified_lm.batch import Batch, Pack
from unified_lm.core import distributed
from unified_lm.engine.coupled import CoupledTerm, Recompute, TermParts, TermReport
from unified_lm.engine.training_module import PackOutput
from unified_lm.objectives.protocol import EmbeddingObjective


class EmbeddingTerm(CoupledTerm):
    """The embedding objectives of one run, and what they know about the present step.

    Args:
        objectives: per contrastive stream its objective.
        weights: per stream the factor of its loss; other streams may have one too.
    """

    recompute: ClassVar[Recompute] = Recompute.OWN

    def __init__(self, objectives: Mapping[str, EmbeddingObjective], weights: Mapping[str, float]) -> None:
        self.objectives = objectives
        self.streams = objectives.keys()
        self.weights = weights
        self._gradients: dict[Pack, torch.Tensor] = {}
        self._report = TermReport()

    def vectors(self, output: PackOutput) -> torch.Tensor:
        """What is compared, `[E, D]` in the order of `Pack.pool_spans`. A subclass may take it from a readout."""
        return output.embeddings

    @classmethod
    def make(cls, parts: TermParts) -> CoupledTerm:
        """See `CoupledTerm.make`."""
        return cls(parts.objectives, parts.weights)

    def couple(self, batch: Batch, seen: Sequence[tuple[Pack, PackOutput]]) -> None:
        """The loss over the global batch, and its gradient with respect to the vectors of every pack."""
        packs, vectors = [pack for pack, _ in seen], [self.vectors(output) for _, output in seen]
        gradients = [torch.zeros_like(of_pack) for of_pack in vectors]
        losses: dict[str, float] = {}
        metrics: dict[str, float] = {}
        for stream, objective in self.objectives.items():
            rows = [_rows_of(pack, stream) for pack in packs]
            local = _collect(vectors, rows, batch.num_groups.get(stream, 0), batch.group_sizes.get(stream, 0))
            losses[stream], gradient, measured = contrastive_gradient(local, batch.text_ids.get(stream), objective)
            metrics |= {f"{stream}/{name}": value for name, value in measured.items()}
            if not len(gradient):
                continue
            # The inner product of `share` is finite where only the loss is not, so the gradient says it: the update is skipped.
            flat = gradient.flatten(0, 1) * (self.weights[stream] if math.isfinite(losses[stream]) else math.nan)
            for (at, filled), target in zip(rows, gradients, strict=True):
                target[at] = flat[filled].to(target.dtype)
        self._gradients = dict(zip(packs, gradients, strict=True))
        self._report = TermReport(losses, metrics=metrics)

    def share(self, pack: Pack, output: PackOutput) -> torch.Tensor | None:
        """The inner product of a pack's vectors with the gradient of the step's loss: its own gradient is exactly that."""
        gradient = self._gradients.get(pack)
        return None if gradient is None else (self.vectors(output) * gradient).sum()

    def finish(self) -> TermReport:
        """Losses by stream, and the objectives' metrics."""
        self._gradients = {}
        return self._report


def _rows_of(pack: Pack, stream: str) -> tuple[list[int], list[int]]:
    """Where a stream's vectors lie: indices within the pack, and rows of the stream's matrix on this rank."""
    at = [index for index, name in enumerate(pack.pool_streams) if name == stream]
    return at, [pack.pool_rows[index] for index in at]


def _collect(
    vectors: Sequence[torch.Tensor], rows: Sequence[tuple[list[int], list[int]]], groups: int, size: int
) -> torch.Tensor:
    """This rank's vectors of one stream as `[G, K, D]`; `[0, 0, 0]` on a rank without any."""
    if not groups:
        return torch.zeros(0, 0, 0, device=distributed.local_device())
    local = vectors[0].new_empty(groups * size, vectors[0].shape[-1])
    for (at, filled), of_pack in zip(rows, vectors, strict=True):
        local[filled] = of_pack[at]
    return local.reshape(groups, size, -1)


def contrastive_gradient(
    local: torch.Tensor, text_ids: torch.Tensor | None, objective: EmbeddingObjective
) -> tuple[float, torch.Tensor, dict[str, float]]:
    """Loss over the embeddings of all ranks, and its gradient with respect to this rank's.

    Every rank evaluates the whole loss on gathered constants with its own slice as the free variable. The gradients of
    the ranks therefore add up to the gradient of the global loss: nothing shrinks with the world size.

    Args:
        local: `[G_rank, K, D]`; `[0, 0, 0]` on a rank without groups.
        text_ids: int64 `[G_rank, K]` or None.
        objective: takes the embeddings and text ids of the global batch.

    Returns:
        The mean loss, the gradient `[G_rank, K, D]`, and the objective's metrics.
    """
    shape = distributed.all_reduce_max(list(local.shape[1:]))
    if not shape[0]:  # no rank has a group of this stream
        return 0.0, local, {}
    if not len(local):
        local = local.new_zeros(0, *shape)
    ids = torch.zeros(local.shape[:2], dtype=torch.int64, device=local.device) if text_ids is None else text_ids
    parts, rank = distributed.all_gather_uneven(local)
    id_parts, _ = distributed.all_gather_uneven(ids.reshape(local.shape[:2]).contiguous())
    own = local.detach().requires_grad_()
    parts[rank] = own
    with torch.enable_grad():
        term = objective(torch.cat(parts), torch.cat(id_parts))
        (gradient,) = torch.autograd.grad(term.sum / term.count, own)
    return float(term.sum.detach()) / term.count, gradient, dict(objective.metrics)
