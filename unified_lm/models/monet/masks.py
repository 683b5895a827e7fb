"""Experts that are left out of a MONET model: a small file, and what applies it."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import nn

from unified_lm.core.errors import ModelError
from unified_lm.models.monet.router import MonetRouter, find_routers

_KEEP = "keep"
_FORMAT = "unified_lm expert mask 1"


@dataclass(frozen=True, eq=False)
class ExpertMask:
    """Which experts take part.

    Attributes:
        keep: bool `[G, E, E]`, by router in the order of the layers; an expert (i, j) is key i of the first side with j of the
            second, in every layer of the router's group.
        routers: `router_key` of the model that it was made for.
        note: what it is for.
    """

    keep: np.ndarray
    routers: str
    note: str = ""

    @property
    def num_left_out(self) -> list[int]:
        """Experts that do not take part, by router."""
        return [int((~of_router).sum()) for of_router in self.keep]

    def save(self, path: Path) -> None:
        """Write it, a bit an expert.

        Raises:
            OSError: it cannot be written.
        """
        metadata = {"format": _FORMAT, "shape": ",".join(map(str, self.keep.shape)), "routers": self.routers, "note": self.note}
        save_file({_KEEP: np.packbits(self.keep)}, path, metadata)

    @classmethod
    def load(cls, path: Path) -> ExpertMask:
        """Read one that `save` wrote.

        Raises:
            ModelError: no such file, or another one.
        """
        try:
            with safe_open(path, framework="np") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise ValueError("a file of another format")
                packed = file.get_tensor(_KEEP)
            shape = tuple(map(int, metadata["shape"].split(",")))
            keep = np.unpackbits(packed, count=int(np.prod(shape))).astype(bool).reshape(shape)
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise ModelError(f"{path} is no mask of experts ({error}). `unified-lm experts domains` writes them.") from error
        return cls(keep, metadata.get("routers", ""), metadata.get("note", ""))


def routers_of(model: nn.Module) -> list[MonetRouter]:
    """The routers of a MONET model, in the order of the layers.

    Raises:
        ModelError: it has none.
    """
    found = find_routers(model)
    if not found:
        family = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        raise ModelError(f"family '{family}' has no experts of product keys: only MONET's can be read and edited so.")
    return found


def router_key(model: nn.Module) -> str:
    """A hash of everything by which routers choose: experts of models that agree in it are the same ones."""
    digest = blake2b(digest_size=8)
    for router in routers_of(model):
        for tensor in (router.w1.weight, router.w2.weight, *router.statistics):
            # Rounded, so that it does not matter in which precision the model was loaded.
            digest.update(tensor.detach().bfloat16().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def apply_mask(model: Any, mask: ExpertMask | None) -> None:
    """Leave experts out of a model, which saves with them left out too; None has all take part.

    Raises:
        ModelError: the mask is of another model, or leaves a router no expert.
    """
    routers = routers_of(model)
    if mask is None:
        model.config.moe_masked = False
        for router in routers:
            router.keep = None
        return
    expected = (len(routers), routers[0].keys, routers[0].keys)
    if mask.keep.shape != expected:
        raise ModelError(f"the mask is of {list(mask.keep.shape)} experts, and this model has {list(expected)}.")
    if mask.routers != router_key(model):
        raise ModelError(
            f"the mask was made for a model with other routers ({mask.routers}), whose experts are not those of this model "
            f"({router_key(model)}). Read this model's routing and make the mask again."
        )
    if empty := [number for number, of_router in enumerate(mask.keep) if not of_router.any()]:
        raise ModelError(f"the mask leaves router {empty[0]} no expert at all: the layers of its group would do nothing.")
    model.config.moe_masked = True
    for router, of_router in zip(routers, mask.keep, strict=True):
        router.keep = torch.from_numpy(of_router.copy()).to(router.w1.weight.device)


def leave_out(model: Any, mask: ExpertMask) -> None:
    """Leave experts out of a model beside those that it leaves out already.

    Raises:
        ModelError: see `apply_mask`.
    """
    before = [router.keep for router in routers_of(model)]
    apply_mask(model, mask)
    for router, keep in zip(routers_of(model), before, strict=True):
        if keep is not None and router.keep is not None:
            router.keep = router.keep & keep
