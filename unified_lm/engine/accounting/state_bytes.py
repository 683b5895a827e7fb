"""Bytes of weights, gradients and optimizer state on one rank, by backend; `engine.accounting.estimate` adds the rest.

Legend: N parameters, T trained parameters, W ranks, b bytes of a weight. AdamW keeps two float32 moments.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from unified_lm.config.schema import ParallelConfig

_FLOAT32 = 4
_MOMENTS = 2 * _FLOAT32
_TORCH_BUCKET = 64 * 2**20  # `_BUCKET_ELEMENTS` of engine.backends.optimizer, in bytes
_LIVE_ELEMENTS = 1_000_000_000  # DeepSpeed's default of stage3_max_live_parameters


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of a model.

    Attributes:
        weights: bytes of all weights on a rank that holds them whole.
        num_parameters: N.
        num_trainable: T.
        num_small: number of parameters in tensors that ZeRO-3 keeps whole on every rank.
        weight_bytes: b.
        is_bfloat16: whether weights are bfloat16, with float32 master copies.
        transient: bytes of the largest gradient before it is added to its float32 sum.
        num_whole: number of trained float32 parameters beside bfloat16 ones, which ZeRO leaves whole.
    """

    weights: int
    num_parameters: int
    num_trainable: int
    num_small: int
    weight_bytes: int
    is_bfloat16: bool
    transient: int
    num_whole: int = 0


def state_bytes(parallel: ParallelConfig, ranks: int, sizes: Sizes) -> dict[str, int]:
    """Bytes of "weights", "gradients", "optimizer" and "communication" on one rank's accelerator.

    Args:
        parallel: backend, buckets and thresholds.
        ranks: W.
        sizes: of the model.
    """
    stage = parallel.zero_stage
    if stage is not None and sizes.num_whole:
        whole = sizes.num_whole
        shared = replace(
            sizes,
            num_whole=0,
            weights=sizes.weights - _FLOAT32 * whole,
            num_parameters=sizes.num_parameters - whole,
            num_trainable=sizes.num_trainable - whole,
        )
        own = {"weights": _FLOAT32 * whole, "gradients": _FLOAT32 * whole, "optimizer": _MOMENTS * whole}
        return {part: size + own.get(part, 0) for part, size in state_bytes(parallel, ranks, shared).items()}
    if stage is None:
        masters = _FLOAT32 if sizes.is_bfloat16 else 0
        return {
            "weights": sizes.weights,
            "gradients": sizes.num_trainable * _FLOAT32 + sizes.transient,
            "optimizer": sizes.num_trainable * (_MOMENTS + masters),
            "communication": min(_TORCH_BUCKET, sizes.num_trainable * _FLOAT32) if ranks > 1 else 0,
        }
    if stage == 3:
        return _partitioned(parallel, ranks, sizes)
    part = -(-sizes.num_trainable // ranks)  # rounded up, as DeepSpeed pads partitions to equal size
    bucket = min(parallel.bucket_elements, sizes.num_trainable) * _FLOAT32
    return {
        "weights": sizes.weights,
        "gradients": (part if stage == 2 else sizes.num_trainable) * _FLOAT32 + sizes.transient,
        # Stages 1 and 2 keep float32 masters of float32 weights too; stage 0 updates the weights in place.
        "optimizer": part * (_MOMENTS + _FLOAT32) if stage else sizes.num_trainable * _MOMENTS,
        "communication": bucket,
    }


def _partitioned(parallel: ParallelConfig, ranks: int, sizes: Sizes) -> dict[str, int]:
    """State under ZeRO-3. Weights in use are gathered whole, up to DeepSpeed's limit; they count as communication."""
    offloaded = parallel.backend == "zero3_offload"
    part = -(-sizes.num_trainable // ranks)
    held = -(-sizes.weights // ranks) if not (offloaded and parallel.offload_parameters) else 0
    gathered = min(sizes.num_parameters - sizes.num_small, _LIVE_ELEMENTS) * sizes.weight_bytes
    bucket = min(parallel.bucket_elements, sizes.num_trainable) * (sizes.weight_bytes + _FLOAT32)
    return {
        "weights": held + sizes.num_small * sizes.weight_bytes,
        "gradients": (0 if offloaded else part * _FLOAT32) + sizes.transient,
        "optimizer": 0 if offloaded else part * (_MOMENTS + _FLOAT32),
        "communication": (gathered if ranks > 1 else 0) + bucket,
    }
