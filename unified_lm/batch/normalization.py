"""What a token loss is divided by: the weight of every label and the count of the step, known before any forward.

A token objective computes `sum_i w_i CE_i` over the packs of every rank and the engine divides the total by one count.
Both are decided here, from the data alone and over the *global* step batch of a stream, so that neither ranks, nor
accumulation, nor the split into packs changes the loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from enum import Enum

import numpy as np

from unified_lm.batch.sample import Sample
from unified_lm.core.errors import ConfigError
from unified_lm.core.tables import choose


class Normalization(Enum):
    """How the cross-entropies of a step become one number.

    Attributes:
        TOKEN: mean over all supervised tokens of the step. Long samples weigh more.
        SAMPLE: mean over samples of each sample's mean. Every sample weighs the same.
        MIXED: mean over micro-batches of each micro-batch's token mean: what GritLM's "mixed" loss amounts to on one
            micro-batch per device (GRIT, arXiv:2402.09906, section 2). Here the micro-batch size is written down, so the
            number of devices does not change the objective.
        SUM_PER_SAMPLE: sum over all supervised tokens divided by the number of samples, supervised or not: GritLM's
            "token" loss. It grows with the length of the answers, hence its factors such as 0.003.
    """

    TOKEN = "token"
    SAMPLE = "sample"
    MIXED = "mixed"
    SUM_PER_SAMPLE = "sum_per_sample"

    @classmethod
    def parse(cls, name: str) -> Normalization:
        """The scheme of that name.

        Raises:
            ConfigError: there is none.
        """
        return choose(cls, name, "normalization")


def normalize(samples: Sequence[Sample], scheme: str, micro_batch_size: int | None = None) -> tuple[list[Sample], float]:
    """Weigh the labels of one stream's samples of one global step batch.

    Args:
        samples: all samples of the stream in this step, over all ranks, in the order of the step. Those without any label
            keep their (absent) weights.
        scheme: name of a `Normalization`.
        micro_batch_size: samples of one micro-batch (consecutive ones), at least 1; needed by "mixed" and given to no
            other. The last micro-batch may be smaller and still weighs the same.

    Returns:
        The samples, in order, with `token_weights` (float32 `[T]`, constant within a sample), and the count that the
        weighted sum of the whole step is divided by. The count is 0 only where nothing is supervised (or, under
        "sum_per_sample", where there is no sample): the sum is then 0 and the loss is 0 by definition, see `divide`.

    Raises:
        ConfigError: unknown scheme, or `micro_batch_size` missing, below 1, or given where it has no effect.
    """
    kind = Normalization.parse(scheme)
    _check_micro_batch_size(kind, micro_batch_size)
    supervised = np.array([sample.num_supervised for sample in samples], dtype=np.int64)
    weights = np.ones(len(samples))
    if kind is Normalization.TOKEN:
        count = float(supervised.sum())
    elif kind is Normalization.SUM_PER_SAMPLE:
        count = float(len(samples))
    else:
        size = 1 if kind is Normalization.SAMPLE else micro_batch_size
        assert size is not None
        member_of = np.arange(len(samples)) // size
        tokens = np.bincount(member_of, weights=supervised) if len(samples) else np.zeros(0)
        weights = 1.0 / np.maximum(tokens, 1.0)[member_of]
        count = float((tokens > 0).sum())
    return [_weighted(sample, weight) for sample, weight in zip(samples, weights.tolist(), strict=True)], count


def divide(total: float, count: float) -> float:
    """`total / count`, and 0 where the count is 0: a step without supervision has no loss (GritLM's "mixed" gives NaN)."""
    return total / count if count else 0.0


def _check_micro_batch_size(kind: Normalization, micro_batch_size: int | None) -> None:
    if kind is not Normalization.MIXED:
        if micro_batch_size is not None:
            raise ConfigError(
                f"micro_batch_size={micro_batch_size} has no effect with normalization '{kind.value}'. "
                "Remove it, or use normalization 'mixed'."
            )
        return
    if micro_batch_size is None or micro_batch_size < 1:
        raise ConfigError(
            f"normalization 'mixed' needs micro_batch_size, an integer of at least 1; got {micro_batch_size}. "
            "Set it to the samples per device of the run to reproduce (GRIT 7B: 32)."
        )


def _weighted(sample: Sample, weight: float) -> Sample:
    if not sample.num_supervised:
        return sample
    return replace(sample, token_weights=np.full(len(sample), weight, dtype=np.float32))
