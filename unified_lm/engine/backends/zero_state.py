"""ZeRO's optimizer state, read and written as whole tensors, one parameter at a time.

DeepSpeed's own checkpoints hold one rank's partition per file and only fit the same number of ranks. Ours hold whole tensors
under the parameter's name, so any backend on any number of ranks can resume them (`Backend.optimizer_state`). Where the values
are differs by stage: in the parameters themselves (0), in flat float32 partitions of the optimizer (1 and 2), or in a partition
per parameter (3).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from unified_lm.core import distributed
from unified_lm.engine.backends.optimizer import MOMENTS, MasterAdamW, StateReader, check_names, read_shaped


class ZeroState:
    """Access to the float32 weights and AdamW moments of a DeepSpeed engine.

    Args:
        deepspeed: the module; only `engine.backends.deepspeed` imports it.
        stage: 0 to 3.
        parameters: name -> trained parameter, in the order of the state.
        shapes: name -> whole shape; stage 3 leaves parameters empty.
        inner: the torch (or CPU) AdamW that takes the updates.
        outer: DeepSpeed's optimizer around it; at stage 0 there is none and it is never used.
        whole: the optimizer of parameters that DeepSpeed does not know, or None.
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
        whole: MasterAdamW | None,
        *,
        counts_on_host: bool,
    ) -> None:
        self._deepspeed = deepspeed
        self._stage = stage
        self._parameters = parameters
        self._shapes = shapes
        self._inner = inner
        self._outer = outer
        self._whole = whole
        self._counts_on_host = counts_on_host

    def read(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Float32 weights and moments by name, each gathered to every rank in turn. Collective."""
        stepped = bool(self._inner.state)
        if stepped:
            self._link_moments()
        for name, parameter in self._parameters.items():
            if self._whole is not None and name in self._whole.masters:
                yield from self._whole.entries(name)
                continue
            yield f"weight/{name}", self._get(parameter, None)
            if stepped:
                yield f"step/{name}", self._step_count()
                for key in MOMENTS:
                    yield f"{key}/{name}", self._get(parameter, key)

    @torch.no_grad()
    def write(self, read: StateReader) -> None:
        """Restore a saved state. Every rank reads the part that it keeps.

        Args:
            read: the saved state.

        Raises:
            CheckpointError: a trained weight is missing or has another shape.
        """
        check_names(read.names, self._parameters)
        stepped = any(name.startswith("step/") for name in read.names)
        self._inner.state.clear()
        for name, parameter in self._parameters.items():
            if self._whole is not None and name in self._whole.masters:
                self._whole.load_entries(name, read)
                continue
            self._set(parameter, None, read, f"weight/{name}", self._shapes[name])
            if not stepped:
                continue
            if not self._inner.state:
                self._make_moments(read(f"step/{name}"))
            for key in MOMENTS:
                self._set(parameter, key, read, f"{key}/{name}", self._shapes[name])
        if self._whole is not None:
            self._whole.write_back()
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

    def _set(self, parameter: Any, key: str | None, read: StateReader, name: str, shape: Sequence[int]) -> None:
        """Write a weight (`key` None) or moment: all of it at stage 0, else what this rank keeps of it."""
        if self._stage == 0:
            (parameter if key is None else self._inner.state[parameter][key]).copy_(read_shaped(read, name, shape))
        elif self._stage == 3:
            self._set_partition(parameter, key, read, name, shape)
        elif (kept := parameter._hp_mapping) is not None:  # None: all of this parameter is kept by other ranks
            address = kept.lp_fragment_address
            part = read_shaped(read, name, shape, (address.start, address.start + address.numel))
            kept.get_hp_fragment(key).data.copy_(part)

    def _set_partition(self, parameter: Any, key: str | None, read: StateReader, name: str, shape: Sequence[int]) -> None:
        """Write this rank's part of a value, padded as DeepSpeed pads it (its `safe_set_full_*` functions do not pad)."""
        size = parameter.ds_tensor.numel()
        start, total = size * distributed.rank(), math.prod(shape)
        stop = min(start + size, total)
        part = torch.zeros(size, dtype=torch.float32)
        if start < stop:
            part[: stop - start] = read_shaped(read, name, shape, (start, stop))
        part = part.to(distributed.local_device())
        if key is not None:
            self._deepspeed.utils.safe_set_local_optimizer_state(parameter, part, key)
            return
        self._deepspeed.utils.safe_set_local_fp32_param(parameter, part)
        # The weight that forwards use is a separate, possibly bfloat16 partition; it must change too.
        parameter.ds_tensor.data.copy_(part)
        if parameter.numel() == total:  # whole on every rank at the moment, as small ones stay
            parameter.data.copy_(read_shaped(read, name, shape))

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
