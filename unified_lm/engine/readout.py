"""What a forward hands out beside embeddings and token losses, for the coupled terms of a step.

Backbone, heads and losses run inside one module forward (`engine.training_module`), so a term cannot reach into the model
afterwards. Instead it names a readout: a function of what the forward computed, called inside it, whose tensors arrive in
`PackOutput.readouts` under its name. The module and the backends carry them without knowing what they mean.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from unified_lm.batch import OutputHead, Pack


@dataclass(frozen=True, eq=False)
class PackStates:
    """What the backbone computed of one pack.

    Attributes:
        hidden: `[T, D]`, last hidden states after the final norm, in the model's dtype.
        router_logits: per layer with experts `[T, E]`, before any softmax; empty where no readout reads routers.
        head: the output head where the pack has labels and these are read in this forward, else None.
        pooling: how states of a pool span become one vector (`models.pooling`).
    """

    hidden: torch.Tensor
    router_logits: tuple[torch.Tensor, ...] = ()
    head: OutputHead | None = None
    pooling: str = "mean"


class Readout(ABC):
    """Tensors of one pack for one coupled term.

    Attributes:
        name: under which they appear in `PackOutput.readouts`; unique within a module.
        labeled_streams: streams whose labels it reads through the output head. They have no token objective. Such a readout is
            left out of graph-free forwards, as token losses are, and yields nothing for packs without labels of these streams.
        reads_routers: whether it needs `PackStates.router_logits`.
    """

    name: ClassVar[str]
    labeled_streams: Collection[str] = ()
    reads_routers: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, states: PackStates, pack: Pack) -> Mapping[str, torch.Tensor]:
        """Read one pack. Called in the precision that the backbone runs in, autocast included.

        Args:
            states: what was computed; with a graph while training.
            pack: whose it is, on the same device. It may be an empty one (`batch.empty_pack`), without samples.

        Returns:
            Floating tensors of any shape by a key of the readout's choice, usually the stream. They may carry a gradient. Keep
            them small: GradCache holds those of all first forwards at once.
        """
