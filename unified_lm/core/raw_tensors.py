"""Tensors as safetensors files hold them: the names of types, and the bytes of values."""

from __future__ import annotations

import torch

DTYPE_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}
"""Name of a type in a header. safetensors writes tensors of a later type before those of an earlier one."""


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The values of a tensor in row-major order; of one on the CPU in that order without a copy."""
    data: memoryview = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return data
