"""Merging low-rank adapters into the base weights, with a check that the result computes the same.

W' = W + (alpha / r) B A (LoRA, arXiv:2106.09685, section 4.1), computed in float32 and rounded once to the dtype of W. Merging
in bfloat16 would round most of the small update away and change the outputs.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_module_weight
from torch import nn
from transformers import PreTrainedModel

from unified_lm.core.errors import CheckpointError
from unified_lm.models.lora import lora_deltas, remove_lora
from unified_lm.models.token_rows import TokenRows, TokenRowsHead, merge_token_rows, token_row_layers

TOLERANCE = 1e-5
"""Largest allowed difference between an adapted layer's outputs before and after merging, for the same inputs, in float32 and
relative to its largest output. A different order of additions makes 1e-6 or less; merging in bfloat16 makes 1e-3. Layers are
compared one by one because depth amplifies rounding: over SmolLM2's 30 layers it grows to 1.2e-5 or 1.5e-4, depending on the
adapter."""

_PROBE_SHAPE = (2, 24)
_ADAPTED = (BaseTunerLayer, TokenRows, TokenRowsHead)


def has_adapters(causal_lm: nn.Module) -> bool:
    """Whether any layer has a peft adapter, or rows of tokens that are trained."""
    return any(isinstance(module, _ADAPTED) for module in causal_lm.modules())


@torch.no_grad()
def merge_lora(causal_lm: PreTrainedModel, *, verify: bool = True) -> PreTrainedModel:
    """Return a plain copy of the model with its adapters merged into the base weights.

    The given model is not changed. The copy is on the CPU and takes 4 bytes per parameter while merging.

    Args:
        causal_lm: a causal language model with the adapters of `models.lora.apply_lora`. A model without adapters is copied.
        verify: compare the outputs of every adapted layer before and after merging, for its inputs in a forward of fixed
            tokens, in float32 and in evaluation mode.

    Returns:
        A stock model on the CPU, without peft modules, in evaluation mode, with stock attention. Each weight has the dtype of
        its base weight (4-bit weights: dequantized, in the model's compute dtype).

    Raises:
        CheckpointError: the merged layers compute something else than the adapted ones.
    """
    dtypes = _storage_types(causal_lm)
    model = _float32_copy(causal_lm)
    calls = _record_calls(model) if verify else {}
    for update in lora_deltas(model):
        update.base.add_(update.delta)  # in float32: `base` is the copy's weight itself
    merge_token_rows(model)
    remove_lora(model)
    _drop_peft_traces(model)
    _check_equal(model, calls)
    # Rounded only now: the comparison is in float32, where rounding to bfloat16 would hide an error.
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtypes[name])
    return model


def _storage_types(source: PreTrainedModel) -> dict[str, torch.dtype]:
    """Name of each parameter after merging -> its dtype in the merged model."""
    compute = next((p.dtype for p in source.parameters() if p.is_floating_point()), torch.float32)
    types = {}
    for name, parameter in source.named_parameters():
        plain = ".".join(part for part in name.split(".") if part != "base_layer")
        types[plain] = parameter.dtype if parameter.is_floating_point() else compute
    return types


def _float32_copy(source: PreTrainedModel) -> PreTrainedModel:
    """A copy on the CPU with float32 weights, linear layers in place of quantized ones, and stock attention."""
    # deepcopy takes replacements from `memo`, so weights are converted one by one and never copied on the accelerator.
    memo: dict[int, object] = {}
    for module in source.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and not weight.is_floating_point():
            memo[id(module)] = _dequantized(module)
    for parameter in source.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("cpu", torch.float32, copy=True), requires_grad=False)
    for buffer in source.buffers():
        memo[id(buffer)] = buffer.detach().to("cpu", copy=True)
    model = copy.deepcopy(source, memo)
    model.set_attn_implementation("sdpa" if getattr(model, "_supports_sdpa", False) else "eager")
    return model.eval()


def _dequantized(module: nn.Module) -> nn.Linear:
    """A float32 linear layer with the values of a quantized one."""
    weight = dequantize_module_weight(module).detach().to("cpu", torch.float32)
    bias = getattr(module, "bias", None)
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().to("cpu", torch.float32), requires_grad=False)
    return linear


def _drop_peft_traces(model: PreTrainedModel) -> None:
    """Remove the attributes by which transformers recognizes an adapted or quantized model, and would save it as such."""
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


@dataclass(frozen=True)
class _Call:
    """Arguments and output of one call of an adapted layer."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: torch.Tensor


def _record_calls(model: PreTrainedModel) -> dict[str, _Call]:
    """The call of every adapted layer, by the layer's name, in one forward of fixed pseudo-random tokens."""
    calls: dict[str, _Call] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, _ADAPTED) and "base_layer" not in name.split("."):

            def record(_: nn.Module, args: Any, kwargs: Any, output: torch.Tensor, name: str = name) -> None:
                """A forward hook that stores a layer's arguments and output."""
                calls[name] = _Call(args, kwargs, output)

            handles.append(model.get_submodule(name).register_forward_hook(record, with_kwargs=True))
    vocabulary = int(cast(torch.Tensor, model.get_input_embeddings().weight).shape[0])
    tokens = torch.randint(vocabulary, _PROBE_SHAPE, generator=torch.Generator().manual_seed(0))
    for layer in token_row_layers(model):
        tokens[0, : len(layer.ids)] = layer.ids[: tokens.shape[1]]
    hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
    if isinstance(head := model.get_output_embeddings(), TokenRowsHead):
        head(hidden)
    for handle in handles:
        handle.remove()
    return calls


def _check_equal(merged: PreTrainedModel, calls: dict[str, _Call]) -> None:
    """Repeat the recorded calls with the merged layers and compare the outputs.

    Raises:
        CheckpointError: they differ by more than `TOLERANCE`.
    """
    worst, difference = "", 0.0
    for name, call in calls.items():
        output = merged.get_submodule(name)(*call.args, **call.kwargs)
        found = float((output - call.output).abs().max() / call.output.abs().max().clamp(min=1e-12))
        if not found <= difference:  # written so that NaN counts as a difference
            worst, difference = name, found
    if not difference <= TOLERANCE:
        raise CheckpointError(
            f"the merged model differs from the model with its adapter: outputs of {worst} by {difference:.2e} of the largest, "
            f"allowed {TOLERANCE:.0e}. Nothing was written; keep the checkpoint and report the model family."
        )
