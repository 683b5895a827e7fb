"""Fold low-rank adapters into the base weights, exactly, and prove it before anyone relies on it.

W' = W + (alpha / r) B A (LoRA, arXiv:2106.09685, section 4.1), computed in float32 and rounded once to the type that W had.
Merging in bfloat16 rounds the small update away and shifts the outputs.
"""

from __future__ import annotations

import copy
from typing import cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_module_weight
from torch import nn
from transformers import PreTrainedModel

from unified_lm.core.errors import CheckpointError
from unified_lm.models.lora import lora_deltas, remove_lora

TOLERANCE = 1e-4
"""Largest difference of hidden states, merged against adapter, in float32 and relative to the largest state. The two add in
another order: a tiny model differs by 1e-6, SmolLM2's 30 layers after SimCSE by 1.25e-5. Merging in bfloat16 gives 1e-3."""

_PROBE_SHAPE = (2, 24)


def has_adapters(causal_lm: nn.Module) -> bool:
    """Whether any layer carries a peft adapter."""
    return any(isinstance(module, BaseTunerLayer) for module in causal_lm.modules())


@torch.no_grad()
def merge_lora(causal_lm: PreTrainedModel, *, verify: bool = True) -> PreTrainedModel:
    """Return a plain copy of the model with its adapters folded into the base weights.

    The model given is left as it is. The copy lives on the CPU; while merging it takes 4 bytes per parameter.

    Args:
        causal_lm: a causal language model with the adapters of `models.lora.apply_lora`. One without any is only copied.
        verify: compare hidden states of a probe before and after merging, in float32 and in eval mode.

    Returns:
        A stock model on the CPU: no peft module left, eval mode, stock attention, each weight in the type that its base
        weight had (4-bit weights: dequantised, in the model's compute type).

    Raises:
        CheckpointError: merged and adapter disagree.
    """
    dtypes = _storage_types(causal_lm)
    model = _float32_copy(causal_lm)
    before = _probe(model) if verify else None
    for update in lora_deltas(model):
        update.base.add_(update.delta)
    remove_lora(model)
    _drop_peft_traces(model)
    if before is not None:
        _check_equal(before, _probe(model))
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtypes[name])
    return model


def _storage_types(source: PreTrainedModel) -> dict[str, torch.dtype]:
    """Name of each parameter after merging -> the type it is stored in."""
    compute = next((p.dtype for p in source.parameters() if p.is_floating_point()), torch.float32)
    types = {}
    for name, parameter in source.named_parameters():
        plain = ".".join(part for part in name.split(".") if part != "base_layer")
        types[plain] = parameter.dtype if parameter.is_floating_point() else compute
    return types


def _float32_copy(source: PreTrainedModel) -> PreTrainedModel:
    """A structural copy with every weight as float32 on the CPU, quantised layers as linear ones, and stock attention."""
    memo: dict[int, object] = {}
    for module in source.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and not weight.is_floating_point():
            memo[id(module)] = _dequantised(module)
    for parameter in source.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("cpu", torch.float32, copy=True), requires_grad=False)
    for buffer in source.buffers():
        memo[id(buffer)] = buffer.detach().to("cpu", copy=True)
    model = copy.deepcopy(source, memo)
    model.set_attn_implementation("sdpa" if getattr(model, "_supports_sdpa", False) else "eager")
    return model.eval()


def _dequantised(module: nn.Module) -> nn.Linear:
    weight = dequantize_module_weight(module).detach().to("cpu", torch.float32)
    bias = getattr(module, "bias", None)
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().to("cpu", torch.float32), requires_grad=False)
    return linear


def _drop_peft_traces(model: PreTrainedModel) -> None:
    for attribute in ("peft_config", "hf_quantizer", "quantization_method"):
        if attribute in model.__dict__:
            delattr(model, attribute)
    if "_hf_peft_config_loaded" in model.__dict__:
        model._hf_peft_config_loaded = False
    for attribute in ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        if getattr(model, attribute, False):
            setattr(model, attribute, False)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for parameter in model.parameters():
        parameter.requires_grad_(True)


def _probe(model: PreTrainedModel) -> torch.Tensor:
    """Last hidden states `[2, 24, D]` of fixed pseudo-random tokens."""
    vocabulary = int(cast(torch.Tensor, model.get_input_embeddings().weight).shape[0])
    tokens = torch.randint(vocabulary, _PROBE_SHAPE, generator=torch.Generator().manual_seed(0))
    return model.base_model(input_ids=tokens, use_cache=False)[0].float()


def _check_equal(adapter: torch.Tensor, merged: torch.Tensor) -> None:
    difference = float((adapter - merged).abs().max() / adapter.abs().max().clamp(min=1e-12))
    if not difference <= TOLERANCE:
        raise CheckpointError(
            f"the merged model differs from the model with its adapter: hidden states by {difference:.2e} of the largest, "
            f"allowed {TOLERANCE:.0e}. Nothing was written; keep the checkpoint and report the model family."
        )
