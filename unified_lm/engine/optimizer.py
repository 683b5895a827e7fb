"""AdamW with float32 master weights and float32 gradient accumulation, whatever the dtype of the model's weights.

bfloat16 has 8 bits of mantissa: an update of 1e-5 on a weight of 1 is lost, and so is the sum of many small gradients.
The model keeps and computes in bfloat16; a float32 copy of every trained weight takes the updates, and a float32 buffer
takes the gradient of every pack as soon as autograd has it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn

from unified_lm.config.schema import OptimConfig


class MasterAdamW:
    """AdamW over the trainable parameters of a module.

    Weight decay applies to matrices only (not to norms, biases and other vectors).

    Args:
        named_parameters: the module's parameters; those without `requires_grad` are left alone.
        config: rates, moments and decay.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimConfig) -> None:
        self.parameters = {name: p for name, p in named_parameters if p.requires_grad}
        assert self.parameters, "nothing to train"
        self.masters = {name: self._master(p) for name, p in self.parameters.items()}
        self._hooks = [
            p.register_post_accumulate_grad_hook(self._collector(self.masters[name]))
            for name, p in self.parameters.items()
            if self.masters[name] is not p
        ]
        decayed = [m for m in self.masters.values() if m.ndim >= 2]
        others = [m for m in self.masters.values() if m.ndim < 2]
        groups = [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        self.inner = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=config.learning_rate,
            betas=config.betas,
            eps=config.eps,
            fused=True,
        )
        self.zero_grad()

    @staticmethod
    def _master(parameter: nn.Parameter) -> torch.Tensor:
        if parameter.dtype in (torch.float32, torch.float64):
            return parameter
        return parameter.detach().float().requires_grad_()

    @staticmethod
    def _collector(master: torch.Tensor):  # type: ignore[no-untyped-def]
        def collect(parameter: torch.Tensor) -> None:
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
        """Set every accumulated gradient to zero (they always exist, so that ranks can add theirs up)."""
        for master in self.masters.values():
            if master.grad is None:
                master.grad = torch.zeros_like(master)
            else:
                master.grad.zero_()

    def clip(self, max_norm: float) -> float:
        """Scale all gradients so that their global norm is at most `max_norm` (0: leave them); returns the norm before."""
        norm = torch.nn.utils.get_total_norm(list(self.gradients()))
        if max_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(self.masters.values(), max_norm, norm)
        return float(norm)

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Update the float32 weights, then write them to the model."""
        for group in self.inner.param_groups:
            group["lr"] = learning_rate
        self.inner.step()
        self.write_back()

    @torch.no_grad()
    def write_back(self) -> None:
        """Round the float32 weights into the model's own."""
        for name, parameter in self.parameters.items():
            if self.masters[name] is not parameter:
                parameter.copy_(self.masters[name])

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Everything a bit-exact resume needs: "weight/NAME", "exp_avg/NAME", "exp_avg_sq/NAME", "step/NAME"."""
        state: dict[str, torch.Tensor] = {}
        for name, master in self.masters.items():
            state[f"weight/{name}"] = master.detach()
            for key, value in self.inner.state.get(master, {}).items():
                state[f"{key}/{name}"] = value
        return state

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Put a saved state back; `state` must come from the same set of parameters."""
        for name, master in self.masters.items():
            master.copy_(state[f"weight/{name}"])
            moments = {key: state[f"{key}/{name}"] for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}/{name}" in state}
            if moments:
                self.inner.state[master] = {key: value.clone().to(master.device) for key, value in moments.items()}
        self.write_back()
