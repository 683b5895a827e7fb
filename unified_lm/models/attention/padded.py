"""Padding instead of packing, for families without the attention interface: one row per sequence and a 4-D mask.

It wastes time and memory on padding, so it is never chosen automatically, only by `kernel="padded"`.
Legend: `attention/__init__.py`; here L is the longest sequence of the pack.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from unified_lm.batch import Pack


@dataclass(frozen=True, eq=False)
class PaddedBatch:
    """A pack as a padded batch.

    Attributes:
        input_ids: int64 `[S, L]`, 0 at padding.
        position_ids: int64 `[S, L]`, 0 at padding.
        mask: float `[S, 1, L, L]` to be added to the scores (0 or the dtype's minimum), or one such mask per layer type.
        rows: int64 `[T]`, the index of each of the pack's tokens in the flattened batch `[S * L]`.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    mask: torch.Tensor | dict[str, torch.Tensor]
    rows: torch.Tensor


def pad(pack: Pack, config: Any, dtype: torch.dtype) -> PaddedBatch:
    """Arrange a pack's sequences as rows of a padded batch.

    Args:
        pack: the sequences.
        config: the decoder's configuration, which says which layers have a sliding window.
        dtype: of the mask; must be that of the decoder's hidden states.
    """
    plan, device = pack.plan, pack.input_ids.device
    longest = plan.max_seqlen
    rows = torch.cat([torch.arange(n) + i * longest for i, n in enumerate(plan.lengths)]).to(device)

    def scatter(values: torch.Tensor) -> torch.Tensor:
        """`[T]` to `[S, L]`, 0 at padding."""
        batch = values.new_zeros(len(plan.lengths) * longest)
        return batch.index_copy(0, rows, values).view(-1, longest)

    return PaddedBatch(scatter(pack.input_ids), scatter(pack.position_ids), _masks(pack, config, dtype, device), rows)


def _masks(pack: Pack, config: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor | dict[str, torch.Tensor]:
    """One mask, or for families that mix layer types one per type, under the names that transformers uses."""
    window = getattr(config, "sliding_window", None) or None  # some families write 0 for none
    layer_types = getattr(config, "layer_types", None)

    def mask(sliding_window: int | None) -> torch.Tensor:
        """The mask of layers with this window, built once per pack."""
        key = ("padded", sliding_window, dtype, device)
        if key not in pack.plan.kernel_cache:
            pack.plan.kernel_cache[key] = _additive_mask(pack, sliding_window, dtype).to(device)
        return pack.plan.kernel_cache[key]

    # transformers uses a mask that is already 4-D as it is, instead of building its own from a 2-D one.
    if layer_types is None:
        return mask(window)
    if "sliding_attention" in layer_types:
        return {"full_attention": mask(None), "sliding_attention": mask(window)}
    return mask(None)


def _additive_mask(pack: Pack, sliding_window: int | None, dtype: torch.dtype) -> torch.Tensor:
    """Float `[S, 1, L, L]`, 0 where a token is seen and the dtype's minimum elsewhere, on the CPU."""
    plan = pack.plan
    seen = torch.zeros(len(plan.lengths), 1, plan.max_seqlen, plan.max_seqlen, dtype=torch.bool)
    seen[..., 0] = True  # a padding row sees its sequence's first token, so that no row is empty
    for index, length in enumerate(plan.lengths):
        seen[index, 0, :length, :length] = plan.mask(index, sliding_window)
    # The dtype's minimum instead of minus infinity, as in transformers' own masks.
    return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)
