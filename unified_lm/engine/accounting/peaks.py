"""Peak operations per second of a device: the denominator of MFU."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType

import torch

_TERA = 1e12
_GEMM_SIZE = MappingProxyType({"cpu": 1024, "cuda": 8192})  # large enough to reach the peak, small enough to repeat
_GEMM_SECONDS = 0.2

BF16_DENSE_TFLOPS = MappingProxyType(
    {
        # Dense bfloat16 tensor-core peaks at boost clock from the vendors' data sheets. They often print the number "with
        # sparsity", which is twice as large.
        r"\bB200\b": 2250.0,  # NVIDIA DGX B200 data sheet (2024): 36 PFLOPS sparse for 8
        r"\bGH200\b": 989.4,  # NVIDIA GH200 data sheet (2023)
        r"\bH200 NVL\b": 835.5,  # NVIDIA H200 data sheet (2024)
        r"\bH200\b": 989.4,  # NVIDIA H200 data sheet (2024)
        r"\bH100 NVL\b": 835.5,  # NVIDIA H100 data sheet (2024)
        r"\bH100 PCIe\b": 756.0,  # NVIDIA H100 architecture white paper (2022), table 2
        r"\bH100\b": 989.4,  # NVIDIA H100 architecture white paper (2022), table 2: SXM5
        r"\bH800\b": 989.4,  # as H100 SXM5; only its links are slower
        r"\bA100\b": 312.0,  # NVIDIA A100 architecture white paper (2020), table 1; SXM and PCIe alike
        r"\bA800\b": 312.0,  # as A100; only its links are slower
        r"\bA30\b": 165.0,  # NVIDIA A30 data sheet (2021)
        r"\bA40\b": 149.7,  # NVIDIA A40 data sheet (2021)
        r"\bA10\b": 125.0,  # NVIDIA A10 data sheet (2021)
        r"\bL40S\b": 362.05,  # NVIDIA L40S data sheet (2023)
        r"\bL40\b": 181.05,  # NVIDIA L40 data sheet (2022)
        r"\bL4\b": 121.0,  # NVIDIA L4 data sheet (2023)
        r"\bRTX A6000\b": 154.8,  # NVIDIA Ampere GA102 white paper (2021), table 3
        r"\bRTX 4090\b": 165.2,  # NVIDIA Ada white paper (2022), appendix A: float32 accumulation
        r"\bRTX 3090\b": 71.0,  # NVIDIA Ampere GA102 white paper (2021), table 9: float32 accumulation
        r"\bMI300X\b": 1307.4,  # AMD Instinct MI300X data sheet (2023)
    }
)
"""Regular expression for the device's name -> dense bfloat16 peak in TFLOP/s. The first match counts."""


@dataclass(frozen=True)
class Peak:
    """The peak of one device at one precision.

    Attributes:
        flops: operations per second.
        source: "data sheet", or "measured" for the fastest matrix product in this process.
    """

    flops: float
    source: str


def device_peak(device: torch.device, dtype: torch.dtype) -> Peak:
    """The peak of a device: from the table for half precision on a known accelerator, otherwise measured once per process.

    Args:
        device: where the run computes.
        dtype: of its computation.
    """
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        listed = listed_peak(torch.cuda.get_device_name(device))
        if listed is not None:
            return listed
    return Peak(measured_gemm(device, dtype), "measured")


def listed_peak(device_name: str) -> Peak | None:
    """The peak from the table by the device's name ("NVIDIA H100 80GB HBM3"), or None if it is not listed."""
    for pattern, teraflops in BF16_DENSE_TFLOPS.items():
        if re.search(pattern, device_name.replace("-", " ")):
            return Peak(teraflops * _TERA, "data sheet")
    return None


@cache
def measured_gemm(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of the fastest of several square matrix products, with the threads of this process.

    Takes about a fifth of a second, once per process. On a busy machine it is lower, which makes MFU higher.

    Args:
        device: where to measure.
        dtype: of the matrices.
    """
    size = _GEMM_SIZE.get(device.type, 4096)
    left = torch.full((size, size), 0.5, dtype=dtype, device=device)
    result = torch.empty_like(left)
    best, started = float("inf"), time.perf_counter()
    while best == float("inf") or time.perf_counter() - started < _GEMM_SECONDS:
        begin = time.perf_counter()
        torch.mm(left, left, out=result)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - begin)
    return 2.0 * size**3 / best
