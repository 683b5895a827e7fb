"""Whether a format yields what its description says."""

from __future__ import annotations

from collections.abc import Sequence

from unified_lm.batch.sample import Sample
from unified_lm.config.streams import StreamConfig
from unified_lm.core.errors import ConfigError


def check_samples(name: str, config: StreamConfig, samples: Sequence[Sample]) -> None:
    """Compare the samples of one draw with the facts of their format.

    Args:
        name: the stream's.
        config: the description that says what the samples are.
        samples: of one row.

    Raises:
        ConfigError: they contradict each other. Trained on, such samples would be left out of the loss without a word.
    """
    said = f"{type(config).__name__}.objective_kind is {config.objective_kind.name}"
    problem = None
    if not samples:
        problem = "the first row yields no sample"
    elif config.pooled:
        if any(sample.pool is None for sample in samples):
            problem = f"{said}, so every sample must have a pool span, and {sum(s.pool is None for s in samples)} have none"
        elif [sample.slot for sample in samples] != list(range(config.group_size)):
            problem = (
                f"{type(config).__name__}.group_size is {config.group_size}, and a row yields samples with the slots "
                f"{[sample.slot for sample in samples]}"
            )
    elif any(sample.pool is not None for sample in samples):
        problem = f"{said}, so no sample may have a pool span"
    elif all(sample.labels is None for sample in samples):
        problem = f"{said}, so samples must have labels, and none has"
    elif config.scored and all(sample.sequence is None for sample in samples):
        problem = f"{said}, so samples must carry a SequenceLabel, and none does"
    if problem is not None:
        raise ConfigError(
            f"streams.{name}.format: {config.format} contradicts its description: {problem}. Mend `samples` of the format, or "
            "the facts of its `Config`."
        )
