"""An objective tried on a small random batch before training, so that one that cannot work says so at once."""

from __future__ import annotations

import torch

from unified_lm.batch import LossTerm, OutputHead, SequenceScores, Supervision
from unified_lm.config.objectives import ObjectiveKind
from unified_lm.config.streams import StreamConfig
from unified_lm.core.errors import ConfigError, UserError
from unified_lm.core.random import RngState

_NUM = 3
"""Groups, positions or samples of the trial."""


def try_objective(name: str, stream: StreamConfig, objective: object, dim: int, device: torch.device) -> None:
    """Call an objective as a step would; the random state is afterwards as it was.

    Args:
        name: the stream's.
        stream: its settings, whose facts say what the objective is given.
        objective: what `build_objective` made.
        dim: dimensions of a hidden state, or of an embedding.
        device: where training runs.

    Raises:
        ConfigError: it raises, or does not return a finite `LossTerm`.
    """
    state = RngState.capture()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        given, arguments = _arguments(stream, objective, dim, device)
    try:
        if not callable(objective):
            raise TypeError("it cannot be called")
        term = objective(*arguments)
    except UserError:
        raise
    except Exception as error:
        raise ConfigError(
            f"streams.{name}.objective: {stream.objective.name} failed on {given}: {type(error).__name__}: {error}. "
            "Training would give it the same shapes."
        ) from error
    finally:
        state.restore()
    is_term = isinstance(term, LossTerm) and isinstance(term.sum, torch.Tensor) and term.sum.ndim == 0
    if not is_term or not bool(term.sum.detach().isfinite()):
        raise ConfigError(
            f"streams.{name}.objective: {stream.objective.name} returned {term!r} for {given}, expected a LossTerm with a "
            "finite scalar sum and a count."
        )


def _arguments(stream: StreamConfig, objective: object, dim: int, device: torch.device) -> tuple[str, tuple[object, ...]]:
    """What the objective is given, in words and as values."""
    if stream.objective.kind is ObjectiveKind.EMBEDDING:
        shape = (_NUM, stream.group_size, dim)
        ids = torch.arange(1, 1 + _NUM * stream.group_size, device=device).reshape(shape[:2])
        negatives = stream.group_size - 2
        text = f"{_NUM} groups of {stream.group_size} embeddings (query, positive, {negatives} hard negatives)"
        return text, (torch.randn(shape).to(device), ids)
    if stream.objective.kind is ObjectiveKind.TOKEN:
        head = OutputHead(weight=torch.randn(16, dim).to(device))
        positions = torch.arange(_NUM, device=device)
        supervision = Supervision(positions, positions + 1, torch.ones(_NUM, device=device), (_NUM,))
        return f"{_NUM} supervised positions of width {dim}", (torch.randn(_NUM + 1, dim).to(device), head, supervision)
    baseline = getattr(objective, "baseline", None)
    zero = baseline(torch.zeros(_NUM, device=device)) if callable(baseline) else torch.zeros((), device=device)
    desirable = torch.arange(_NUM, device=device) % 2 == 0
    scores = torch.randn(2, _NUM).to(device)
    return f"scores of {_NUM} samples", (SequenceScores(scores[0], scores[1], desirable, zero.expand(_NUM)),)
