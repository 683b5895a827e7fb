"""Keys and values of texts that were read once, to be read from again: a value that knows what it holds.

A decoder that has read a text needs nothing of it afterwards but the keys and values of its layers. They depend on the text,
on who saw whom while it was read, and on the positions that it had. A `KeyValueCache` owns all of these. So what was computed
for an embedding (bidirectionally, many documents in one pack) can be cut, moved to other positions, joined, and handed to
`generate` of transformers, and equals what one forward under the same blocks computes (`batch.plan.Block`).

Legend: `models/attention/__init__.py`; keys are `[K, T, d]` here and values `[K, T, e]`, as transformers' caches have them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from unified_lm.batch import Block, Pack
from unified_lm.core.errors import ModelError
from unified_lm.models.backbone import Backbone
from unified_lm.models.rotation import Rotation, find_rotations, probe_pack


@dataclass(frozen=True, eq=False)
class KeyValueCache:
    """What a decoder keeps of the tokens that it has read.

    Attributes:
        token_ids: int64 `[T]`, on the CPU.
        position_ids: int64 `[T]`, the positions that the keys have, on the CPU; consecutive.
        layers: per layer its keys `[K, T, d]` and values `[K, T, e]`, on one device.
        blocks: stretches that saw nothing outside themselves when they were read. Tokens outside them were causal.
    """

    token_ids: torch.Tensor
    position_ids: torch.Tensor
    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    blocks: tuple[Block, ...] = ()

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def start(self) -> int:
        """The position of the first token."""
        return int(self.position_ids[0])

    @property
    def num_bytes(self) -> int:
        """Bytes of keys and values."""
        return sum(part.numel() * part.element_size() for layer in self.layers for part in layer)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> KeyValueCache:
        """The same cache on another device, or in another dtype."""
        layers = tuple((k.to(device=device, dtype=dtype), v.to(device=device, dtype=dtype)) for k, v in self.layers)
        return replace(self, layers=layers)

    def __getitem__(self, part: slice) -> KeyValueCache:
        """Some neighboring tokens. States that were read bidirectionally, or after others, keep what they know of the rest.

        Raises:
            ModelError: the slice is empty, or skips tokens.
        """
        start, stop, stride = part.indices(len(self))
        if stride != 1 or start >= stop:
            raise ModelError(f"a cache of {len(self)} tokens has no part [{part.start}:{part.stop}:{part.step}]")
        layers = tuple((k[:, start:stop], v[:, start:stop]) for k, v in self.layers)
        cut = [
            Block(max(b.start, start) - start, min(b.stop, stop) - start, b.bidirectional, b.keep_first and b.start >= start)
            for b in self.blocks
        ]
        blocks = tuple(block for block in cut if block.start < block.stop)
        return KeyValueCache(self.token_ids[start:stop], self.position_ids[start:stop], layers, blocks)

    def moved(self, start: int, rotations: Sequence[Rotation]) -> KeyValueCache:
        """The same tokens at other positions.

        Args:
            start: the new position of the first token.
            rotations: of the model that read them (`models.rotation.find_rotations`).
        """
        distance = start - self.start
        if not distance:
            return self
        layers = tuple((turn(k, distance), v) for (k, v), turn in zip(self.layers, rotations, strict=True))
        return replace(self, layers=layers, position_ids=self.position_ids + distance)

    def to_transformers(self, config: PreTrainedConfig) -> DynamicCache:
        """A cache for `generate` and `forward` of transformers, with a batch of one row.

        The ids that are then passed to `generate` begin with `token_ids`. Keys and values are copied: generation appends to its
        cache and leaves this one alone.

        Args:
            config: of the model, which says which layers have a sliding window.

        Raises:
            ModelError: the first token is not at position 0; transformers counts positions from there.
        """
        if self.start:
            raise ModelError(f"the cache begins at position {self.start}, and generation counts from 0. Move it there first.")
        cache = DynamicCache(config=config)
        for index, (keys, values) in enumerate(self.layers):
            cache.update(keys[None].clone(), values[None].clone(), index)
        return cache

    @classmethod
    def from_transformers(cls, cache: DynamicCache, token_ids: torch.Tensor) -> KeyValueCache:
        """What transformers has read causally from position 0, in a batch of one row.

        Args:
            cache: filled by `forward` or `generate`.
            token_ids: int64 `[T]`, the tokens that are in it.

        Raises:
            ModelError: it holds another number of tokens in some layer (a sliding window drops old ones), or several rows.
        """
        layers: list[tuple[torch.Tensor, torch.Tensor]] = [
            (layer.keys, layer.values)
            for layer in cache.layers
            if isinstance(layer, DynamicLayer) and layer.keys is not None and layer.values is not None
        ]
        if len(layers) != len(cache.layers):
            raise ModelError(f"{len(cache.layers) - len(layers)} of {len(cache.layers)} layers of the cache hold no keys")
        shapes = {(keys.shape[0], keys.shape[2]) for keys, _ in layers}
        if shapes != {(1, len(token_ids))}:
            raise ModelError(
                f"expected {len(token_ids)} tokens in one row of every layer, the cache has (rows, tokens) {sorted(shapes)}. "
                "Layers with a sliding window keep the last tokens only; read the text with a KeyValueReader to keep them all."
            )
        positions = torch.arange(len(token_ids))
        return cls(token_ids.cpu(), positions, tuple((keys[0], values[0]) for keys, values in layers))


class KeyValueReader:
    """Reads texts with a model, many in one forward, and keeps their keys and values.

    Args:
        backbone: the model, on its device, in evaluation mode.

    Raises:
        ModelError: a layer has no keys, the model runs padded, or transformers caches something else than keys and values for
            this family (DeepSeek: latent vectors), so that `generate` could not go on from them.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self._check_stock_cache()

    @cached_property
    def rotations(self) -> tuple[Rotation, ...]:
        """How the model's keys are moved.

        Raises:
            ModelError: they cannot be moved (`models.rotation`).
        """
        return find_rotations(self.backbone)

    @torch.no_grad()
    def read(self, pack: Pack) -> tuple[torch.Tensor, list[KeyValueCache]]:
        """Read the texts of a pack.

        Args:
            pack: on the model's device; each sample is causal, bidirectional but perhaps for its first token, or has blocks.

        Returns:
            The hidden states `[T, D]` of the pack, and a cache for each sample, in the order of `pack.samples`. Caches are
            copies: they do not keep the whole pack alive.

        Raises:
            ModelError: a sample has a partial bidirectional span.
        """
        hidden, layers = self.backbone.key_values(pack)
        caches = []
        for sample, offset in zip(pack.samples, pack.plan.offsets, strict=False):
            rows, (start, stop) = slice(offset, offset + len(sample)), sample.bidirectional
            if stop > start and (start > 1 or stop < len(sample)):
                raise ModelError(f"a text with a partial bidirectional span [{start}, {stop}) cannot be cached; use blocks")
            caches.append(
                KeyValueCache(
                    token_ids=pack.input_ids[rows].cpu(),
                    position_ids=pack.position_ids[rows].cpu(),
                    layers=tuple(
                        (keys[rows].transpose(0, 1).contiguous(), values[rows].transpose(0, 1).contiguous())
                        for keys, values in layers
                    ),
                    blocks=(Block(0, stop, bidirectional=True, keep_first=start == 1),) if stop > start else sample.blocks,
                )
            )
        return hidden, caches

    def join(self, caches: Sequence[KeyValueCache], recompute: int = 0) -> KeyValueCache:
        """Caches one after the other, each moved to follow the one before it, from position 0.

        The result is what one forward computes if each of them is a block. What is read after it sees them all.

        Args:
            caches: at least one, on one device.
            recompute: so many first tokens of every cache but the first are read again, causally, after all that stands before
                them; the others keep what they knew. A remedy for models that were not trained on blocks (EPIC,
                arXiv:2410.15332): tokens that begin a text alone draw much attention, which they should not in its middle.

        Raises:
            ModelError: something has to move, and the model's keys cannot; or they are more tokens than its positions.
        """
        self.backbone.check_length(sum(map(len, caches)))
        if len(caches) > 1:
            caches = [cache if cache.blocks else replace(cache, blocks=(Block(0, len(cache)),)) for cache in caches]
        if not recompute:
            return self._concatenate(caches)
        joined = self._concatenate(caches[:1])
        for cache in caches[1:]:
            first = self.read_after(joined, cache.token_ids[:recompute])
            rest = [cache[recompute:]] if len(cache) > recompute else []
            joined = self._concatenate([joined, first, *rest])
        return joined

    @torch.no_grad()
    def read_after(self, past: KeyValueCache, token_ids: torch.Tensor) -> KeyValueCache:
        """Read a text causally after what a cache holds, all of which it sees.

        Args:
            past: from position 0 on.
            token_ids: int64 `[T]`.

        Raises:
            ModelError: layers with a sliding window have dropped what is older.
        """
        with self.backbone.stock_attention() as model:
            cache = past.to_transformers(model.config)
            model.get_decoder()(input_ids=token_ids[None].to(past.layers[0][0].device), past_key_values=cache, use_cache=True)
        return KeyValueCache.from_transformers(cache, torch.cat([past.token_ids, token_ids.cpu()]))[len(past) :]

    def _concatenate(self, caches: Sequence[KeyValueCache]) -> KeyValueCache:
        start, parts, blocks = 0, [], list[Block]()
        for cache in caches:
            parts.append(cache if cache.start == start else cache.moved(start, self.rotations))
            blocks += [replace(block, start=block.start + start, stop=block.stop + start) for block in cache.blocks]
            start += len(cache)
        layers = [
            (torch.cat([keys for keys, _ in layer], dim=1), torch.cat([values for _, values in layer], dim=1))
            for layer in zip(*(part.layers for part in parts), strict=True)
        ]
        ids = torch.cat([part.token_ids for part in parts])
        return KeyValueCache(ids, torch.arange(start), tuple(layers), tuple(blocks))

    @torch.no_grad()
    def _check_stock_cache(self) -> None:
        _, layers = self.backbone.key_values(probe_pack(self.backbone))
        with self.backbone.stock_attention() as model:
            tokens = probe_pack(self.backbone).input_ids[None]
            stock = model.get_decoder()(input_ids=tokens, use_cache=True).past_key_values
        kept = [tuple(_sizes(getattr(layer, part, None)) for part in ("keys", "values")) for layer in stock.layers]
        ours = [tuple(_sizes(part.transpose(0, 1)[None]) for part in layer) for layer in layers]
        if kept != ours:
            raise ModelError(
                f"family '{model.config.model_type}' caches (heads, size) {kept[:1]} where its layers attend to keys and "
                f"values of {ours[0]}: what it has read cannot be handed to generation."
            )


def _sizes(cached: torch.Tensor | None) -> tuple[int, ...]:
    """Heads and size of a head; how many tokens a layer keeps is another matter (sliding windows)."""
    return () if cached is None else (cached.shape[1], cached.shape[3])
