"""What the routers of a mixture of experts do with a text: logits, probabilities and choices, layer by layer.

Every family of transformers names its router module (`_can_record_outputs`), whose output holds the raw logits and the chosen
experts. A hook on each of them reads the pooled tokens of a pack and keeps nothing else, so that routing beside the states of
one forward costs little. What "probability" means is found out by asking the model (`find_gate`): the weights of chosen
experts follow the softmax over all experts, or each expert's own sigmoid.

Legend: `batch/__init__.py`; E experts of a layer, P pooled vectors of a pack, R rows that are traced.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from unified_lm.batch import Pack
from unified_lm.core import distributed
from unified_lm.core.errors import ModelError
from unified_lm.models import families
from unified_lm.models.backbone import Backbone
from unified_lm.models.modes import evaluation_mode
from unified_lm.models.monet.router import MonetRouter
from unified_lm.models.rotation import probe_pack

_MISFIT = 0.3
_CLEARLY = 0.1
_PROBED = 16
"""Relative to how much weights differ: the largest misfit of the right gate, and by how much the other one has to fit worse.
The last: how many random states routers are asked about."""


class Gate(Enum):
    """What becomes of the logits of a router.

    Attributes:
        SOFTMAX: over all experts of the layer; probabilities sum to one. Models that take the softmax over the chosen ones only
            (Mixtral, gpt-oss, Granite) have the same ratios.
        SIGMOID: each expert's own (DeepSeek-V3, GLM-4, Llama 4); each between 0 and 1, of any sum. A bias that balances choices
            is not part of it, as in the models themselves.
    """

    SOFTMAX = "softmax"
    SIGMOID = "sigmoid"

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Probabilities `[..., E]` of raw logits, in float32 (float64 stays)."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits.softmax(-1) if self is Gate.SOFTMAX else logits.sigmoid()


@dataclass(frozen=True, eq=False)
class LayerRouting:
    """One router's logits and choices.

    Attributes:
        layer: name of the module.
        logits: raw, `[R, E]`, or `[R, 2, H, E]` of MONET's product keys.
        chosen: int64 `[R, k]`, the experts that a token went to; None where these are all whose probability is not zero.
        gate: what turns logits into probabilities.
        parts: how many distributions a token has: one, or 2 H.
    """

    layer: str
    logits: torch.Tensor
    chosen: torch.Tensor | None
    gate: Callable[[torch.Tensor], torch.Tensor]
    parts: int = 1

    @cached_property
    def probabilities(self) -> torch.Tensor:
        """float32 `[R, F]`; before groups of experts are excluded, and before the chosen ones are scaled to a sum of one."""
        return self.gate(self.logits).flatten(1)

    @cached_property
    def selected(self) -> torch.Tensor:
        """bool `[R, F]`, the experts (or keys) that a token went to."""
        if self.chosen is None:
            return self.probabilities > 0
        return torch.zeros(self.logits.shape, dtype=torch.bool, device=self.logits.device).scatter(1, self.chosen, True)

    def evenness(self) -> torch.Tensor:
        """`[R]`, entropy of a token's probabilities, in units of that of even ones; the mean over its distributions."""
        told = torch.distributions.Categorical(probs=self.probabilities.unflatten(1, (self.parts, -1)))
        return told.entropy().mean(1) / math.log(told.probs.shape[-1])

    def rows(self, rows: torch.Tensor) -> LayerRouting:
        """The same of some tokens, int64 `[R]`."""
        chosen = None if self.chosen is None else self.chosen.index_select(0, rows)
        return replace(self, logits=self.logits.index_select(0, rows), chosen=chosen)


class Routers:
    """The routers of a model.

    Args:
        backbone: the model, on its device. Where parameters are partitioned, those of the routers are whole for the moment.

    Attributes:
        names: of the router modules, in the order of the layers.
        sizes: of each, the probabilities of a token: experts, or keys of both sides and all heads.
        gate: see `Gate`; None for MONET, whose gates are softmaxes over the keys that a head chose.

    Raises:
        ModelError: the model is dense, runs padded, or has routers whose output is not understood.
    """

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone
        self._family = str(backbone.causal_lm.config.get_text_config(decoder=True).model_type)
        self._places = families.router_places(backbone.causal_lm)
        if not self._places:
            raise ModelError(
                f"family '{self._family}' has no router: it is dense, or transformers does not name its router. Routing is "
                "read of mixtures of experts, such as mixtral, qwen2_moe, qwen3_moe, olmoe, deepseek_v2, deepseek_v3, gpt_oss."
            )
        self.names = tuple(name for name, _, _ in self._places)
        self.gate: Gate | None = None
        if isinstance(first := self._places[0][1], MonetRouter):
            self.sizes = (2 * first.heads * first.keys,) * len(self._places)
            return
        outputs = self._probe()
        self.sizes = tuple(logits.shape[-1] for logits, _, _ in outputs)
        self.gate = find_gate(outputs, inspect.getsource(type(first)), self._family)

    @property
    def meaning(self) -> str:
        """What probabilities are, in a word or two."""
        return "product keys" if self.gate is None else self.gate.value

    @property
    def num_features(self) -> int:
        """The dimensions of a routing vector: the sizes of all routers together."""
        return sum(self.sizes)

    def probabilities(self, logits: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Per router float32 `[T, F]` of what `Backbone.router_logits` returns."""
        return [self._gate(number)(of_layer).flatten(1) for number, of_layer in enumerate(logits)]

    def _gate(self, number: int) -> Callable[[torch.Tensor], torch.Tensor]:
        module = self._places[number][1]
        if isinstance(module, MonetRouter):
            return module.gates
        assert self.gate is not None
        return self.gate

    def _layer(self, number: int, output: Any) -> LayerRouting:
        """The routing of all tokens of a forward, of a router's output."""
        name, module, index = self._places[number]
        if isinstance(module, MonetRouter):
            return LayerRouting(name, output[1].flatten(0, -4), None, module.gates, parts=2 * module.heads)
        logits, chosen, _ = _read(output, index, self._family)
        return LayerRouting(name, logits, chosen, self._gate(number))

    def trace(self, pack: Pack, rows: torch.Tensor) -> tuple[torch.Tensor, tuple[LayerRouting, ...]]:
        """Run a pack, and read what every router does with some tokens.

        Args:
            pack: on the model's device.
            rows: int64 `[R]`, tokens of the pack.

        Returns:
            The hidden states `[T, D]`, and the routing of each layer.
        """
        found: dict[int, LayerRouting] = {}
        with self.reading(lambda number, routing: found.__setitem__(number, routing.rows(rows))):
            hidden = self._backbone(pack)
        return hidden, tuple(found[number] for number in range(len(self._places)))

    @contextmanager
    def reading(self, read: Callable[[int, LayerRouting], None]) -> Iterator[None]:
        """Context in which every forward hands over what its routers do.

        Args:
            read: called with the number of a layer among those with experts, and its routing of all tokens.
        """
        with self._hooked(lambda number, output: read(number, self._layer(number, output))):
            yield

    @contextmanager
    def _hooked(self, take: Callable[[int, Any], None]) -> Iterator[None]:
        """Context in which `take` gets the number and the output of every router that runs."""

        def hook(number: int) -> Callable[..., None]:
            return lambda module, inputs, output: take(number, output)

        hooks = [module.register_forward_hook(hook(number)) for number, (_, module, _) in enumerate(self._places)]
        try:
            yield
        finally:
            for handle in hooks:
                handle.remove()

    def _probe(self) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Logits, choices and weights of every router on a short sample; of partitioned models for random states."""
        modules = [module for _, module, _ in self._places]
        seen: dict[int, Any] = {}
        with evaluation_mode(self._backbone), torch.no_grad():
            if not any(distributed.is_partitioned(parameter) for module in modules for parameter in module.parameters()):
                with self._hooked(seen.__setitem__):
                    self._backbone(probe_pack(self._backbone))
            else:  # the rest of the model is not whole: each router is asked alone
                seen |= {number: self._ask(module) for number, module in enumerate(modules)}
        return [_read(seen[number], index, self._family) for number, (_, _, index) in enumerate(self._places)]

    def _ask(self, router: nn.Module) -> Any:
        """The output of a router, which is whole, for random states."""
        states = torch.randn(_PROBED, self._backbone.hidden_size, generator=torch.Generator().manual_seed(0))
        try:
            return router(states.to(next(router.parameters()).device, self._backbone.causal_lm.dtype))
        except (TypeError, ValueError) as error:
            raise ModelError(
                f"the router of family '{self._family}' does not run alone ({error}), so that it cannot be read while "
                "parameters are partitioned. Choose parallel=zero2."
            ) from error


def router_parameters(causal_lm: PreTrainedModel) -> list[nn.Parameter]:
    """The parameters of a model's routers, in the order of the layers; none of a dense model."""
    return [parameter for _, module, _ in families.router_places(causal_lm) for parameter in module.parameters()]


def router_sizes(causal_lm: PreTrainedModel) -> list[int]:
    """`Routers.sizes`; none of a dense model. Parameters may be partitioned."""
    routers = [module for _, module, _ in families.router_places(causal_lm)]
    shapes = [[distributed.full_shape(parameter) for parameter in module.parameters()] for module in routers]
    return [
        2 * module.heads * module.keys if isinstance(module, MonetRouter) else next(s[0] for s in of_router if len(s) == 2)
        for module, of_router in zip(routers, shapes, strict=True)
    ]


def find_gate(outputs: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], source: str = "", family: str = "") -> Gate:
    """The gate whose probabilities explain how a model weighs the experts that it chose.

    Weights may be scaled, by one factor for all tokens or to a sum of one for each: so ratios within a token are compared, or,
    with a single choice, between tokens.

    Args:
        outputs: per layer the logits `[T, E]`, the choices `[T, k]` and their weights `[T, k]`.
        source: of the router's class, which decides where weights do not.
        family: for the message.

    Raises:
        ModelError: no gate does.
    """
    misfits = dict.fromkeys(Gate, 0.0)
    spread = 0.0
    for logits, chosen, weights in outputs:
        told = _centered(weights.double().clamp_min(1e-30).log())
        spread += float(told.abs().sum())
        for gate in Gate:
            expected = gate(logits.double()).gather(1, chosen).clamp_min(1e-30).log()
            misfits[gate] += float((_centered(expected) - told).abs().sum())
    best, other = sorted(Gate, key=lambda gate: misfits[gate])
    if misfits[best] > _MISFIT * spread + 1e-9:
        raise ModelError(
            f"family '{family}' weighs its experts neither by a softmax nor by sigmoids of its router's logits, so there are "
            "no routing probabilities of it. Choose another model."
        )
    if spread and misfits[other] - misfits[best] > _CLEARLY * spread:
        return best
    # Routers that are still zero, or choose one expert with weight 1, tell nothing.
    return Gate.SIGMOID if "sigmoid" in source else Gate.SOFTMAX


def _centered(logs: torch.Tensor) -> torch.Tensor:
    """Without what all choices of a token, or all tokens with one choice, have in common."""
    return logs - logs.mean(dim=1 if logs.shape[1] > 1 else 0, keepdim=True)


def _read(output: Any, index: int, family: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits `[T, E]`, choices int64 `[T, k]` and weights `[T, k]` of a router's output."""
    parts = [part for part in output if isinstance(part, torch.Tensor)] if isinstance(output, tuple) else []
    if len(parts) == len(output if isinstance(output, tuple) else ()) and index < len(parts):
        logits = parts[index].flatten(0, -2)
        others = [part.flatten(0, -2) for number, part in enumerate(parts) if number != index]
        integers = [part for part in others if not part.is_floating_point()]
        weights = [part for part in others if part.is_floating_point()]
        if len(weights) == 1 and len(integers) == 1:
            return logits, integers[0].long(), weights[0]
        if len(weights) == 1 and not integers and weights[0].shape == logits.shape:  # Llama 4: a weight for every expert
            chosen = weights[0].topk(int((weights[0] != 0).sum(-1).max()), dim=-1)
            return logits, chosen.indices, chosen.values
    raise ModelError(
        f"the router of family '{family}' returns {type(output).__name__} of {len(parts)} tensors, where logits, weights and "
        "chosen experts are expected: its routing cannot be read with this version of transformers."
    )
