"""Weight files as transformers writes them, byte for byte, with one tensor at a time in memory.

`PreTrainedModel.save_pretrained` wants every tensor at once. What it would write follows from names, shapes and dtypes alone:
transformers' own functions are asked with tensors of the meta device which names a file has (families are renamed, split and
untied on the way), and the values are written to their places as they come.
"""

from __future__ import annotations

import json
import re
import struct
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.serialization import split_state_dict_into_shards_factory
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from unified_lm.core.errors import CheckpointError
from unified_lm.core.raw_tensors import DTYPE_NAMES, raw_bytes
from unified_lm.core.tracing import trace_span

_LAYER = re.compile(r".*?\.\d+\.")


@dataclass(frozen=True)
class Digest:
    """What was written for one tensor of the model.

    Attributes:
        dtype: its type in the file.
        hash: of its bytes.
    """

    dtype: torch.dtype
    hash: bytes

    def is_of(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor has these values; its type may be a wider one."""
        written = tensor.to(self.dtype)
        return torch.equal(written.to(tensor.dtype), tensor) and Digest.of(written) == self

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Digest:
        """The digest of a tensor on the CPU."""
        return cls(tensor.dtype, blake2b(raw_bytes(tensor), digest_size=16).digest())


def write_weights(
    skeleton: PreTrainedModel,
    weights: Iterable[tuple[str, torch.Tensor]],
    folder: Path,
    dtype: torch.dtype,
    max_shard_size: str,
    *,
    digests: bool,
) -> dict[str, Digest]:
    """Write `model*.safetensors`, and an index for several.

    Args:
        skeleton: the model without values, see `merge.skeleton_of`.
        weights: name and value of every tensor of its state, on the CPU; of tied ones the first is written.
        folder: an existing folder.
        dtype: of floating-point tensors, but those that the family keeps in float32.
        max_shard_size: largest file, as in "5GB".
        digests: whether to hash what is written.

    Returns:
        For every name of the state its digest; nothing without `digests`.

    Raises:
        CheckpointError: a tensor of the state did not come.
        OSError: the disk reported an error.
    """
    plan = _Plan(skeleton, dtype, max_shard_size)
    found: dict[str, Digest] = {}
    done: set[str] = set()
    waiting: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    plan.start(folder)
    for name, tensor in weights:
        kept = plan.kept.get(name)
        if kept is None or kept in done:
            continue
        with trace_span(f"write {name}", waits=False):
            cast = tensor.to(plan.dtypes[kept])
            done.add(kept)
            if digests:
                found[kept] = Digest.of(cast)
            group = plan.groups[kept]
            waiting[group][kept] = cast
            if len(waiting[group]) == plan.sizes[group]:
                plan.write(folder, waiting.pop(group))
    if lacking := sorted(set(plan.kept.values()) - done):
        raise CheckpointError(f"{len(lacking)} tensors of the model were not written, e.g. '{lacking[0]}'.")
    plan.write_index(folder)
    return {name: found[kept] for name, kept in plan.kept.items()} if digests else {}


class _Plan:
    """Which file has which tensors, and where.

    Attributes:
        kept: every name of the state -> the name under which its tensor is saved (another one for a tied weight).
        dtypes: saved name of the state -> its dtype in the file.
        groups: saved name of the state -> the group of tensors that are converted together.
        sizes: group -> number of its tensors.
    """

    def __init__(self, skeleton: PreTrainedModel, dtype: torch.dtype, max_shard_size: str) -> None:
        self._skeleton = skeleton
        # Routers of some families lose accuracy in half precision; transformers lists them.
        exact = tuple(getattr(skeleton, "_keep_in_fp32_modules_strict", None) or ())
        state: dict[str, torch.Tensor] = {}
        for name, tensor in skeleton.state_dict().items():
            convert = tensor.is_floating_point() and not any(part in name for part in exact)
            state[name] = torch.empty_like(tensor, dtype=dtype if convert else tensor.dtype, device="meta")
        for name in getattr(skeleton, "_keys_to_ignore_on_save", None) or ():
            state.pop(name, None)
        untied = remove_tied_weights_from_state_dict(dict(state), skeleton)
        same = {id(skeleton.get_parameter_or_buffer(name)): name for name in untied}
        self.kept = {name: same[id(skeleton.get_parameter_or_buffer(name))] for name in state}
        self.dtypes = {name: tensor.dtype for name, tensor in untied.items()}
        saved = self._convert(untied)
        self.groups = {name: name for name in untied} if saved is untied else self._group(untied, saved)
        self.sizes = {
            group: len([name for name in untied if self.groups[name] == group]) for group in set(self.groups.values())
        }
        self._split = split_state_dict_into_shards_factory(
            saved,
            # views of one stacked tensor share their storage, and stay in one file
            get_storage_size=lambda tensor: tensor.untyped_storage().nbytes(),
            get_storage_id=lambda tensor: tensor.untyped_storage()._cdata,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
        self._headers: dict[str, bytes] = {}
        self._places: dict[str, tuple[str, int, tuple[Any, ...]]] = {}
        for file, names in self._split.filename_to_tensors.items():
            self._lay_out(file, {name: saved[name] for name in names})

    def _group(self, state: dict[str, torch.Tensor], saved: dict[str, torch.Tensor]) -> dict[str, str]:
        """By layer, or all at once where the conversion of one layer needs another."""
        layers = {name: match[0] if (match := _LAYER.match(name)) else name for name in state}
        alone: dict[str, Any] = {}
        for layer in set(layers.values()):
            alone |= self._convert({name: tensor for name, tensor in state.items() if layers[name] == layer})
        same = {name: _form(tensor) for name, tensor in alone.items()} == {
            name: _form(tensor) for name, tensor in saved.items()
        }
        return layers if same else dict.fromkeys(state, "all")

    def _convert(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """As the family saves them; the same object where it saves them as they are."""
        return revert_weight_conversion(self._skeleton, tensors)

    def _lay_out(self, file: str, tensors: dict[str, torch.Tensor]) -> None:
        """The header of a file, as safetensors writes it, and the place of each tensor behind it."""
        rank = list(DTYPE_NAMES)
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, tensor in sorted(tensors.items(), key=lambda item: (-rank.index(item[1].dtype), item[0])):
            start, end = end, end + tensor.numel() * tensor.element_size()
            entries[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        text = text.ljust(-(-len(text) // 8) * 8)
        self._headers[file] = struct.pack("<Q", len(text)) + text
        for name, tensor in tensors.items():
            offset = len(self._headers[file]) + entries[name]["data_offsets"][0]
            self._places[name] = (file, offset, _form(tensor))

    def start(self, folder: Path) -> None:
        """Write the headers."""
        for file, header in self._headers.items():
            (folder / file).write_bytes(header)

    def write(self, folder: Path, tensors: dict[str, torch.Tensor]) -> None:
        """Write the tensors of a group to their places."""
        for name, tensor in self._convert(tensors).items():
            file, offset, form = self._places[name]
            assert _form(tensor) == form, f"{name}: {_form(tensor)} instead of {form}"
            with open(folder / file, "r+b") as handle:
                handle.seek(offset)
                handle.write(raw_bytes(tensor))

    def write_index(self, folder: Path) -> None:
        """Write which file has which tensor, where there are several."""
        if not self._split.is_sharded:
            return
        total = {"total_parameters": self._skeleton.num_parameters(), **self._split.metadata}
        index = {"metadata": total, "weight_map": self._split.tensor_to_filename}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _form(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tuple(tensor.shape)
