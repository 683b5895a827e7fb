"""An objective tried on a small random batch before training, so that one that cannot work says so at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from unified_lm.batch import MISSING, LossTerm, OutputHead, SequenceScores, Supervision
from unified_lm.config.objectives import ObjectiveKind
from unified_lm.config.streams import StreamConfig
from unified_lm.core.errors import ConfigError, UserError
from unified_lm.core.random import RngState
from unified_lm.objectives import build_objective

_NUM = 3
"""Groups, positions or samples of the trial."""


def tried_objective(name: str, stream: StreamConfig, dim: int, device: torch.device) -> Any:
    """Make a stream's objective and do with it what a step does: call it, differentiate, read its numbers.

    The random state is afterwards as it was.

    Args:
        name: the stream's.
        stream: its settings, whose facts say what the objective is given.
        dim: dimensions of a hidden state, or of an embedding.
        device: where training runs.

    Raises:
        ConfigError: it cannot be made, raises, or does not return a finite `LossTerm` that can be differentiated.
    """
    state = RngState.capture()
    try:
        objective = build_objective(stream.objective)
        term = _TRIALS[stream.objective.kind](objective, stream, dim, device)
        if not (isinstance(term, LossTerm) and isinstance(term.sum, torch.Tensor) and term.sum.ndim == 0):
            raise TypeError(f"it returned {term!r}, expected a LossTerm with a scalar sum")
        if not bool(term.sum.detach().isfinite()):
            raise ValueError(f"its loss is {float(term.sum.detach())}")
    except UserError:
        raise
    except Exception as error:
        negatives = f" ({stream.group_size - 2} hard negatives)" if stream.pooled else ""
        raise ConfigError(
            f"streams.{name}.objective: {stream.objective.name} failed when it was tried on {_NUM} groups of "
            f"{stream.group_size}{negatives}, dimension {dim}: {type(error).__name__}: {error}. "
            "Training would give it the same shapes."
        ) from error
    finally:
        state.restore()
    return objective


def _try_embeddings(objective: Any, stream: StreamConfig, dim: int, device: torch.device) -> Any:
    shape = (_NUM, stream.group_size, dim)
    embeddings = torch.randn(shape, device=device, requires_grad=True)
    ids = torch.arange(1, 1 + _NUM * stream.group_size, device=device).reshape(shape[:2])
    lacks_one = getattr(stream.objective, "leaves_out_missing", False) and stream.group_size > 2
    if lacks_one:
        ids[-1, -1] = MISSING
    term = objective(embeddings, ids)
    (gradient,) = torch.autograd.grad(term.sum, embeddings)
    if lacks_one and bool(gradient[-1, -1].any()):
        raise ValueError("`leaves_out_missing` is true, and an embedding whose text id is MISSING has a gradient")
    if not isinstance(objective.metrics, Mapping):
        raise TypeError(f"`metrics` is {objective.metrics!r}, expected numbers by name")
    return term


def _try_tokens(objective: Any, stream: StreamConfig, dim: int, device: torch.device) -> Any:
    hidden = torch.randn(_NUM + 1, dim, device=device, requires_grad=True)
    positions = torch.arange(_NUM, device=device)
    supervision = Supervision(positions, positions + 1, torch.ones(_NUM, device=device), (_NUM,))
    term = objective(hidden, OutputHead(weight=torch.randn(16, dim, device=device)), supervision)
    torch.autograd.grad(term.sum, hidden)
    return term


def _try_scores(objective: Any, stream: StreamConfig, dim: int, device: torch.device) -> Any:
    policy = torch.randn(_NUM, device=device, requires_grad=True)
    desirable = torch.arange(_NUM, device=device) % 2 == 0
    baseline = objective.baseline(torch.randn(_NUM, device=device)).detach().expand(_NUM)
    scores = SequenceScores(policy, torch.randn(_NUM, device=device), desirable, baseline)
    term = objective(scores)
    torch.autograd.grad(term.sum, policy)
    objective.measure(scores)
    return term


_TRIALS = {
    ObjectiveKind.EMBEDDING: _try_embeddings,
    ObjectiveKind.TOKEN: _try_tokens,
    ObjectiveKind.SEQUENCE: _try_scores,
}
