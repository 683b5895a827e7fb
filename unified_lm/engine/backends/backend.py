"""How gradients of several packs and ranks become one update. The engine knows backends only through the protocol `Backend`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import nn

from unified_lm.batch import Pack
from unified_lm.config.schema import OptimConfig, ParallelConfig
from unified_lm.core import distributed
from unified_lm.core.errors import ConfigError
from unified_lm.engine.backends.deepspeed import DeepSpeedBackend, check_available
from unified_lm.engine.backends.optimizer import MasterAdamW, StateReader
from unified_lm.engine.training_module import PackOutput, TrainingModule


class Backend(Protocol):
    """What training needs from a group of ranks: forward, backward, update, and optimizer state.

    The optimizer state has the same names and values for every backend and number of ranks, so a checkpoint written by one
    can be read by any other.

    Attributes:
        name: as in `ParallelConfig.backend`.
        equal_forwards: whether every rank must run the same number of forwards, with and without a graph.
    """

    name: str
    equal_forwards: bool

    def forward(self, pack: Pack, *, tokens: bool = True) -> PackOutput:
        """Run the module on one pack."""

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of a scalar loss to those of the step."""

    def update(self, learning_rate: float, max_grad_norm: float) -> float:
        """Sum gradients over ranks, clip by the global norm, step, clear.

        Returns:
            The global norm before clipping, over all ranks. If it is not finite, weights and moments are left unchanged and
            the gradients are cleared.
        """

    def optimizer_state(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Everything that a bit-exact resume needs, tensor by tensor.

        Collective: every rank iterates over all of them, in the same order. Each is whole, float32, and may be overwritten by
        the next one.

        Yields:
            "weight/NAME", "exp_avg/NAME", "exp_avg_sq/NAME", "step/NAME" (a scalar) for every trained parameter; before the
            first update only "weight/NAME".
        """

    def load_optimizer_state(self, read: StateReader) -> None:
        """Restore a saved state. Collective.

        Args:
            read: asked for the tensors in the order of `optimizer_state`; a rank that keeps a part asks for that part.

        Raises:
            CheckpointError: a trained weight is missing or has another shape.
        """

    def whole(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
        """Context in which these parameters hold their whole values on every rank. Collective."""

    def gathered(self, module: nn.Module, *, weights: bool = True) -> AbstractContextManager[None]:
        """Context in which a part of the trained module is an ordinary one on rank 0, with whole weights. Collective.

        Args:
            module: the part.
            weights: False leaves the weights as they are, and is not collective.
        """

    def close(self) -> None:
        """Release the module and remove the hooks around it; the backend cannot be used afterwards."""


class TorchBackend:
    """One process, or several that each hold the whole model.

    Gradients are summed over ranks once per optimizer step, after the last pack. Ranks may therefore have different numbers of
    packs and parameters that they do not use, and there is no average to undo. The price is that communication does not overlap
    with the last backward, as it does in torch's DistributedDataParallel.

    Args:
        trainable: on its device; every rank starts from rank 0's trained weights.
        config: optimizer settings.
    """

    equal_forwards = False

    def __init__(self, trainable: TrainingModule, config: OptimConfig) -> None:
        self.name = "ddp" if distributed.world_size() > 1 else "single"
        self.trainable = trainable
        self.optimizer = MasterAdamW(trainable.named_parameters(), config)
        self.optimizer.share_weights()

    def forward(self, pack: Pack, *, tokens: bool = True) -> PackOutput:
        """Run the module on one pack."""
        output: PackOutput = self.trainable(pack, tokens=tokens)
        return output

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of a scalar loss to those of the step."""
        loss.backward()

    def update(self, learning_rate: float, max_grad_norm: float) -> float:
        """Sum gradients over ranks, clip, step, clear; returns the global gradient norm before clipping."""
        self.optimizer.sum_gradients()
        norm = self.optimizer.norm()
        self.optimizer.clip(max_grad_norm, norm)
        norm_value = float(norm)  # waits for the device
        # The norm is of the summed gradients, so every rank makes the same decision.
        if math.isfinite(norm_value):
            self.optimizer.step(learning_rate)
        self.optimizer.zero_grad()
        return norm_value

    def optimizer_state(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Float32 weights and moments; every rank holds them all."""
        yield from self.optimizer.state_dict().items()

    def load_optimizer_state(self, read: StateReader) -> None:
        """Restore a saved state; every rank keeps, and so reads, all of it.

        Raises:
            CheckpointError: a trained weight is missing or has another shape.
        """
        self.optimizer.load_state(read)

    def whole(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
        """Nothing to gather: every rank holds whole weights."""
        return nullcontext()

    def gathered(self, module: nn.Module, *, weights: bool = True) -> AbstractContextManager[None]:
        """Nothing to gather: every rank holds whole weights."""
        return nullcontext()

    def close(self) -> None:
        """Nothing to release: the optimizer is freed together with the backend."""


def check_backend(parallel: ParallelConfig) -> None:
    """Check, before anything is loaded, that a backend fits this machine and the number of processes.

    Raises:
        ConfigError: it does not fit.
    """
    ranks = distributed.world_size()
    if parallel.backend == "single" and ranks > 1:
        raise ConfigError(f"parallel.backend is 'single' but torchrun started {ranks} processes. Use parallel.backend=ddp.")
    if parallel.backend == "ddp" and ranks == 1:
        raise ConfigError("parallel.backend is 'ddp' but there is one process. Start with torchrun, or use backend=auto.")
    if parallel.zero_stage is not None:
        check_available(parallel)


def make_backend(trainable: TrainingModule, optim: OptimConfig, parallel: ParallelConfig) -> Backend:
    """Create the backend that a run asks for.

    Raises:
        ConfigError: see `check_backend`.
    """
    check_backend(parallel)
    if parallel.zero_stage is not None:
        return DeepSpeedBackend(trainable, optim, parallel)
    return TorchBackend(trainable, optim)
