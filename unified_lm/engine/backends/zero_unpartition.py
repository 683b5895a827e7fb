"""A module that ZeRO-3 has partitioned, made ordinary again for as long as it is copied (an export).

Rank 0 collects the whole weights on the CPU and takes off what DeepSpeed attaches to modules: hooks hold the engine, and
`copy.deepcopy` of a model would copy it with them, or fail.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from unified_lm.core import distributed

_HOOKED = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_parameters",
)
"""Attributes of every module that DeepSpeed fills with hooks, or replaces by a dictionary that gathers on access."""

_DEEPSPEED_ATTRIBUTES = (
    "_original_parameters",
    "_external_params",
    "ds_inflight_param_registry",
    "ds_recompute_parameters",
    "pre_bwd_fn",
    "post_bwd_fn",
)
"""Attributes that DeepSpeed adds."""


@contextmanager
def unpartitioned(deepspeed: Any, module: nn.Module, *, weights: bool = True) -> Iterator[None]:
    """Within the context every parameter is whole on rank 0, on the CPU, and modules carry no hooks there. Collective.

    Args:
        deepspeed: the module; only `engine.backends.deepspeed` imports it.
        module: partitioned by ZeRO-3; as before on leaving.
        weights: False leaves the parameters partitioned, and is not collective.
    """
    partitioned: dict[nn.Parameter, torch.Tensor] = {}
    for parameter in module.parameters() if weights else ():
        # One at a time: the accelerator never holds more than one whole parameter.
        with deepspeed.zero.GatheredParameters([parameter]):
            if distributed.is_rank0():
                partitioned[parameter] = parameter.data.detach().to("cpu", copy=True)
    if not distributed.is_rank0():
        yield
        return
    restorers = [_remove_hooks(part) for part in module.modules()]
    for parameter, whole in partitioned.items():
        # Swap: the dictionary keeps DeepSpeed's placeholder while the parameter holds its whole value.
        partitioned[parameter], parameter.data = parameter.data, whole
    try:
        yield
    finally:
        for parameter, placeholder in partitioned.items():
            parameter.data = placeholder
        for restore in restorers:
            restore()


def _remove_hooks(module: nn.Module) -> Callable[[], None]:
    """Give a module plain dictionaries for its hooks and parameters; returns a function that undoes it."""
    taken = {name: module.__dict__[name] for name in module.__dict__ if name in _HOOKED}
    extra = {name: module.__dict__.pop(name) for name in _DEEPSPEED_ATTRIBUTES if name in module.__dict__}
    for name, value in taken.items():
        module.__dict__[name] = dict(value) if name == "_parameters" else type(value)()

    def restore() -> None:
        """Restore what was taken from the module."""
        module.__dict__.update(taken)
        module.__dict__.update(extra)

    return restore
