"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685), injected into the model in place through peft.

Adapters have the dtype of the weights that they adapt, because the engine keeps float32 master copies of all trained weights.
With peft's default, float32 adapters, every activation would be cast and multiplied in float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import inject_adapter_in_model
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.utils.integrations import dequantize_module_weight
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from unified_lm.config.schema import LoraConfig
from unified_lm.core import distributed
from unified_lm.core.errors import ModelError, did_you_mean
from unified_lm.core.random import derive_seed
from unified_lm.models.dropout import adapted_linear
from unified_lm.models.modes import GatherParameters, no_gathering
from unified_lm.models.token_rows import remove_token_rows, token_row_layers, train_token_rows

ADAPTER = "default"
"""peft's name for the only adapter of a model."""

ALL_LINEAR = "all-linear"
"""Target that stands for every linear layer except the output head."""


@dataclass(frozen=True)
class LoraReport:
    """What was adapted.

    Attributes:
        targets: full names of the adapted modules, and of fused expert parameters, in model order.
        num_trainable: trainable parameters (elements).
        num_total: all parameters (elements), adapters included.
        notices: messages for the user about modules that are not adapted, or adapted without dropout.
        tokens: those whose rows are trained.
    """

    targets: tuple[str, ...]
    num_trainable: int
    num_total: int
    notices: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class LoraDelta:
    """The update of one weight.

    Attributes:
        name: the weight's name in the model without adapters ("model.layers.0.self_attn.q_proj.weight").
        base: the frozen weight as stored, dequantized if it is 4-bit.
        delta: float32, same shape as `base`: alpha / r * B @ A.
    """

    name: str
    base: torch.Tensor
    delta: torch.Tensor


class LoraLinear(PeftLinear):
    """peft's layer with the same math in fewer passes over memory on a CPU; special cases use peft's own forward."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """``base_layer(x) + scaling * B A dropout(x)``; `x` is `[..., in_features]`."""
        base: Any = self.base_layer
        a, b = _factors(self)
        special = args or kwargs or self.disable_adapters or self.merged
        # Under ZeRO-3 (ds_id) weights are gathered by the hooks of the modules that own them, so those modules must be called.
        # A base weight that is trained needs a gradient, which `adapted_linear` does not compute.
        if special or x.device.type != "cpu" or hasattr(a, "ds_id") or base.weight.requires_grad:
            return super().forward(x, *args, **kwargs)
        # A custom autograd function is opaque to autocast, so inputs are cast here as autocast casts those of `F.linear`.
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else base.weight.dtype
        weight = base.weight.T if isinstance(base, Conv1D) else base.weight  # GPT-2's Conv1D stores `[I, O]`
        dropout = self.lora_dropout[ADAPTER]
        out = adapted_linear(
            x.reshape(-1, x.shape[-1]).to(dtype).contiguous(),
            weight.to(dtype),
            None if base.bias is None else base.bias.to(dtype),
            a.to(dtype),
            b.to(dtype),
            self.scaling[ADAPTER],
            dropout.p if self.training and isinstance(dropout, nn.Dropout) else 0.0,
        )
        return out.view(*x.shape[:-1], out.shape[-1])


def apply_lora(
    causal_lm: PreTrainedModel,
    config: LoraConfig,
    seed: int,
    tokens: Mapping[str, int] | None = None,
    whole: GatherParameters = no_gathering,
) -> LoraReport:
    """Inject adapters in place and freeze all other parameters. The inner decoder uses them too when called directly.

    A is drawn from U(-1/sqrt(I), 1/sqrt(I)) as in peft and B is zero, so the model's function is unchanged at first. The draw
    depends only on `seed` and the module's name; the global generators are restored.

    Args:
        causal_lm: a model without adapters.
        config: rank, scaling, dropout, targets. A target is a module name or its last parts ("q_proj",
            "mlp.down_proj"), or for mixture-of-experts models a fused expert parameter ("experts.down_proj"): peft adapts
            those per expert, without dropout.
        seed: for drawing A.
        tokens: whose rows of the embedding table and the output head are trained too, with their ids (`models.token_rows`).
        whole: gathers parameters that are partitioned (ZeRO-3).

    Raises:
        ModelError: a target matches nothing or is the output head, or the model already has adapters.
    """
    if any(isinstance(module, LoraLayer) for module in causal_lm.modules()):
        raise ModelError("the model already has an adapter. Merge it (an export is merged) before adding another.")
    if (
        config.quantize_4bit
        and not getattr(causal_lm, "is_quantized", False)
        and not causal_lm.get_input_embeddings().weight.is_meta
    ):
        raise ModelError("lora.quantize_4bit=true, but the model was not loaded in 4 bit. Load it with quantize_4bit=True.")
    modules, experts = _match_targets(causal_lm, config.target_modules)
    with torch.random.fork_rng(devices=[]):  # peft draws initial values, which are replaced below
        if modules:
            _inject(causal_lm, config, modules)
        if experts:
            _inject_experts(causal_lm, config, experts)
    # Everything is frozen first; `_initialize` makes the factors trainable again.
    causal_lm.requires_grad_(False)
    for name, layer in _lora_layers(causal_lm):
        _initialize(layer, derive_seed("lora", seed, name))
    if tokens:
        train_token_rows(causal_lm, tokens.values(), whole)
    return LoraReport(
        targets=tuple(name.removesuffix(".weight") for name, _ in _lora_layers(causal_lm)),
        num_trainable=sum(p.numel() for p in causal_lm.parameters() if p.requires_grad),
        num_total=sum(_num_elements(p) for p in causal_lm.parameters()),
        notices=_notices(causal_lm, config, experts),
        tokens=tuple(tokens or ()),
    )


def _peft_config(config: LoraConfig, dropout: float, **targets: Any) -> PeftLoraConfig:
    return PeftLoraConfig(lora_dropout=dropout, bias="none", **_scale(config), **targets)


def _scale(config: LoraConfig) -> dict[str, Any]:
    return {"r": config.r, "lora_alpha": config.alpha}  # peft annotates alpha as int, but accepts any number


def _inject(causal_lm: PreTrainedModel, config: LoraConfig, modules: list[str]) -> None:
    if getattr(causal_lm, "is_quantized", False):  # quantized layers have peft classes of their own
        inject_adapter_in_model(_peft_config(config, config.dropout, target_modules=modules), causal_lm, ADAPTER)
        return
    # Not through peft's injection, which rewrites names such as gate_proj into fused experts for mixture-of-experts families.
    peft_config = _peft_config(config, config.dropout)
    for name in modules:
        base = causal_lm.get_submodule(name)
        _replace(causal_lm, name, LoraLinear(base, ADAPTER, config=peft_config, **_scale(config)))


def _inject_experts(causal_lm: PreTrainedModel, config: LoraConfig, parameters: list[str]) -> None:
    peft_config = _peft_config(config, 0.0)  # a parameter's update cannot have dropout on its input
    for name in parameters:
        owner, _, parameter = name.rpartition(".")
        base = causal_lm.get_submodule(owner)  # the second parameter of a module wraps the wrapper of the first
        wrapper = ParamWrapper(base, ADAPTER, parameter_name=parameter, config=peft_config, **_scale(config))
        _replace(causal_lm, owner, wrapper)


def _replace(causal_lm: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    module.train(causal_lm.training)
    setattr(causal_lm.get_submodule(parent), child, module)


def _initialize(layer: LoraLayer, seed: int) -> None:
    a, b = _factors(layer)
    a.requires_grad_(True)
    b.requires_grad_(True)
    if a.is_meta:  # a model without storage, as memory estimates use
        return
    # A generator per layer: which other layers are adapted does not change a layer's initial values.
    generator = torch.Generator().manual_seed(seed)
    bound = a.shape[1] ** -0.5
    with torch.no_grad():
        a.copy_(torch.empty(a.shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator))
        b.zero_()


def _num_elements(parameter: nn.Parameter) -> int:
    packed = parameter.__class__.__name__ == "Params4bit"  # two 4-bit weights per stored byte
    return parameter.numel() * parameter.element_size() * 2 if packed else math.prod(distributed.full_shape(parameter))


def linear_module_names(causal_lm: PreTrainedModel) -> tuple[str, ...]:
    """Full names of every linear layer except the output head, in model order."""
    # The head is left out because losses use its weight directly (`Backbone.output_head`), past any adapter.
    head = causal_lm.get_output_embeddings()
    return tuple(
        name for name, module in causal_lm.named_modules() if isinstance(module, nn.Linear | Conv1D) and module is not head
    )


def expert_parameter_names(causal_lm: PreTrainedModel) -> tuple[str, ...]:
    """Full names of fused expert matrices (parameters `[experts, ., .]` outside any linear layer), in model order."""
    return tuple(name for name, parameter in causal_lm.named_parameters() if parameter.ndim == 3 and ".experts." in f".{name}")


def _match_targets(causal_lm: PreTrainedModel, targets: tuple[str, ...] | str) -> tuple[list[str], list[str]]:
    """Full names of the linear modules and of the expert parameters that the targets name.

    Raises:
        ModelError: some targets match nothing; the text names all of them.
    """
    linear, experts = linear_module_names(causal_lm), expert_parameter_names(causal_lm)
    if targets == ALL_LINEAR:
        return list(linear), []
    wanted = (targets,) if isinstance(targets, str) else tuple(targets)
    modules = [name for name in linear if any(_is_suffix(target, name) for target in wanted)]
    parameters = [name for name in experts if any(_is_suffix(target, name) for target in wanted)]
    unmatched = [target for target in wanted if not any(_is_suffix(target, name) for name in (*modules, *parameters))]
    if unmatched or not wanted:
        raise ModelError(_no_match_text(causal_lm, unmatched, linear, experts))
    return modules, parameters


def _is_suffix(target: str, name: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _no_match_text(causal_lm: PreTrainedModel, unmatched: list[str], linear: tuple[str, ...], experts: tuple[str, ...]) -> str:
    short = list(dict.fromkeys(name.rpartition(".")[2] for name in linear))
    fused = list(dict.fromkeys(".".join(name.split(".")[-2:]) for name in experts))
    text = f"LoRA: {', '.join(map(repr, unmatched))} matches no linear layer" if unmatched else "LoRA: target_modules is empty"
    text += f" of this {causal_lm.config.model_type} model."
    head = next((n for n, m in causal_lm.named_modules() if m is causal_lm.get_output_embeddings()), None)
    if head in unmatched:
        text += f" '{head}' is the output head, which is never adapted."
    elif len(unmatched) == 1 and "Did" in did_you_mean(unmatched[0], short):
        text += did_you_mean(unmatched[0], short)
    text += f" Its linear layers: {', '.join(short)}."
    if fused:
        text += f" Its experts are fused parameters: {', '.join(fused)}."
    return text + f' Set lora.target_modules to some of these, or to "{ALL_LINEAR}".'


def _notices(causal_lm: PreTrainedModel, config: LoraConfig, experts: list[str]) -> tuple[str, ...]:
    fused = sorted({".".join(name.split(".")[-2:]) for name in expert_parameter_names(causal_lm)} if not experts else ())
    if fused and config.target_modules == ALL_LINEAR:
        return (
            f'the experts are fused parameters ({", ".join(fused)}), not linear layers, and are not adapted by "{ALL_LINEAR}"; '
            "list them in lora.target_modules, next to the linear layers, to adapt them too (without dropout, and with a "
            "copy of the adapted experts per layer in memory).",
        )
    if experts and config.dropout:
        return (f"lora.dropout={config.dropout} applies to linear layers; fused experts are adapted without dropout.",)
    return ()


def _factors(layer: LoraLayer) -> tuple[nn.Parameter, nn.Parameter]:
    """A `[r, I]` and B `[O, r]` of the adapter."""
    a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    return cast(nn.Parameter, a), cast(nn.Parameter, b)


def _lora_layers(causal_lm: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """Each adapted weight's name in the model without adapters, and the layer that adapts it."""
    for name, module in causal_lm.named_modules():
        if isinstance(module, LoraLayer):
            owner = ".".join(part for part in name.split(".") if part != "base_layer")
            yield f"{owner}.{getattr(module, 'parameter_name', 'weight')}", module


@contextmanager
def without_adapters(causal_lm: nn.Module) -> Iterator[None]:
    """Context in which the adapters are disabled: the model computes what it did before `apply_lora`.

    Only the computation changes. `requires_grad` stays as it is, whereas peft's own method freezes the adapters temporarily,
    which ZeRO does not expect.

    Raises:
        ModelError: the model has no adapter.
    """
    layers = [layer for _, layer in _lora_layers(causal_lm)]
    if not layers:
        raise ModelError("the model has no adapter to switch off. Call apply_lora first.")
    tables = list(token_row_layers(causal_lm))
    for layer in layers:
        layer._disable_adapters = True
    for table in tables:
        table.is_disabled = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False
        for table in tables:
            table.is_disabled = False


@torch.no_grad()
def lora_deltas(causal_lm: nn.Module) -> Iterator[LoraDelta]:
    """The updates of all adapted weights, one at a time, as a merge adds them: in float32 whatever the weights' dtype."""
    for name, layer in _lora_layers(causal_lm):
        a, b = (factor.float() for factor in _factors(layer))
        scaling = layer.scaling[ADAPTER]
        owner: Any = layer.get_base_layer()
        if isinstance(layer, ParamWrapper):
            base = layer.get_param()
            delta = _expert_delta(layer, a, b) * scaling
        else:
            stored = owner.weight
            base = stored if stored.is_floating_point() else dequantize_module_weight(owner)
            delta = (b @ a) * scaling
            delta = delta.T.contiguous() if isinstance(owner, Conv1D) else delta  # Conv1D stores `[I, O]`
        yield LoraDelta(name, base.detach(), delta)


def peft_config(causal_lm: nn.Module, config: LoraConfig, base: str, revision: str | None) -> PeftLoraConfig:
    """What peft must know to put the adapters of a model on its base again.

    Args:
        causal_lm: with the adapters of `apply_lora`.
        config: of the adapters.
        base: directory or Hub name of the model without them.
        revision: Hub revision of the base.
    """
    found = dict(_lora_layers(causal_lm))
    experts = [name for name, layer in found.items() if isinstance(layer, ParamWrapper)]
    return PeftLoraConfig(
        lora_dropout=0.0 if experts else config.dropout,  # peft's adapters of parameters know no dropout
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        revision=revision,
        inference_mode=True,
        target_modules=[name.removesuffix(".weight") for name in found if name not in experts],
        target_parameters=experts or None,
        **_scale(config),
    )


def adapter_weights(causal_lm: nn.Module) -> dict[str, torch.Tensor]:
    """The factors of all adapters by their names in a file of peft, on the CPU."""
    return {
        f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}": parameter.detach().cpu()
        for name, parameter in causal_lm.named_parameters()
        if f".{ADAPTER}." in name
    }


def _expert_delta(layer: ParamWrapper, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The update of fused experts, in the parameter's layout; peft stacks A `[E * r, I]` by expert, B `[O, r * E]` by rank."""
    experts = layer.num_experts
    a_ERI, b_ORE = a.reshape(experts, -1, a.shape[1]), b.reshape(b.shape[0], -1, experts)
    delta_EOI = torch.einsum("ore,eri->eoi", b_ORE, a_ERI)
    return delta_EOI if tuple(delta_EOI.shape) == tuple(layer.get_param().shape) else delta_EOI.transpose(1, 2)


def remove_lora(causal_lm: nn.Module) -> None:
    """Remove the adapters in place: the model is as before `apply_lora`, with every parameter trainable again."""
    # A list, because modules are replaced on the way; inner layers of nested wrappers are removed with the outermost.
    for name, module in list(causal_lm.named_modules()):
        if isinstance(module, LoraLayer) and "base_layer" not in name.split("."):
            _replace(causal_lm, name, module.get_base_layer())
    remove_token_rows(causal_lm)
    for parameter in causal_lm.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
