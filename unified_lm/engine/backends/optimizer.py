"""AdamW with float32 master weights and float32 gradient accumulation, whatever the dtype of the model's weights.

bfloat16 has 8 bits of precision: an update of 1e-5 to a weight of 1 is rounded away, and so are small gradients added to a
large sum. The model stores weights and computes in bfloat16; a float32 copy of every trained weight takes the updates, and a
float32 buffer accumulates each pack's gradient as soon as autograd has computed it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from unified_lm.config.schema import OptimConfig
from unified_lm.core import distributed
from unified_lm.core.errors import CheckpointError

_BUCKET_ELEMENTS = 16 * 1024 * 1024  # 64 MiB of float32: few collectives, and no second copy of all gradients

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's two running means, by their names in torch."""


BUFFER = "buffer/"
"""Prefix of what a saved state holds beside the optimizer's (`backends.buffers`)."""


class StateReader(Protocol):
    """Reads a saved optimizer state tensor by tensor, whole or in part (`checkpoint.tensor_shards.ShardReader`)."""

    @property
    def names(self) -> frozenset[str]:
        """Names of all tensors."""

    def __call__(self, name: str) -> torch.Tensor:
        """One tensor, whole."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""

    def part(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements of a flattened tensor, `[stop - start]`."""


class MasterAdamW:
    """AdamW over the trainable parameters of a module.

    Weight decay applies to matrices only (not to norms, biases and other vectors).

    Args:
        named_parameters: the module's parameters; those without `requires_grad` are ignored.
        config: rates, moments and decay.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimConfig) -> None:
        self.parameters = {name: p for name, p in named_parameters if p.requires_grad}
        assert self.parameters, "nothing to train"
        self.masters = {name: self._master(p) for name, p in self.parameters.items()}
        # A hook per parameter frees each low-precision gradient at once: only one of them exists at any time.
        self._hooks = [
            p.register_post_accumulate_grad_hook(self._collector(self.masters[name]))
            for name, p in self.parameters.items()
            if self.masters[name] is not p
        ]
        groups = adamw_groups([(m, m.ndim) for m in self.masters.values()], config.weight_decay)
        self.inner = torch.optim.AdamW(
            groups,
            lr=config.learning_rate,
            betas=config.betas,
            eps=config.eps,
            fused=True,
        )
        self.zero_grad()

    @staticmethod
    def _master(parameter: nn.Parameter) -> torch.Tensor:
        if parameter.dtype in (torch.float32, torch.float64):
            return parameter  # wide enough to be its own master
        return parameter.detach().float().requires_grad_()

    @staticmethod
    def _collector(master: torch.Tensor):  # type: ignore[no-untyped-def]
        def collect(parameter: torch.Tensor) -> None:
            """Add a parameter's gradient, of any dtype, to that of its master, and free it."""
            assert master.grad is not None
            assert parameter.grad is not None
            master.grad.add_(parameter.grad)
            parameter.grad = None

        return collect

    def gradients(self) -> Iterator[torch.Tensor]:
        """The accumulated gradients, float32, in a fixed order; every trained parameter has one."""
        for master in self.masters.values():
            assert master.grad is not None
            yield master.grad

    def zero_grad(self) -> None:
        """Set every accumulated gradient to zero. They always exist, so that every rank sums the same tensors."""
        for master in self.masters.values():
            if master.grad is None:
                master.grad = torch.zeros_like(master)
            else:
                master.grad.zero_()

    @torch.no_grad()
    def share_weights(self) -> None:
        """Give every rank rank 0's weights: adapters and heads are drawn per process. Collective."""
        if distributed.world_size() > 1:
            for master in self.masters.values():
                torch.distributed.broadcast(master.detach(), src=0)
            self.write_back()

    def sum_gradients(self) -> None:
        """Sum the accumulated gradients over ranks. Collective."""
        if distributed.world_size() == 1:
            return
        bucket: list[torch.Tensor] = []
        filled = 0
        for gradient in self.gradients():
            bucket.append(gradient)
            filled += gradient.numel()
            if filled >= _BUCKET_ELEMENTS:
                _sum_bucket(bucket)
                bucket, filled = [], 0
        if bucket:
            _sum_bucket(bucket)

    def norm(self) -> torch.Tensor:
        """Norm of all accumulated gradients, a scalar."""
        return torch.nn.utils.get_total_norm(list(self.gradients()))

    def clip(self, max_norm: float, norm: torch.Tensor) -> None:
        """Scale all gradients by what takes a global norm, of these and possibly other gradients, to at most `max_norm`.

        Args:
            max_norm: 0: no clipping.
            norm: the global norm, a scalar.
        """
        if max_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(self.masters.values(), max_norm, norm)

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Update the float32 weights, then copy them to the model."""
        for group in self.inner.param_groups:
            group["lr"] = learning_rate
        self.inner.step()
        self.write_back()

    @torch.no_grad()
    def write_back(self) -> None:
        """Copy the float32 weights to the model's, rounded to their dtype."""
        for name, parameter in self.parameters.items():
            if self.masters[name] is not parameter:
                parameter.copy_(self.masters[name])

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Everything that a bit-exact resume needs: "weight/NAME", "exp_avg/NAME", "exp_avg_sq/NAME", "step/NAME"."""
        return {key: value for name in self.masters for key, value in self.entries(name)}

    def entries(self, name: str) -> Iterator[tuple[str, torch.Tensor]]:
        """What `state_dict` holds of one parameter."""
        master = self.masters[name]
        yield f"weight/{name}", master.detach()
        for key, value in self.inner.state.get(master, {}).items():
            yield f"{key}/{name}", value

    @torch.no_grad()
    def load_state(self, read: StateReader) -> None:
        """Restore a saved state.

        Args:
            read: asked in the order of `state_dict`.

        Raises:
            CheckpointError: it belongs to other trained parameters.
        """
        check_names(read.names, self.masters)
        for name in self.masters:
            self.load_entries(name, read)
        self.write_back()

    @torch.no_grad()
    def load_entries(self, name: str, read: StateReader) -> None:
        """Restore one parameter's master and moments, as `load_state` does for all; `write_back` follows."""
        master = self.masters[name]
        master.copy_(read_shaped(read, f"weight/{name}", master.shape))
        self.inner.state.pop(master, None)
        if f"step/{name}" in read.names:
            moments = {key: read_shaped(read, f"{key}/{name}", master.shape).to(master.device) for key in MOMENTS}
            step = read(f"step/{name}").to(master.device, torch.float32, copy=True)  # fused AdamW keeps it on the device
            self.inner.state[master] = {"step": step.reshape(()), **moments}


def _sum_bucket(bucket: list[torch.Tensor]) -> None:
    # One large all-reduce instead of many small ones, whose latency would dominate.
    flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
    torch.distributed.all_reduce(flat)
    for gradient, part in zip(bucket, flat.split([gradient.numel() for gradient in bucket]), strict=True):
        gradient.copy_(part.view_as(gradient))


@torch.no_grad()
def load_weights(named_parameters: Iterable[tuple[str, nn.Parameter]], read: StateReader) -> None:
    """Give trained parameters the weights of a saved state, rounded to their dtype; nothing else of it is read.

    Args:
        named_parameters: the module's parameters; those without `requires_grad` are ignored.
        read: the saved state.

    Raises:
        CheckpointError: it belongs to other trained parameters.
    """
    trained = {name: p for name, p in named_parameters if p.requires_grad}
    check_names(read.names, trained)
    for name, parameter in trained.items():
        parameter.copy_(read_shaped(read, f"weight/{name}", parameter.shape))


def adamw_groups(parameters: Sequence[tuple[torch.Tensor, int]], weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's parameter groups: weight decay for matrices only. Empty groups are left out.

    Args:
        parameters: each with its number of dimensions (the tensor of a partitioned parameter is flat).
        weight_decay: for matrices.
    """
    decayed = [p for p, dimensions in parameters if dimensions >= 2]
    others = [p for p, dimensions in parameters if dimensions < 2]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def check_names(found: frozenset[str], trained: Iterable[str]) -> None:
    """Check that a saved state belongs to the same trained parameters, all with moments or all without.

    Raises:
        CheckpointError: it does not.
    """
    found = frozenset(name for name in found if not name.startswith(BUFFER))
    weights = {f"weight/{name}" for name in trained}
    state = {f"{key}/{name}" for name in trained for key in (*MOMENTS, "step")}
    if found in (weights, weights | state):
        return
    expected = weights | state if found - weights else weights
    lacking, foreign = sorted(expected - found), sorted(found - expected)
    parts = [f"{len(lacking)} tensors are missing ({lacking[0]}, ...)"] if lacking else []
    parts += [f"{len(foreign)} belong to no trained parameter ({foreign[0]}, ...)"] if foreign else []
    raise CheckpointError(
        f"the saved optimizer state is not of this model: {', '.join(parts)}. Resume with the recipe that wrote it."
    )


def read_shaped(read: StateReader, name: str, shape: Sequence[int], part: tuple[int, int] | None = None) -> torch.Tensor:
    """Read a tensor of a saved state as a new float32 tensor.

    Args:
        read: the saved state.
        name: of the tensor.
        shape: what it must have.
        part: start and stop of what is wanted of the flattened tensor; None: all of it, in its shape.

    Raises:
        CheckpointError: it has another shape.
    """
    found = read.shape(name)
    if tuple(found) != tuple(shape):
        raise CheckpointError(
            f"the saved optimizer state is not of this model: {name} has shape {list(found)}, expected {list(shape)}."
        )
    value = read(name) if part is None else read.part(name, *part)
    return value.to(torch.float32, copy=True)
