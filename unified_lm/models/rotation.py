"""Keys at other positions: how a model rotates its keys, found out by asking the model.

A rotary key at position p is R(p) k, and R(a) R(b) = R(a + b): a stored key is moved by d positions with one more rotation by
R(d), without its token or its layer's input. That holds for every table of frequencies that does not depend on the length
(plain, linear, Llama 3, YaRN). What differs between families is the table, which dimensions are rotated, how these are paired,
and in which layers. Nothing here knows a family: a sample is run at two places, and per layer the rotation is taken that turns
the keys of the first into those of the second. Where none does (learned positions) keys cannot be moved, and that is an error,
never an approximation. Frequencies that follow the length (dynamic NTK) stand still up to a length: `models.positions`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import torch

from unified_lm.batch import Pack, Sample, make_pack
from unified_lm.core.errors import ModelError
from unified_lm.models.backbone import Backbone
from unified_lm.models.modes import evaluation_mode

_LENGTH = 8
_DISTANCE = 37
"""Tokens and distance of the two places of the probe: far enough that slow frequencies turn, near enough for short contexts."""

_ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-6, torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""By dtype of the weights: relative difference of keys that rounding may cause in the deepest layer."""


@dataclass(frozen=True, eq=False)
class Rotation:
    """How one layer rotates its keys.

    Attributes:
        inv_freq: float32 `[r / 2]`, radians per position of each pair of dimensions; empty in layers without positions.
        first: the first of the r rotated dimensions of a key.
        neighbors: whether a pair is two neighboring dimensions; else the pairs are (i, i + r / 2).
    """

    inv_freq: torch.Tensor
    first: int = 0
    neighbors: bool = False

    def __call__(self, keys: torch.Tensor, distance: torch.Tensor | int) -> torch.Tensor:
        """Keys as they are `distance` positions later.

        Args:
            keys: `[..., T, d]`. Computed in float32, returned in their own dtype.
            distance: in tokens, an integer or int64 `[T]`.
        """
        size = 2 * len(self.inv_freq)
        if not size:
            return keys
        frequency = self.inv_freq.to(keys.device, torch.float32)
        angle = torch.as_tensor(distance, device=keys.device).float()[..., None] * frequency
        cosine, sine = angle.cos(), angle.sin()
        rotated = keys[..., self.first : self.first + size].float()
        pairs = rotated.unflatten(-1, (-1, 2)) if self.neighbors else rotated.unflatten(-1, (2, -1)).transpose(-1, -2)
        a, b = pairs.unbind(-1)
        turned = torch.stack([a * cosine - b * sine, b * cosine + a * sine], dim=-1)
        turned = (turned if self.neighbors else turned.transpose(-1, -2)).flatten(-2)
        return torch.cat([keys[..., : self.first], turned.to(keys.dtype), keys[..., self.first + size :]], dim=-1)


@torch.no_grad()
def find_rotations(backbone: Backbone) -> tuple[Rotation, ...]:
    """How each layer of a model rotates its keys.

    Args:
        backbone: the model, on its device. Its modes are restored.

    Returns:
        One rotation per layer.

    Raises:
        ModelError: the keys of a layer do not move by a rotation; it says which layer, and by how much the nearest one differs.
    """
    with evaluation_mode(backbone):
        pack = probe_pack(backbone)
        _, here = backbone.key_values(pack)
        _, there = backbone.key_values(replace(pack, position_ids=pack.position_ids + _DISTANCE))
    tables = _tables(backbone)
    limit = _ROUNDING.get(backbone.causal_lm.dtype, 1e-4)
    found = []
    for index, ((before, _), (after, _)) in enumerate(zip(here, there, strict=True)):
        candidates = list(_candidates(tables, before.shape[-1]))
        errors = [_difference(rotation(before.float(), _DISTANCE), after.float()) for rotation in candidates]
        best = int(np.argmin(errors))
        if not errors[best] <= limit:
            raise ModelError(
                f"family '{backbone.causal_lm.config.model_type}': keys of layer {index} cannot be moved to other positions "
                f"(no rotation explains them; the nearest one is {errors[best]:.1e} off). Cached texts of this model cannot be "
                "joined; a single cache at the start of the prompt can be used."
            )
        found.append(candidates[best])
    return tuple(found)


def probe_pack(backbone: Backbone) -> Pack:
    """A short causal sample, on the model's device."""
    ids = (3 + 7 * np.arange(_LENGTH, dtype=np.int64)) % backbone.vocab_size
    return make_pack([Sample(input_ids=ids, stream="probe")]).to(backbone.causal_lm.device)


def _tables(backbone: Backbone) -> list[torch.Tensor]:
    """Every table of frequencies in the model, each once."""
    tables: list[torch.Tensor] = []
    for name, buffer in backbone.causal_lm.named_buffers():
        if name.endswith("inv_freq") and buffer.dim() == 1:
            table = buffer.detach().float().cpu()
            if not any(table.shape == known.shape and torch.equal(table, known) for known in tables):
                tables.append(table)
    return tables


def _candidates(tables: Sequence[torch.Tensor], size: int) -> Iterator[Rotation]:
    yield Rotation(torch.zeros(0))
    for table, neighbors in product(tables, (False, True)):
        # Partly rotated keys have the rotated dimensions first (Phi, GPT-NeoX), or last (multi-head latent attention).
        for first in sorted({0, size - 2 * len(table)}):
            if first >= 0:
                yield Rotation(table, first, neighbors)


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp_min(1e-12))
