"""Merging low-rank adapters into the base weights, part by part, with a check that the result computes the same.

W' = W + (alpha / r) B A (LoRA, arXiv:2106.09685, section 4.1), computed in float32 and rounded once to the dtype of W. Merging
in bfloat16 would round most of the small update away and change the outputs.

A part is an adapted layer, or a module with weights of its own. Only one part at a time is whole and in float32, so an export
takes the memory of its largest part, however large the model is.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, Protocol, cast

import torch
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_module_weight
from torch import nn
from transformers import PreTrainedModel

from unified_lm.core import distributed
from unified_lm.core.errors import CheckpointError
from unified_lm.core.tracing import trace_span
from unified_lm.models.lora import ADAPTER, lora_deltas, remove_lora
from unified_lm.models.token_rows import TokenRows, TokenRowsHead, merge_token_rows

TOLERANCE = 1e-5
"""Largest allowed difference between an adapted layer's outputs before and after merging, for the same inputs, in float32 and
relative to its largest output. A different order of additions makes 1e-6 or less; merging in bfloat16 makes 1e-3. Layers are
compared one by one because depth amplifies rounding: over SmolLM2's 30 layers it grows to 1.2e-5 or 1.5e-4, depending on the
adapter."""

_ADAPTED = (BaseTunerLayer, TokenRows, TokenRowsHead)
_PROBE_ROWS = 48


class Gather(Protocol):
    """Makes a part of a partitioned model ordinary; `engine.backends.backend.Backend.gathered` is one."""

    def __call__(self, module: nn.Module, *, weights: bool = True) -> AbstractContextManager[None]:
        """Context in which the module carries no hooks on rank 0 and, with `weights`, has them whole. Then it is collective."""


def no_gathering(module: nn.Module, *, weights: bool = True) -> AbstractContextManager[None]:
    """The `Gather` of models that are not partitioned."""
    return nullcontext()


class ModelParts:
    """The parts of a model, each made whole when its turn comes. Collective: every rank goes through all of them.

    Args:
        causal_lm: the model, possibly with adapters, quantized, or partitioned.
        gathered: makes a part whole on rank 0.
        keep: whether the model keeps its weights; without, each is given up once its part is done.
    """

    def __init__(self, causal_lm: PreTrainedModel, gathered: Gather = no_gathering, *, keep: bool = True) -> None:
        self.causal_lm = causal_lm
        self._gathered = gathered
        self._keep = keep
        self._left = deque(_part_names(causal_lm))
        self._whole = ExitStack()

    def __iter__(self) -> Iterator[tuple[str, nn.Module]]:
        """Each part that is left, with its name. Only rank 0 may read its weights, until it asks for the next one."""
        return self

    def __next__(self) -> tuple[str, nn.Module]:
        self._whole.close()
        if not self._left:
            raise StopIteration
        name = self._left.popleft()
        part = self.causal_lm.get_submodule(name)
        if not self._keep:
            self._whole.callback(_give_up, part)
        with trace_span(f"gather {name}"):
            self._whole.enter_context(self._gathered(part))
        return name, part

    def skeleton(self) -> PreTrainedModel:
        """`skeleton_of` the model. On one rank."""
        with self._gathered(self.causal_lm, weights=False):
            return skeleton_of(self.causal_lm)

    def finish(self) -> None:
        """Go through the parts that are left: what other ranks do meanwhile, and rank 0 after an error."""
        for _ in self:
            pass


def _give_up(part: nn.Module) -> None:
    for parameter in part.parameters():
        parameter.data = parameter.data.new_empty(0)


def _part_names(causal_lm: nn.Module) -> list[str]:
    """In model order: files are written layer by layer where a family is saved by other names than it has in memory."""
    found: list[str] = []
    inside: tuple[str, ...] = ()
    for name, module in causal_lm.named_modules():
        if inside and name.startswith(inside):
            continue
        adapted = isinstance(module, _ADAPTED)
        if adapted:
            inside = (*inside, f"{name}.")
        if adapted or module._parameters or set(module._buffers) - module._non_persistent_buffers_set:
            found.append(name)
    return found


def has_adapters(causal_lm: nn.Module) -> bool:
    """Whether any layer has a peft adapter, or rows of tokens that are trained."""
    return any(isinstance(module, _ADAPTED) for module in causal_lm.modules())


def skeleton_of(causal_lm: PreTrainedModel) -> PreTrainedModel:
    """A plain copy of a model without values: no adapters, no quantization, stock attention, parameters on the meta device.

    Its names, shapes, dtypes and ties are those of the merged model.
    """
    dtypes = storage_types(causal_lm)
    # deepcopy takes replacements from `memo`, so no weight is copied.
    memo: dict[int, object] = {}
    for module in causal_lm.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and not weight.is_floating_point():
            memo[id(module)] = _plain_linear(module)
    for name, parameter in causal_lm.named_parameters():
        dtype = dtypes.get(plain_name(name), parameter.dtype)
        value = torch.empty(distributed.full_shape(parameter), dtype=dtype, device="meta")
        memo[id(parameter)] = nn.Parameter(value, requires_grad=value.is_floating_point())
    for buffer in causal_lm.buffers():
        memo[id(buffer)] = buffer.detach().to("cpu", copy=True)
    model = copy.deepcopy(causal_lm, memo)
    remove_lora(model)
    _drop_peft_traces(model)
    model.set_attn_implementation("sdpa" if getattr(model, "_supports_sdpa", False) else "eager")
    return model.eval()


@torch.no_grad()
def merged_weights(parts: ModelParts, *, verify: bool = True) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of the merged model, part by part. On rank 0 only, while the others are in `ModelParts.finish`.

    Args:
        parts: of the model.
        verify: compare every adapted layer before and after merging, for fixed inputs, in float32 and evaluation mode.

    Yields:
        Name in the model without adapters, and value on the CPU: each weight in the dtype of its base weight (4-bit weights:
        dequantized, in the model's compute dtype), persistent buffers as they are. A tied weight comes under each of its names.

    Raises:
        CheckpointError: a merged layer computes something else than the adapted one.
    """
    dtypes = storage_types(parts.causal_lm)
    for name, part in parts:
        if isinstance(part, _ADAPTED):
            found = _merged(name, part, verify=verify)
        else:
            found = _own_state(part)
        for key, tensor in found.items():
            full = f"{name}.{key}" if name else key
            # Rounded only now: the comparison is in float32, where rounding to bfloat16 would hide an error.
            yield full, tensor.detach().to("cpu", dtypes.get(full, tensor.dtype))


def merge_lora(causal_lm: PreTrainedModel, *, verify: bool = True) -> PreTrainedModel:
    """Return a plain copy of the model with its adapters merged into the base weights.

    The given model is not changed. The copy is on the CPU and takes the memory of the weights; `export_model` merges by itself,
    without a copy.

    Args:
        causal_lm: a causal language model with the adapters of `models.lora.apply_lora`. A model without adapters is copied.
        verify: see `merged_weights`.

    Returns:
        A stock model on the CPU, without peft modules, in evaluation mode, with stock attention.

    Raises:
        CheckpointError: the merged layers compute something else than the adapted ones.
    """
    model = skeleton_of(causal_lm)
    filled: dict[int, nn.Parameter] = {}
    for name, tensor in merged_weights(ModelParts(causal_lm), verify=verify):
        owner, _, attribute = name.rpartition(".")
        module = model.get_submodule(owner)
        empty = module._parameters.get(attribute)
        if empty is not None:
            filled.setdefault(id(empty), nn.Parameter(tensor.clone(), requires_grad=tensor.is_floating_point()))
    for module in model.modules():
        for attribute, empty in module._parameters.items():
            if empty is not None:
                module._parameters[attribute] = filled[id(empty)]
    return model


def plain_name(name: str) -> str:
    """A parameter's name in the model without adapters."""
    return ".".join(part for part in name.split(".") if part != "base_layer")


def storage_types(source: PreTrainedModel) -> dict[str, torch.dtype]:
    """Name of each parameter after merging -> its dtype in the merged model."""
    compute = next((p.dtype for p in source.parameters() if p.is_floating_point()), torch.float32)
    types = {}
    for name, parameter in source.named_parameters(remove_duplicate=False):
        types[plain_name(name)] = parameter.dtype if parameter.is_floating_point() else compute
    return types


def _own_state(part: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers of a module itself; a quantized weight is dequantized."""
    weight = part._parameters.get("weight")
    if weight is not None and not weight.is_floating_point():
        linear = _dequantized(part)
        return dict(linear.named_parameters())
    own: dict[str, torch.Tensor] = {name: value for name, value in part._parameters.items() if value is not None}
    for name, buffer in part._buffers.items():
        if buffer is not None and name not in part._non_persistent_buffers_set:
            own[name] = buffer
    return own


def _merged(name: str, layer: nn.Module, *, verify: bool) -> dict[str, torch.Tensor]:
    """The float32 state of an adapted layer with its adapter merged.

    Raises:
        CheckpointError: the merged layer differs from the adapted one by more than `TOLERANCE`.
    """
    holder = nn.Module()
    holder.layer = _float32_copy(layer)
    experts = {module.parameter_name: module for module in holder.modules() if isinstance(module, ParamWrapper)}
    call = verify and not experts  # fused experts are called with what a router chose, so their updates are compared
    inputs = _probe_inputs(layer) if call else torch.empty(0)
    before = holder.layer(inputs) if call else inputs
    for update in lora_deltas(holder):
        parameter = update.name.rpartition(".")[2]
        if verify and parameter in experts:
            _check_equal(f"{name}.{parameter}", update.delta, experts[parameter].get_delta_weight(ADAPTER))
        update.base.add_(update.delta)  # in float32: `base` is the copy's weight itself
    merge_token_rows(holder)
    remove_lora(holder)
    if call:
        _check_equal(name, holder.layer(inputs), before)
    return dict(holder.layer.state_dict())


def _probe_inputs(layer: nn.Module) -> torch.Tensor:
    """Fixed pseudo-random inputs: float32 `[48, I]` of a linear layer; tokens of a table, those with own rows first."""
    generator = torch.Generator().manual_seed(0)
    if isinstance(layer, TokenRows):
        others = torch.randint(len(layer.weight), (_PROBE_ROWS,), generator=generator)
        return torch.cat([layer.ids.cpu(), others])
    linear = cast(Any, layer.base_layer if isinstance(layer, TokenRowsHead) else layer)
    return torch.randn(_PROBE_ROWS, int(linear.in_features), generator=generator)


def _check_equal(name: str, merged: torch.Tensor, adapted: torch.Tensor) -> None:
    difference = float((merged - adapted).abs().max() / adapted.abs().max().clamp(min=1e-12))
    if not difference <= TOLERANCE:  # written so that NaN counts as a difference
        raise CheckpointError(
            f"the merged model differs from the model with its adapter: outputs of {name} by {difference:.2e} of the largest, "
            f"allowed {TOLERANCE:.0e}. Nothing was written; keep the checkpoint and report the model family."
        )


def _float32_copy(layer: nn.Module) -> nn.Module:
    """A copy on the CPU with float32 weights, with linear layers in place of quantized ones, in evaluation mode."""
    memo: dict[int, object] = {}
    for module in layer.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and not weight.is_floating_point():
            memo[id(module)] = _dequantized(module)
    for parameter in layer.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("cpu", torch.float32, copy=True), requires_grad=False)
    return copy.deepcopy(layer, memo).eval()


def _plain_linear(quantized: nn.Module) -> nn.Linear:
    """A linear layer without values in place of a quantized one."""
    layer = cast(Any, quantized)
    return nn.Linear(layer.in_features, layer.out_features, bias=getattr(layer, "bias", None) is not None, device="meta")


def _dequantized(module: nn.Module) -> nn.Linear:
    """A float32 linear layer with the values of a quantized one."""
    linear = _plain_linear(module)
    values = {"weight": dequantize_module_weight(module), "bias": getattr(module, "bias", None)}
    for name, value in values.items():
        if value is not None:
            setattr(linear, name, nn.Parameter(value.detach().to("cpu", torch.float32), requires_grad=False))
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
