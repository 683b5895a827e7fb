"""A key for numbers that were computed with a model and are to be used with that model only."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from hashlib import blake2b
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from unified_lm.core import distributed
from unified_lm.core.agreement import broadcast_object

_BLOCK_BYTES = 1 << 26
"""Hashed at a time by one thread: what a hash holds of a model on the CPU, times the threads."""
_MAX_THREADS = 8
_LEFT_OUT = ("_name_or_path", "_commit_hash", "transformers_version", "architectures", "dtype", "torch_dtype")
"""Keys of a configuration that say where a model comes from, not what it computes, and its dtype, which every weight has."""

Whole = Callable[[Sequence[nn.Parameter]], AbstractContextManager[None]]


def _always_whole(_: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
    return nullcontext()


def identity_key(causal_lm: PreTrainedModel, whole: Whole = _always_whole) -> str:
    """A hash of the configuration (rotary base and scaling, windows, ...) and of every byte of every weight. Collective.

    Unlike `loading.fingerprint`, which checkpoints compare and which reads 16 values a tensor, two models do not share it. It
    does not depend on the number of ranks, nor on how they split the weights. It costs one reading of the weights, on rank 0:
    a gigabyte a second and thread. Of 4-bit weights the codes count, not their scales.

    Args:
        causal_lm: as it will compute; adapters count.
        whole: gives parameters their whole values where ranks hold parts (ZeRO-3).

    Returns:
        32 hexadecimal digits, the same on every rank.
    """
    digest = blake2b(_configuration(causal_lm).encode(), digest_size=16)
    with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as threads:
        for name, parameter in causal_lm.named_parameters():
            with whole([parameter]):
                if distributed.is_rank0():
                    digest.update(f"{name} {parameter.dtype} {list(parameter.shape)}".encode())
                    for block in threads.map(_hash, _blocks(parameter.detach())):
                        digest.update(block)
    return broadcast_object(digest.hexdigest())


def _configuration(causal_lm: PreTrainedModel) -> str:
    return json.dumps(_without_origin(causal_lm.config.to_dict()), sort_keys=True, default=str)


def _without_origin(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _without_origin(item) for key, item in value.items() if key not in _LEFT_OUT}
    return [_without_origin(item) for item in value] if isinstance(value, (list, tuple)) else value


def _blocks(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The bytes of a tensor, uint8, still where the tensor lies."""
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    yield from flat.split(_BLOCK_BYTES)


def _hash(block: torch.Tensor) -> bytes:
    return blake2b(block.cpu().numpy().data, digest_size=16).digest()
