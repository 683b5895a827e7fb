"""How gradients of several packs and ranks become one update. The engine knows a backend only by this protocol."""

from __future__ import annotations

from typing import Protocol

import torch

from unified_lm.batch import Pack
from unified_lm.config.schema import OptimConfig, ParallelConfig
from unified_lm.core import distributed
from unified_lm.core.errors import ConfigError
from unified_lm.engine.optimizer import MasterAdamW
from unified_lm.engine.trainable import PackOutput, Trainable

_BUCKET_ELEMENTS = 16 * 1024 * 1024  # 64 MiB of float32: few collectives, and no second copy of all gradients


class Backend(Protocol):
    """What a step needs: forward a pack, add a gradient, take the update."""

    optimizer: MasterAdamW

    def forward(self, pack: Pack, *, tokens: bool = True) -> PackOutput:
        """Run the module on one pack."""

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of a scalar; nothing is communicated yet."""

    def update(self, learning_rate: float, max_grad_norm: float) -> float:
        """Sum gradients over ranks, clip by the global norm, step, clear. Returns the norm before clipping."""


class TorchBackend:
    """One process, or several that each hold the whole model.

    Ranks add up their gradients once per optimizer step, after the last pack: any number of packs per rank, no unused
    parameters to declare, no averaging to undo. (What it does not do is overlap communication with the last backward.)

    Args:
        trainable: on its device; every rank starts from rank 0's trained weights.
        config: optimizer settings.
    """

    def __init__(self, trainable: Trainable, config: OptimConfig) -> None:
        self.trainable = trainable
        self.optimizer = MasterAdamW(trainable.named_parameters(), config)
        if distributed.world_size() > 1:
            for master in self.optimizer.masters.values():
                torch.distributed.broadcast(master.detach(), src=0)
            self.optimizer.write_back()

    def forward(self, pack: Pack, *, tokens: bool = True) -> PackOutput:
        """Run the module on one pack."""
        output: PackOutput = self.trainable(pack, tokens=tokens)
        return output

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of a scalar."""
        loss.backward()

    def update(self, learning_rate: float, max_grad_norm: float) -> float:
        """Sum gradients over ranks, clip, step, clear. Returns the global gradient norm before clipping."""
        if distributed.world_size() > 1:
            self._sum_gradients()
        norm = self.optimizer.clip(max_grad_norm)
        self.optimizer.step(learning_rate)
        self.optimizer.zero_grad()
        return norm

    def _sum_gradients(self) -> None:
        bucket: list[torch.Tensor] = []
        filled = 0
        for gradient in self.optimizer.gradients():
            bucket.append(gradient)
            filled += gradient.numel()
            if filled >= _BUCKET_ELEMENTS:
                _sum_bucket(bucket)
                bucket, filled = [], 0
        if bucket:
            _sum_bucket(bucket)


def _sum_bucket(bucket: list[torch.Tensor]) -> None:
    flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
    torch.distributed.all_reduce(flat)
    for gradient, part in zip(bucket, flat.split([gradient.numel() for gradient in bucket]), strict=True):
        gradient.copy_(part.view_as(gradient))


def make_backend(trainable: Trainable, optim: OptimConfig, parallel: ParallelConfig) -> Backend:
    """The backend a run asks for.

    Raises:
        ConfigError: the backend does not fit the number of processes.
    """
    ranks = distributed.world_size()
    if parallel.backend == "single" and ranks > 1:
        raise ConfigError(f"parallel.backend is 'single' but torchrun started {ranks} processes. Use parallel.backend=ddp.")
    if parallel.backend == "ddp" and ranks == 1:
        raise ConfigError("parallel.backend is 'ddp' but there is one process. Start with torchrun, or use backend=auto.")
    return TorchBackend(trainable, optim)
