"""A key for values that were computed with a model and are valid for that model only (cached vectors, reference scores)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from typing import Any

import torch
from transformers import PreTrainedModel

from unified_lm.core import distributed
from unified_lm.core.agreement import broadcast_object
from unified_lm.models.modes import GatherParameters, no_gathering

_BLOCK_BYTES = 1 << 26
"""What one thread hashes at a time. Times the threads, it is the memory that hashing takes on the CPU."""
_MAX_THREADS = 8
_IGNORED_KEYS = ("_name_or_path", "_commit_hash", "transformers_version", "architectures", "dtype", "torch_dtype")
"""Keys of a configuration that do not say what a model computes: its origin, and the dtype, which is hashed per weight."""
_SETTINGS = ("use_cache", "attn_implementation", "quantization_config")
"""Keys that say how a model computes, which settings of the run decide, as do those that begin with an underscore."""


def fingerprint(causal_lm: PreTrainedModel) -> str:
    """A short hash of a model's identity: names and shapes of its parameters, and the first values of each."""
    digest = blake2b(causal_lm.config.model_type.encode(), digest_size=8)
    for name, parameter in causal_lm.named_parameters():
        digest.update(f"{name}{list(parameter.shape)}".encode())
        # 16 values: checkpoints compare fingerprints at every start, and reading whole weights takes seconds per gigabyte
        digest.update(parameter.detach().flatten()[:16].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def identity_key(causal_lm: PreTrainedModel, whole: GatherParameters = no_gathering) -> str:
    """A hash of the configuration (rotary base and scaling, windows, ...) and of every byte of every weight. Collective.

    Unlike `fingerprint`, which checkpoints compare and which reads only 16 values per tensor, it differs between any
    two models. It depends neither on the number of ranks nor on how weights are partitioned. It reads all weights once, on rank
    0, at about a gigabyte per second and thread. For 4-bit weights it covers the codes, not their scales.

    Args:
        causal_lm: the model in its final state; adapters count.
        whole: gathers parameters that are partitioned (ZeRO-3).

    Returns:
        32 hexadecimal digits, the same on every rank.
    """
    return broadcast_object(_content(causal_lm, whole, distributed.is_rank0()))


def held_weights_key(causal_lm: PreTrainedModel) -> str:
    """A hash of every byte of every weight that this rank holds, so that ranks can compare them; partitioned ones are empty."""
    return _content(causal_lm, no_gathering, True)


def configuration_facts(causal_lm: PreTrainedModel) -> dict[str, str]:
    """What a model's configuration says that it computes: dotted key -> JSON value."""
    known = {key: value for key, value in _plain_configuration(causal_lm).items() if key not in _SETTINGS and key[0] != "_"}
    return dict(_leaves(known, ""))


def _leaves(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else key)
    else:
        yield path, json.dumps(value, sort_keys=True, default=str)


def _content(causal_lm: PreTrainedModel, whole: GatherParameters, reads: bool) -> str:
    """Gather every weight, and hash all where `reads`."""
    digest = blake2b(json.dumps(_plain_configuration(causal_lm), sort_keys=True, default=str).encode(), digest_size=16)
    with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as threads:
        for name, parameter in causal_lm.named_parameters():
            with whole([parameter]):
                if reads:
                    digest.update(f"{name} {parameter.dtype} {list(parameter.shape)}".encode())
                    # Blocks are hashed in parallel, and their digests in order, so the result does not depend on the threads.
                    for block in threads.map(_hash, _blocks(parameter.detach())):
                        digest.update(block)
        if reads:
            digest.update(buffers_key(causal_lm).encode())
    return digest.hexdigest()


def buffers_key(causal_lm: PreTrainedModel) -> str:
    """A hash of the persistent buffers that a model computes with (statistics, masks); "" where it has none."""
    state, parameters = causal_lm.state_dict(keep_vars=True), dict(causal_lm.named_parameters(remove_duplicate=False))
    digest = blake2b(digest_size=16)
    found = [(name, value) for name, value in state.items() if name not in parameters and isinstance(value, torch.Tensor)]
    for name, value in found:
        digest.update(f"{name} {list(value.shape)}".encode() + value.detach().double().cpu().numpy().tobytes())
    return digest.hexdigest() if found else ""


def _plain_configuration(causal_lm: PreTrainedModel) -> dict[str, Any]:
    plain: dict[str, Any] = _without_origin(causal_lm.config.to_dict())
    return plain


def _without_origin(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _without_origin(item) for key, item in value.items() if key not in _IGNORED_KEYS}
    return [_without_origin(item) for item in value] if isinstance(value, (list, tuple)) else value


def _blocks(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The bytes of a tensor in blocks, uint8, on its own device."""
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    yield from flat.split(_BLOCK_BYTES)


def _hash(block: torch.Tensor) -> bytes:
    return blake2b(block.cpu().numpy().data, digest_size=16).digest()
