"""ZeRO's optimizer state, read and written as whole tensors, one parameter at a time.

DeepSpeed's own checkpoints hold one rank's partition per file and only fit the same number of ranks. Ours hold whole tensors
under the parameter's name, so any backend on any number of ranks can resume them (`Backend.optimizer_state`). Where the values
are differs by stage: in the parameters themselves (0), in flat float32 partitions of the optimizer (1 and 2), or in a partition
per parameter (3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from unified_lm.core import distributed
from unified_lm.engine.backends.optimizer import MOMENTS, check_names, read_shaped


class ZeroState:
    """Access to the float32 weights and AdamW moments of a DeepSpeed engine.

    Args:
        deepspeed: the module; only `engine.backends.deepspeed` imports it.
        stage: 0 to 3.
        parameters: name -> trained parameter, in the order of the state.
        shapes: name -> whole shape; stage 3 leaves parameters empty.
        inner: the torch (or CPU) AdamW that takes the updates.
        outer: DeepSpeed's optimizer around it; at stage 0 there is none and it is never used.
        counts_on_host: whether the optimizer keeps its step count as a Python integer, as DeepSpeed's CPU Adam does.
    """

    def __init__(
        self,
        deepspeed: Any,
        stage: int,
        parameters: Mapping[str, nn.Parameter],
        shapes: Mapping[str, tuple[int, ...]],
        inner: torch.optim.Optimizer,
        outer: Any,
        *,
        counts_on_host: bool,
    ) -> None:
        self._deepspeed = deepspeed
        self._stage = stage
        self._parameters = parameters
        self._shapes = shapes
        self._inner = inner
        self._outer = outer
        self._counts_on_host = counts_on_host

    def read(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Float32 weights and moments by name, each gathered to every rank in turn. Collective."""
        stepped = bool(self._inner.state)
        if stepped:
            self._link_moments()
        for name, parameter in self._parameters.items():
            yield f"weight/{name}", self._get(parameter, None)
            if stepped:
                yield f"step/{name}", self._step_count()
                for key in MOMENTS:
                    yield f"{key}/{name}", self._get(parameter, key)

    @torch.no_grad()
    def write(self, read: Callable[[str], torch.Tensor], names: frozenset[str]) -> None:
        """Restore a saved state. Every rank reads all of it and keeps its part.

        Args:
            read: name -> whole tensor.
            names: what the saved state holds.

        Raises:
            CheckpointError: a trained weight is missing or has another shape.
        """
        check_names(names, self._parameters)
        stepped = any(name.startswith("step/") for name in names)
        self._inner.state.clear()
        for name, parameter in self._parameters.items():
            self._set(parameter, None, read_shaped(read, f"weight/{name}", self._shapes[name]))
            if not stepped:
                continue
            if not self._inner.state:
                self._make_moments(read(f"step/{name}"))
            for key in MOMENTS:
                self._set(parameter, key, read_shaped(read, f"{key}/{name}", self._shapes[name]))
        if self._stage in (1, 2):
            # The model's weights are rounded copies of the float32 partitions just written.
            self._outer.update_lp_params()

    def _step_count(self) -> torch.Tensor:
        """The number of updates taken, float32 scalar on the CPU; the same for every parameter."""
        state = next(iter(self._inner.state.values()))
        return torch.as_tensor(state["step"], dtype=torch.float32).cpu().clone().reshape(())

    def _get(self, parameter: nn.Parameter, key: str | None) -> torch.Tensor:
        """The whole weight (`key` None) or moment of a parameter."""
        if self._stage == 0:
            value = parameter if key is None else self._inner.state[parameter][key]
            return value.detach()
        if key is None:
            found = self._deepspeed.utils.safe_get_full_fp32_param(parameter)
        else:
            found = self._deepspeed.utils.safe_get_full_optimizer_state(parameter, key)
        assert isinstance(found, torch.Tensor)
        return found.detach()

    def _set(self, parameter: nn.Parameter, key: str | None, value: torch.Tensor) -> None:
        """Write a whole weight (`key` None) or moment; each rank keeps its part."""
        value = value.to(distributed.local_device())
        if self._stage == 0:
            (parameter if key is None else self._inner.state[parameter][key]).copy_(value)
        elif self._stage == 3:
            self._set_partition(parameter, key, value)
        elif key is None:
            self._deepspeed.utils.safe_set_full_fp32_param(parameter, value)
        else:
            self._deepspeed.utils.safe_set_full_optimizer_state(parameter, value, key)

    def _set_partition(self, parameter: Any, key: str | None, value: torch.Tensor) -> None:
        """Write this rank's part of a value, padded as DeepSpeed pads it (its `safe_set_full_*` functions do not pad)."""
        size = parameter.ds_tensor.numel()
        padded = value.new_zeros(size * distributed.world_size())
        padded[: value.numel()] = value.reshape(-1)
        part = padded.narrow(0, size * distributed.rank(), size)
        if key is None:
            self._deepspeed.utils.safe_set_local_fp32_param(parameter, part)
            # The weight that forwards use is a separate, possibly bfloat16 partition; it must change too.
            with self._deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                if distributed.is_rank0():
                    parameter.data.copy_(value)
        else:
            self._deepspeed.utils.safe_set_local_optimizer_state(parameter, part, key)

    def _make_moments(self, step: torch.Tensor) -> None:
        """Create the optimizer's state, which AdamW only does in its first step; a saved state needs it before."""
        for flat in self._partitions():
            count: Any = int(step) if self._counts_on_host else step.to(flat.device, torch.float32).clone().reshape(())
            self._inner.state[flat] = {"step": count, **{key: torch.zeros_like(flat) for key in MOMENTS}}
        self._link_moments()

    def _link_moments(self) -> None:
        """Point each parameter of stages 1 and 2 at its moments inside the flat partitions.

        DeepSpeed links them after the first parameter group's first step, when the second group has no moments yet, so the
        links are made again here.
        """
        if self._stage in (1, 2):
            self._outer._hp_optimizer_states_linked = False
            self._outer._lazy_init_hp_params_optimizer_state()

    def _partitions(self) -> Sequence[torch.Tensor]:
        """The tensors that AdamW updates on this rank."""
        if self._stage == 3:
            partitions: Sequence[torch.Tensor] = self._outer.fp32_partitioned_groups_flat
            return partitions
        return [p for group in self._inner.param_groups for p in group["params"]]
