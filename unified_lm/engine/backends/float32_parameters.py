"""Float32 parameters of a bfloat16 model, which DeepSpeed would cast to bfloat16: kept whole, and out of its sight.

The projection on embeddings is float32 whatever the model's dtype, and some families keep their routers or norms so. Under one
process or DDP they stay float32. DeepSpeed's bfloat16 mode has one dtype for all parameters it knows. So it does not get to
know these few small ones: every rank holds them whole, and they take the same update as under DDP, as part of one global norm.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from unified_lm.config.schema import OptimConfig
from unified_lm.core import distributed
from unified_lm.engine.backends.optimizer import MasterAdamW


class Float32Parameters:
    """The parameters of a module that DeepSpeed must not see, with their optimizer.

    Args:
        module: on its device.
        optim: optimizer settings.
        bfloat16: whether DeepSpeed casts; if not, it can have them all and this object holds nothing.
    """

    def __init__(self, module: nn.Module, optim: OptimConfig, *, bfloat16: bool) -> None:
        kept = {name: p for name, p in module.named_parameters() if bfloat16 and p.dtype == torch.float32}
        trained = {name: p for name, p in kept.items() if p.requires_grad}
        self._kept = {id(p): p for p in kept.values()}
        self._owners = [part for part in module.modules() if any(id(p) in self._kept for p in part.parameters(recurse=False))]
        self.optimizer = MasterAdamW(trained.items(), optim) if trained else None
        self.names = frozenset(trained)
        if self.optimizer is not None:
            self.optimizer.share_weights()

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Within it these parameters are plain attributes of their modules, in no list of parameters."""
        order = [list(owner._parameters) for owner in self._owners]
        taken: list[dict[str, Any]] = []
        for owner in self._owners:
            found = {name: p for name, p in owner._parameters.items() if id(p) in self._kept}
            for name in found:
                del owner._parameters[name]
            owner.__dict__.update(found)
            taken.append(found)
        try:
            yield
        finally:
            for owner, names, found in zip(self._owners, order, taken, strict=True):
                for name in found:
                    del owner.__dict__[name]
                everything = {**owner._parameters, **found}
                # in place, because DeepSpeed may have put a dictionary of its own there; and in the former order
                owner._parameters.clear()
                owner._parameters.update({name: everything[name] for name in names})

    def join_norm(self, outer: Any, stage: int) -> None:
        """Make these gradients part of the global norm by which a DeepSpeed optimizer clips and skips steps.

        Args:
            outer: DeepSpeed's optimizer.
            stage: of ZeRO.
        """
        optimizer = self.optimizer
        if optimizer is None:
            return
        # Each stage has an optimizer of its own, and each takes its norm from another method.
        if stage == 3:
            norms = outer._get_norm_groups
            outer._get_norm_groups = lambda: [*norms(), optimizer.norm()]
        elif stage == 1:
            gradients = outer.get_grads_for_norm

            def with_ours(for_clipping: bool = False) -> Any:
                """DeepSpeed's (gradients, those of its own experts); ours are clipped by `update`."""
                found = gradients(for_clipping)
                return found if for_clipping else ([*found[0], *optimizer.gradients()], found[1])

            outer.get_grads_for_norm = with_ours
        else:
            norm = outer.scaled_global_norm
            outer.scaled_global_norm = lambda: torch.linalg.vector_norm(torch.stack([norm(), optimizer.norm()]))

    def sum_gradients(self, *, scaled_by: int) -> None:
        """Sum gradients over ranks. Collective.

        Args:
            scaled_by: what the losses were multiplied by.
        """
        if self.optimizer is None:
            return
        self.optimizer.sum_gradients()
        if scaled_by != 1:
            for gradient in self.optimizer.gradients():
                gradient.div_(scaled_by)

    def update(self, learning_rate: float, max_grad_norm: float, norm: float) -> None:
        """Clip by the global norm and step where it is finite; clear the gradients."""
        if self.optimizer is None:
            return
        if math.isfinite(norm):
            self.optimizer.clip(max_grad_norm, torch.tensor(norm, device=distributed.local_device()))
            self.optimizer.step(learning_rate)
        self.optimizer.zero_grad()


def gather_only_partitions(coordinator: Any) -> None:
    """Make ZeRO-3 gather, before a module runs, only parameters that it has partitioned; it expects every one to be.

    Args:
        coordinator: DeepSpeed's module of that name.
    """
    every = coordinator.get_all_parameters
    if not hasattr(every, "of_partitions"):

        def partitioned(module: nn.Module, recurse: bool = False) -> Iterator[tuple[str, nn.Parameter]]:
            """The parameters that have a partition."""
            return ((name, p) for name, p in every(module, recurse) if hasattr(p, "ds_id"))

        partitioned.of_partitions = True  # type: ignore[attr-defined]
        coordinator.get_all_parameters = partitioned
