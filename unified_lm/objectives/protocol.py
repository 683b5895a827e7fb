"""What an objective is: the three protocols that the engine knows.

A new objective is a class with one of these shapes and an attribute `Config` (its settings and facts), named in a recipe by a
dotted path, or listed in the table of `objectives/__init__.py`. It never touches a model: it sees hidden states or embeddings,
and returns a `LossTerm`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import torch

from unified_lm.batch import LossTerm, OutputHead, SequenceScores, Supervision


@runtime_checkable
class TokenObjective(Protocol):
    """A sum over supervised positions. Made from its `Config`, a `TokenObjectiveConfig`."""

    def __call__(self, hidden: torch.Tensor, head: OutputHead, supervision: Supervision) -> LossTerm:
        """One pack's share.

        Args:
            hidden: `[T, D]`, last hidden states of the pack (after the final norm), in the model's dtype.
            head: the output head.
            supervision: where, what and how much; its weights carry the normalization (`batch/normalization.py`).

        Returns:
            The weighted sum, and the number of supervised positions. The engine divides the sum over packs and ranks by
            `Batch.counts`.
        """
        ...


@runtime_checkable
class EmbeddingObjective(Protocol):
    """A loss over the embeddings of the global batch. Made from its `Config`, an `EmbeddingObjectiveConfig`.

    Attributes:
        metrics: numbers of the last call, by name, for the log: means over its queries.
    """

    @property
    def metrics(self) -> Mapping[str, float]:
        """Numbers of the last call."""
        ...

    def __call__(self, embeddings: torch.Tensor, text_ids: torch.Tensor | None = None) -> LossTerm:
        """The loss of a step.

        Args:
            embeddings: `[G, K, D]` float32 (or float64), not normalized, every group of the global batch in one order on all
                ranks: slot 0 query, 1 positive, 2 and up hard negatives. Ranks may hold different numbers of groups.
            text_ids: int64 `[G, K]`, hashes of the texts, 0 where unknown; None where nothing is known. `MISSING` (from slot 2
                on, and only where its `Config` says `leaves_out_missing`): there is no text, and the embedding must not count.

        Returns:
            The sum over queries, and G.
        """
        ...


@runtime_checkable
class SequenceObjective(Protocol):
    """A loss over log-probabilities of whole samples. Made from its `Config`, a `SequenceObjectiveConfig`.

    A step asks for it in two phases. First samples that are only scored (`Sample.is_control`) give the baseline, one number for
    all ranks; then every other sample's loss follows from its own scores and the baseline, pack by pack.
    """

    def baseline(self, log_ratios: torch.Tensor) -> torch.Tensor:
        """What samples are compared with in this step.

        Args:
            log_ratios: `[C]` float32, log policy - log reference of every control of the step, over all ranks; C may be 0.

        Returns:
            A float32 scalar without gradient.
        """
        ...

    def __call__(self, scores: SequenceScores) -> LossTerm:
        """The sum of some samples' losses, and their number. The engine divides the sum over all by `Batch.counts`.

        Args:
            scores: of the stream's samples in one pack.
        """
        ...

    def measure(self, scores: SequenceScores) -> Mapping[str, torch.Tensor]:
        """Numbers for the log, by name: each is the mean of a tensor `[n]`, and left out where n is 0.

        Args:
            scores: of every sample of the step over all ranks (in validation: of several steps), without gradient.
        """
        ...
