"""Held-out loss per stream and held-out retrieval, without a trace in the training run.

The module is put into evaluation mode and back, and the random state is restored, so that a run with and without
validation takes the same steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from unified_lm.batch import Batch
from unified_lm.core import distributed
from unified_lm.core.random import RngState
from unified_lm.data.retrieval import RetrievalSet
from unified_lm.engine.step import GradCacheStep
from unified_lm.engine.trainable import Trainable
from unified_lm.models.embedding import embed_samples
from unified_lm.objectives.ranking import ndcg_at_k, recall_at_k


@contextmanager
def evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, and the random state as it was."""
    was_training = module.training
    state = RngState.capture()
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        module.train(was_training)
        state.restore()


class Validator:
    """Measures a module on fixed held-out data.

    Args:
        trainable: what is measured.
        step: its losses of a batch, of those streams that have held-out rows.
        batches: gives the held-out batches anew each time it is called, the same ones always.
        retrieval: held-out retrieval, or None.
        token_budget: tokens of one forward.
    """

    def __init__(
        self,
        trainable: Trainable,
        step: GradCacheStep,
        batches: Callable[[], Iterator[Batch]],
        retrieval: RetrievalSet | None,
        token_budget: int,
    ) -> None:
        self.trainable = trainable
        self.step = step
        self.batches = batches
        self.retrieval = retrieval
        self.token_budget = token_budget

    def __call__(self, *, both_masks: bool = False) -> dict[str, float]:
        """Measure.

        Args:
            both_masks: also read the same weights causally for retrieval ("retrieval_causal/..."): how much of the result
                is the mask.

        Returns:
            "heldout/STREAM" losses and "retrieval/ndcg@10", "retrieval/recall@1".
        """
        with evaluating(self.trainable):
            values = {f"heldout/{name}": loss for name, loss in self._losses().items()}
            if self.retrieval is not None:
                values |= {f"retrieval/{name}": v for name, v in self.search(self.retrieval).items()}
                if both_masks:
                    causal = causal_set(self.retrieval)
                    values |= {f"retrieval_causal/{name}": v for name, v in self.search(causal).items()}
        return values

    def _losses(self) -> dict[str, float]:
        device = distributed.local_device()
        sums: dict[str, float] = {}
        counts: dict[str, float] = {}
        for batch in self.batches():
            for name, loss in self.step.losses_only(batch.to(device)).by_stream.items():
                count = batch.counts.get(name, 1.0)  # contrastive batches are of one size
                sums[name] = sums.get(name, 0.0) + loss * count
                counts[name] = counts.get(name, 0.0) + count
        return {name: total / counts[name] for name, total in sums.items() if counts[name]}

    def search(self, task: RetrievalSet) -> dict[str, float]:
        """nDCG@10 and recall@1 of cosine similarity between pooled vectors."""
        vectors = embed_samples(
            self.trainable.hidden_states,
            [*task.queries, *task.documents],
            self.trainable.pooling,
            token_budget=self.token_budget,
            device=distributed.local_device(),
            normalize=True,
            projection=self.trainable.projection,
        )
        queries, documents = vectors[: len(task.queries)], vectors[len(task.queries) :]
        scores = queries @ documents.T
        return {"ndcg@10": ndcg_at_k(scores, task.relevant, 10), "recall@1": recall_at_k(scores, task.relevant, 1)}


def causal_set(task: RetrievalSet) -> RetrievalSet:
    """The same task with every sample's mask causal."""
    return RetrievalSet(
        [replace(s, bidirectional=(0, 0)) for s in task.queries],
        [replace(s, bidirectional=(0, 0)) for s in task.documents],
        task.relevant,
    )
