"""Types of weights: which the hardware multiplies fast (what `dtype=auto` means on this machine), and 4-bit ones.

Every processor can compute in bfloat16, but without units for it each product is converted to float32 and back: four times as
slow as float32 on an AVX-512 server without them (41 against 157 GFLOP/s).
"""

from __future__ import annotations

import importlib.util
import platform

import torch
from transformers import BitsAndBytesConfig

from unified_lm.core.errors import ModelError

AUTO = "auto"
"""Name of a dtype that the machine decides."""


def bfloat16_unit(device: torch.device) -> str | None:
    """What multiplies bfloat16 on a device, as text for messages; None where nothing does."""
    if device.type == "cuda":
        supported = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.cuda.get_device_name(device) if supported else None
    if device.type != "cpu":
        return None
    if platform.machine().lower() in ("aarch64", "arm64"):
        # oneDNN's test; where torch is built without it (macOS), products are converted whatever the processor can do
        has_unit = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return "Arm BF16" if has_unit else None
    # not oneDNN's test, which on x86 also accepts processors that only convert
    found = torch.cpu.get_capabilities()
    return next((name for key, name in (("amx_bf16", "AMX"), ("avx512_bf16", "AVX512-BF16")) if found.get(key)), None)


def auto_dtype(device: torch.device) -> tuple[str, str]:
    """What `dtype=auto` means for training on a device.

    Returns:
        "bfloat16" where hardware multiplies it, else "float32"; and a clause that says why.
    """
    unit = bfloat16_unit(device)
    if unit is not None:
        return "bfloat16", f"this machine multiplies it in hardware ({unit})"
    return "float32", "this machine has no units for bfloat16, which would be several times slower"


def auto_inference_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """What `dtype=auto` means for reading weights: the stored type, unless the device would only emulate it.

    float16 is fast on every CUDA device, and counts on a CPU as emulated.

    Args:
        stored: type of the stored weights.
        device: where they will be multiplied.
    """
    if stored is torch.bfloat16 and bfloat16_unit(device) is None:
        return torch.float32
    if stored is torch.float16 and device.type == "cpu":
        return torch.float32
    return stored


def four_bit_config(compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """4-bit NF4 with double quantization (QLoRA, Dettmers et al. 2023, arXiv 2305.14314, section 3).

    Args:
        compute_dtype: of the products with the dequantized weights.

    Raises:
        ModelError: bitsandbytes or CUDA is missing.
    """
    missing = []
    if importlib.util.find_spec("bitsandbytes") is None:
        missing.append("bitsandbytes is not installed (pip install 'unified_lm[qlora]')")
    if not torch.cuda.is_available():
        missing.append("there is no CUDA device")
    if missing:
        raise ModelError(f"lora.quantize_4bit=true, but {' and '.join(missing)}. Or set lora.quantize_4bit=false.")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )
