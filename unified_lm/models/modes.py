"""States of a model for a while: evaluation mode, with every submodule's own mode restored afterwards, and whole parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch import nn

GatherParameters = Callable[[Sequence[nn.Parameter]], AbstractContextManager[None]]
"""Parameters -> a context in which they hold their whole values on every rank. Collective."""


def no_gathering(_: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
    """The `GatherParameters` of ranks that hold whole parameters."""
    return nullcontext()


@contextmanager
def evaluation_mode(*parts: object) -> Iterator[None]:
    """Evaluation mode for every module among `parts`, or behind a bound method.

    Each submodule gets its own mode back: a wrapper is often in training mode around a model that evaluates.
    """
    owners = [getattr(part, "__self__", part) for part in parts]
    modes = [(module, module.training) for owner in owners if isinstance(owner, nn.Module) for module in owner.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, was_training in modes:
            module.training = was_training
