"""Liger's fused linear cross-entropy: an option on CUDA, asked for by name and never chosen silently.

Not run in CI, which has no GPU; the mapping of arguments is tested with an injected function of the same signature.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from unified_lm.batch import OutputHead
from unified_lm.core.errors import ModelError

Kernel = Callable[..., torch.Tensor]


def load_liger() -> Kernel:
    """Liger's `liger_fused_linear_cross_entropy`.

    Raises:
        ModelError: liger-kernel is not installed, or there is no CUDA device.
    """
    if not torch.cuda.is_available():
        raise ModelError("cross_entropy 'liger' needs a CUDA device, and none is visible. Use cross_entropy 'chunked'.")
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
    except ImportError as error:
        raise ModelError(
            "cross_entropy 'liger' needs the package liger-kernel: pip install 'unified_lm[liger]', "
            f"or use cross_entropy 'chunked' ({error})."
        ) from error
    kernel: Kernel = liger_fused_linear_cross_entropy
    return kernel


def liger_cross_entropy(
    kernel: Kernel, hidden: torch.Tensor, head: OutputHead, targets: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """`sum_i weights_i * CE_i` through Liger's kernel, as `cross_entropy.linear_cross_entropy`.

    Liger's backward scales by one number, not by one per position, so there is one call per distinct weight: one call under
    "token" normalization, up to one per sample under "sample".

    Args:
        kernel: what `load_liger` returns.
        hidden: `[N, D]`, in the head's dtype.
        head: the output head; its scale is moved to the hidden states and the bias.
        targets: int64 `[N]`.
        weights: `[N]`.
    """
    scaled = hidden.to(head.weight.dtype) * head.scale if head.scale != 1.0 else hidden.to(head.weight.dtype)
    bias = head.bias * head.scale if head.bias is not None else None
    total = hidden.sum() * 0.0 if not len(targets) else hidden.new_zeros((), dtype=torch.float32)
    for weight in weights.unique().tolist():
        at = (weights == weight).nonzero()[:, 0]
        part = kernel(scaled[at], head.weight, targets[at], bias=bias, reduction="sum", softcap=head.softcap)
        total = total + part.float() * weight
    return total
