"""What weights, gradients and optimizer state take on one rank, by backend; `engine.accounting.estimate` adds the rest.

Legend: N parameters, T trained ones, W ranks, b bytes of a weight. AdamW keeps two float32 moments.
"""

from __future__ import annotations

from dataclasses import dataclass

from unified_lm.config.schema import ParallelConfig

_FLOAT32 = 4
_MOMENTS = 2 * _FLOAT32
_TORCH_BUCKET = 64 * 2**20  # engine.backend
_LIVE_ELEMENTS = 1_000_000_000  # DeepSpeed's default of stage3_max_live_parameters


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What the bytes follow from.

    Attributes:
        weights: bytes of all weights on a rank that holds them whole.
        num_parameters: N.
        num_trainable: T.
        num_small: parameters in tensors that ZeRO-3 leaves whole on every rank.
        weight_bytes: b.
        is_bfloat16: whether weights are bfloat16, with float32 masters.
        transient: bytes of the largest gradient before it is added to its float32 sum.
    """

    weights: int
    num_parameters: int
    num_trainable: int
    num_small: int
    weight_bytes: int
    is_bfloat16: bool
    transient: int


def state_bytes(parallel: ParallelConfig, ranks: int, sizes: Sizes) -> dict[str, int]:
    """Bytes of "weights", "gradients", "optimizer" and "communication" on one rank's accelerator.

    Args:
        parallel: backend, buckets and thresholds.
        ranks: W.
        sizes: of the model.
    """
    stage = parallel.zero_stage
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
    part = -(-sizes.num_trainable // ranks)
    bucket = min(parallel.bucket_elements, sizes.num_trainable) * _FLOAT32
    return {
        "weights": sizes.weights,
        "gradients": (part if stage == 2 else sizes.num_trainable) * _FLOAT32 + sizes.transient,
        "optimizer": part * (_MOMENTS + _FLOAT32) if stage else sizes.num_trainable * _MOMENTS,
        "communication": bucket,
    }


def _partitioned(parallel: ParallelConfig, ranks: int, sizes: Sizes) -> dict[str, int]:
    """ZeRO-3. Weights in use are fetched whole, up to DeepSpeed's limit; they count as communication."""
    offloaded = parallel.backend == "zero3_offload"
    part = -(-sizes.num_trainable // ranks)
    held = -(-sizes.weights // ranks) if not (offloaded and parallel.offload_parameters) else 0
    fetched = min(sizes.num_parameters - sizes.num_small, _LIVE_ELEMENTS) * sizes.weight_bytes
    bucket = min(parallel.bucket_elements, sizes.num_trainable) * (sizes.weight_bytes + _FLOAT32)
    return {
        "weights": held + sizes.num_small * sizes.weight_bytes,
        "gradients": (0 if offloaded else part * _FLOAT32) + sizes.transient,
        "optimizer": 0 if offloaded else part * (_MOMENTS + _FLOAT32),
        "communication": (fetched if ranks > 1 else 0) + bucket,
    }
