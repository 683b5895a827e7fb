"""Held-out loss per stream and held-out retrieval, without a trace in the training run.

The module is put into evaluation mode and back, and the random state is restored, so that a run with and without
validation takes the same steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from unified_lm.batch import Batch
from unified_lm.core import distributed
from unified_lm.core.random import RngState
from unified_lm.data.retrieval import RetrievalSet
from unified_lm.engine.routed_embedding import vectors_of
from unified_lm.engine.step import GradCacheStep, StepLosses
from unified_lm.engine.training_module import TrainingModule
from unified_lm.engine.validation_items import ItemScores
from unified_lm.models.embedding import embed_samples
from unified_lm.models.modes import evaluation_mode
from unified_lm.objectives.ranking import ndcg_per_query, recall_per_query


@contextmanager
def evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, and the random state as it was."""
    state = RngState.capture()
    try:
        with evaluation_mode(module), torch.no_grad():
            yield
    finally:
        state.restore()


@dataclass(frozen=True)
class HeldOut:
    """What one validation measured; the same on every rank.

    Attributes:
        items: by metric ("heldout/STREAM", "retrieval/ndcg@10", ...) the scores that its value is the mean of.
    """

    items: Mapping[str, ItemScores]

    @property
    def values(self) -> dict[str, float]:
        """The metrics."""
        return {name: scores.mean for name, scores in self.items.items()}


class Validator:
    """Measures a module on fixed held-out data.

    Args:
        trainable: what is measured.
        step: its losses of a batch, of those streams that have held-out rows.
        batches: returns an iterator over the held-out batches, the same ones at every call.
        retrieval: held-out retrieval, or None.
        token_budget: tokens of one forward.
        method: what vectors are made of (`models.moee`).
        alpha: weight of the routing in method "moee_sum".
    """

    def __init__(
        self,
        trainable: TrainingModule,
        step: GradCacheStep,
        batches: Callable[[], Iterator[Batch]],
        retrieval: RetrievalSet | None,
        token_budget: int,
        method: str = "hs",
        alpha: float = 1.0,
    ) -> None:
        self.trainable = trainable
        self.step = step
        self.batches = batches
        self.retrieval = retrieval
        self.token_budget = token_budget
        self.method = method
        self.alpha = alpha

    def __call__(self, *, both_masks: bool = False) -> HeldOut:
        """Measure.

        Args:
            both_masks: also read the same weights causally for retrieval ("retrieval_causal/..."): how much of the result
                is the mask.

        Returns:
            "heldout/STREAM" losses by batch, what coupled terms measure by sample as "heldout/STREAM/NAME", and
            "retrieval/ndcg@10", "retrieval/recall@1" by query.
        """
        with evaluating(self.trainable):
            items = {f"heldout/{name}": losses for name, losses in self._losses().items()}
            if self.retrieval is not None:
                items |= {f"retrieval/{name}": scores for name, scores in self.search(self.retrieval).items()}
                if both_masks:
                    causal = causal_set(self.retrieval)
                    items |= {f"retrieval_causal/{name}": scores for name, scores in self.search(causal).items()}
        return HeldOut(items)

    def _losses(self) -> dict[str, ItemScores]:
        device = distributed.local_device()
        losses: dict[str, list[float]] = {}
        counts: dict[str, list[float]] = {}
        steps: list[StepLosses] = []
        for batch in self.batches():
            measured = self.step.losses_only(batch.to(device))
            for name, loss in measured.by_stream.items():
                losses.setdefault(name, []).append(loss)
                counts.setdefault(name, []).append(batch.counts.get(name, 1.0))  # contrastive batches are of one size
            steps.append(measured)
        items = {name: ItemScores("batch", losses[name], counts[name]) for name in losses if sum(counts[name])}
        return items | {name: ItemScores("sample", values.tolist()) for name, values in self.step.items(steps).items()}

    def search(self, task: RetrievalSet) -> dict[str, ItemScores]:
        """nDCG@10 and recall@1 of cosine similarity between pooled vectors, by query."""
        pooling, head = vectors_of(self.trainable, self.method, self.alpha)
        vectors = embed_samples(
            self.trainable.hidden_states,
            [*task.queries, *task.documents],
            pooling,
            token_budget=self.token_budget,
            device=distributed.local_device(),
            normalize=True,
            projection=head,
        )
        queries, documents = vectors[: len(task.queries)], vectors[len(task.queries) :]
        scores = queries @ documents.T
        return {
            "ndcg@10": ItemScores("query", ndcg_per_query(scores, task.relevant, 10).tolist()),
            "recall@1": ItemScores("query", recall_per_query(scores, task.relevant, 1).tolist()),
        }


def causal_set(task: RetrievalSet) -> RetrievalSet:
    """The same task with every sample's mask causal."""
    return RetrievalSet(
        [replace(s, bidirectional=(0, 0)) for s in task.queries],
        [replace(s, bidirectional=(0, 0)) for s in task.documents],
        task.relevant,
    )
