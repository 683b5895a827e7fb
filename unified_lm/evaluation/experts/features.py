"""What can be looked at one by one in a model: MONET's experts, the neurons of any decoder, latents of a sparse autoencoder.

All of them are read the same way, so that one can be held against the other: are MONET's experts more of one kind than a dense
model's neurons, or than what an autoencoder finds in its states?
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from unified_lm.batch import Pack
from unified_lm.core.errors import ModelError
from unified_lm.evaluation.experts.statistics import Places, gates_of, read_tokens
from unified_lm.evaluation.generation.perplexity import Domain
from unified_lm.inference.unified import UnifiedLM
from unified_lm.models.backbone import Backbone
from unified_lm.models.monet.masks import routers_of

_DOWN = ("down_proj", "c_proj", "fc2", "fc_out", "dense_4h_to_h", "w2", "down")
"""What the second matrix of a feed-forward layer is called; its inputs are the neurons."""


@dataclass(frozen=True)
class Reading:
    """Features of some tokens.

    Attributes:
        places: where each of the N tokens is.
        of: number of a group, a slice of the tokens, and features or None for all -> `[n, F]`, how active each of these
            features is, not negative.
    """

    places: Places
    of: Callable[[int, slice, torch.Tensor | None], torch.Tensor]


class Features(Protocol):
    """Features of one sort, in groups (of a router, of a layer).

    Attributes:
        kind: what one of them is called.
        groups: names of the groups.
        size: features of a group.
    """

    kind: str
    groups: Sequence[str]
    size: int

    def read(self, domain: Domain, context: int) -> Iterator[Reading]:
        """Read texts causally.

        Args:
            domain: the texts.
            context: tokens of a window.
        """
        ...


class Experts:
    """All experts of a MONET model: an expert's activity is the sum over heads of the product of its keys' gates.

    Raises:
        ModelError: the model is none.
    """

    kind = "expert"

    def __init__(self, model: UnifiedLM) -> None:
        self._model = model
        with model.borrow_backbone() as backbone:
            routers = routers_of(backbone.causal_lm)
        self.groups: Sequence[str] = [f"router {number}" for number in range(len(routers))]
        self.keys = routers[0].keys
        self.size = self.keys**2

    def read(self, domain: Domain, context: int) -> Iterator[Reading]:
        """See `Features.read`."""
        for gates_NGSHE, places in gates_of(self._model, domain, context):

            def pairs(
                group: int, part: slice, chosen: torch.Tensor | None = None, gates: torch.Tensor = gates_NGSHE
            ) -> torch.Tensor:
                """`[n, E * E]`, or of the chosen experts alone."""
                first_nHE, second_nHE = gates[part, group].unbind(1)
                if chosen is not None:
                    return (first_nHE[..., chosen // self.keys] * second_nHE[..., chosen % self.keys]).sum(1)
                return torch.bmm(first_nHE.transpose(1, 2), second_nHE).flatten(1)

            yield Reading(places, pairs)


class Neurons:
    """The hidden units of feed-forward layers, where they are positive.

    Args:
        model: any decoder.
        layers: numbers of layers; None takes all.

    Raises:
        ModelError: a layer that does not exist, or a family whose feed-forward layers are not of a known form.
    """

    kind = "neuron"

    def __init__(self, model: UnifiedLM, layers: Sequence[int] | None = None) -> None:
        self._model = model
        with model.borrow_backbone() as backbone:
            found = _down_projections(backbone)
        chosen = list(range(len(found))) if layers is None else _checked(layers, len(found))
        self._modules = [found[number] for number in chosen]
        self.groups: Sequence[str] = [f"layer {number}" for number in chosen]
        self.size = _width(self._modules[0])

    def read(self, domain: Domain, context: int) -> Iterator[Reading]:
        """See `Features.read`."""
        for values_NGF, places in read_tokens(self._model, domain, context, self._states):

            def active(
                group: int, part: slice, chosen: torch.Tensor | None = None, values: torch.Tensor = values_NGF
            ) -> torch.Tensor:
                """`[n, F]`."""
                own = values[part, group].float().clamp_min(0)
                return own if chosen is None else own[:, chosen]

            yield Reading(places, active)

    def _states(self, backbone: Backbone, pack: Pack) -> torch.Tensor:
        """`[T, G, F]`."""
        with _inputs_of(self._modules) as found:
            backbone(pack)
        return torch.stack([found[number].reshape(len(pack.input_ids), -1) for number in range(len(self._modules))], dim=1)


class Latents:
    """What sparse autoencoders find in the outputs of layers (`autoencoder.train_autoencoders`).

    Args:
        model: any decoder.
        autoencoders: number of a layer -> encodes states `[N, D]` as latents `[N, F]`, none of them negative.
        size: F.
    """

    kind = "latent"

    def __init__(self, model: UnifiedLM, autoencoders: dict[int, Callable[[torch.Tensor], torch.Tensor]], size: int) -> None:
        self._model = model
        self._layers, self._encode = list(autoencoders), list(autoencoders.values())
        self.groups: Sequence[str] = [f"layer {number}" for number in self._layers]
        self.size = size

    def read(self, domain: Domain, context: int) -> Iterator[Reading]:
        """See `Features.read`."""
        for states_NGD, places in layer_outputs(self._model, domain, context, self._layers):

            def active(
                group: int, part: slice, chosen: torch.Tensor | None = None, states: torch.Tensor = states_NGD
            ) -> torch.Tensor:
                """`[n, F]`."""
                own = self._encode[group](states[part, group])
                return own if chosen is None else own[:, chosen]

            yield Reading(places, active)


def layer_outputs(
    model: UnifiedLM, domain: Domain, context: int, layers: Sequence[int]
) -> Iterator[tuple[torch.Tensor, Places]]:
    """States after some layers, float32 `[N, G, D]`, of the tokens of some texts, read causally.

    Raises:
        ModelError: a layer that does not exist.
        DataError: a document without a token.
    """
    with model.borrow_backbone() as backbone:
        chosen = [1 + number for number in _checked(layers, int(backbone.causal_lm.config.num_hidden_layers))]
    yield from read_tokens(model, domain, context, lambda of, pack: of.layer_states(pack)[:, chosen].float())


def _checked(layers: Sequence[int], count: int) -> list[int]:
    if wrong := [number for number in layers if not 0 <= number < count]:
        raise ModelError(f"layer {wrong[0]}: the model has {count} layers, numbered from 0.")
    return list(layers)


def _down_projections(backbone: Backbone) -> list[Any]:
    """The second matrix of every feed-forward layer, in the order of the layers."""
    if backbone.kernel == "padded":
        raise ModelError("neurons can be read where packs are; this family runs padded. Look at latents instead.")
    names = [
        name
        for name, module in backbone.causal_lm.get_decoder().named_modules()
        if name.rpartition(".")[2] in _DOWN and "attn" not in name and "attention" not in name and hasattr(module, "weight")
    ]
    count = int(backbone.causal_lm.config.num_hidden_layers)
    widths = {_width(backbone.causal_lm.get_decoder().get_submodule(name)) for name in names}
    if len(names) != count or len(widths) > 1 or any("expert" in name for name in names):
        family = backbone.causal_lm.config.model_type
        raise ModelError(
            f"family '{family}' does not have one dense hidden layer, always of the same width, in each of its {count} layers: "
            "its neurons cannot be told. Look at latents instead."
        )
    return [backbone.causal_lm.get_decoder().get_submodule(name) for name in names]


def _width(module: Any) -> int:
    """Inputs of a linear layer, or of GPT-2's transposed ones."""
    return int(module.in_features if hasattr(module, "in_features") else module.nx)


@contextmanager
def _inputs_of(modules: Sequence[nn.Module]) -> Iterator[dict[int, torch.Tensor]]:
    """Context in which every forward leaves the inputs of some modules in the mapping, by number."""
    found: dict[int, torch.Tensor] = {}

    def keep(number: int) -> Callable[..., None]:
        return lambda module, inputs: found.__setitem__(number, inputs[0])

    hooks = [module.register_forward_pre_hook(keep(number)) for number, module in enumerate(modules)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
