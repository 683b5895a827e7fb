"""Statistics that a training changes beside its parameters, as buffers: part of a checkpoint as weights are.

A module names them in `trained_buffers` (MONET's routers do). They are small, and whole on every rank.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from unified_lm.core.errors import CheckpointError
from unified_lm.engine.backends.optimizer import BUFFER, StateReader


def trained_buffers(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The buffers, under their names in a saved state."""
    for path, part in module.named_modules():
        for name in getattr(part, "trained_buffers", ()):
            yield f"{BUFFER}{path}.{name}", part.get_buffer(name)


@torch.no_grad()
def load_buffers(module: nn.Module, read: StateReader) -> None:
    """Give buffers the values of a saved state.

    Args:
        module: what is trained.
        read: the saved state.

    Raises:
        CheckpointError: a buffer is missing, or has another shape.
    """
    for name, buffer in trained_buffers(module):
        if name not in read.names or read.shape(name) != tuple(buffer.shape):
            shape = list(buffer.shape)
            raise CheckpointError(f"the saved state has no {name} of shape {shape}. Resume with the recipe that wrote it.")
        buffer.copy_(read(name))
