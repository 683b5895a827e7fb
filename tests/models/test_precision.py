"""`dtype=auto`: bfloat16 where hardware multiplies it, float32 where it would be emulated."""

from __future__ import annotations

import platform

import pytest
import torch

from unified_lm.models.precision import auto_dtype, auto_inference_dtype, bfloat16_unit

CPU = torch.device("cpu")


def on_x86(monkeypatch: pytest.MonkeyPatch, **found: bool) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True, **found})


@pytest.mark.parametrize(
    ("found", "unit"),
    [
        ({}, None),
        ({"amx_tile": True}, None),  # tiles of integers alone
        ({"avx512_bf16": True}, "AVX512-BF16"),
        ({"avx512_bf16": True, "amx_bf16": True}, "AMX"),
    ],
)
def test_units_of_an_x86_processor(monkeypatch: pytest.MonkeyPatch, found: dict[str, bool], unit: str | None) -> None:
    on_x86(monkeypatch, **found)
    assert bfloat16_unit(CPU) == unit
    assert auto_dtype(CPU)[0] == ("float32" if unit is None else "bfloat16")


@pytest.mark.parametrize("has_unit", [True, False])
def test_units_of_an_arm_processor(monkeypatch: pytest.MonkeyPatch, has_unit: bool) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has_unit)
    assert bfloat16_unit(CPU) == ("Arm BF16" if has_unit else None)


@pytest.mark.parametrize("has_unit", [True, False])
def test_units_of_a_cuda_device(monkeypatch: pytest.MonkeyPatch, has_unit: bool) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation: asked.append(including_emulation) or has_unit
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    assert auto_dtype(torch.device("cuda", 0))[0] == ("bfloat16" if has_unit else "float32")
    assert asked == [False], "an emulated type is not fast"


def test_inference_keeps_the_stored_type_where_it_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    on_x86(monkeypatch)
    assert [auto_inference_dtype(stored, CPU) for stored in (torch.float32, torch.bfloat16, torch.float16)] == [
        torch.float32
    ] * 3
    on_x86(monkeypatch, avx512_bf16=True)
    assert auto_inference_dtype(torch.bfloat16, CPU) is torch.bfloat16
    assert auto_inference_dtype(torch.float32, CPU) is torch.float32
