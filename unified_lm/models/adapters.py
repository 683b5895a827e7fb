"""Adapter folders of peft (`adapter_config.json`, `adapter_model.safetensors`): read, checked and merged into their base.

A model that starts from an adapter is its base with the adapter merged by peft itself, whatever kind of low-rank adapter it is,
layer by layer in float32 and rounded once to the base's dtype.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, PeftType, load_peft_weights, set_peft_model_state_dict
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from unified_lm.core.errors import ModelError
from unified_lm.core.typed import require_typed
from unified_lm.core.user_files import read_json
from unified_lm.models.load_errors import explain
from unified_lm.models.lora import ADAPTER

CONFIG_FILE = "adapter_config.json"
"""The file by which the folder of an adapter is recognized."""


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An adapter on disk or on the Hub.

    Attributes:
        location: directory or Hub name.
        revision: Hub revision of the adapter.
        base: the model that it belongs to, a directory or a Hub name.
        base_revision: Hub revision of the base; None if the adapter names none.
        r: rank.
        alpha: scaling numerator.
        dropout: of its training.
        target_modules: suffixes of the adapted modules.
    """

    location: str
    revision: str | None
    base: str
    base_revision: str | None
    r: int
    alpha: float
    dropout: float
    target_modules: tuple[str, ...]

    @property
    def is_hub(self) -> bool:
        """Whether its files come from the Hub."""
        return not Path(self.location).is_dir()


_FIX = "Fetch the adapter again."


@dataclass(frozen=True, kw_only=True)
class _Said:
    """What is read of peft's own file, under its names; another kind of adapter need not have it."""

    peft_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    r: int = 0
    lora_alpha: float = 0.0
    lora_dropout: float = 0.0
    target_modules: str | tuple[str, ...] | None = None
    target_parameters: str | tuple[str, ...] | None = None


def find_adapter(location: str, revision: str | None = None) -> Adapter | None:
    """The adapter in a directory or Hub repository; None where there is none.

    Raises:
        ModelError: its configuration cannot be read, names no base, or is of no low-rank adapter.
    """
    is_hub = not Path(location).is_dir()
    with explain(location, "configuration", is_hub):
        path = find_adapter_config_file(location, revision=revision or "main")
    if path is None:
        return None
    values = read_json(Path(path), ModelError, fix=_FIX)
    said = require_typed(_Said, values, path, ModelError, fix=_FIX, open_ended=True)
    kind = str(said.peft_type)
    if kind != PeftType.LORA.value:
        raise ModelError(
            f"'{location}' is an adapter of kind {kind}; only those of kind {PeftType.LORA.value} are merged. Merge it with "
            "peft and start from the result, with the tokenizer beside it: "
            "AutoPeftModelForCausalLM.from_pretrained(ADAPTER).merge_and_unload().save_pretrained(FOLDER)."
        )
    if not said.base_model_name_or_path:
        raise ModelError(f"{path} does not name the model that the adapter belongs to. Set base_model_name_or_path in it.")
    targets = said.target_modules or said.target_parameters or ()
    return Adapter(
        location=location,
        revision=revision,
        base=said.base_model_name_or_path,
        base_revision=said.revision,
        r=said.r,
        alpha=said.lora_alpha,
        dropout=said.lora_dropout,
        target_modules=tuple(sorted([targets] if isinstance(targets, str) else targets)),
    )


def has_tokenizer(adapter: Adapter) -> bool:
    """Whether a tokenizer lies beside an adapter."""
    with explain(adapter.location, "tokenizer", adapter.is_hub):
        found = cached_file(
            adapter.location,
            "tokenizer_config.json",
            revision=adapter.revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    return found is not None


def attach_adapter(causal_lm: PreTrainedModel, config: PeftConfig, weights: dict[str, torch.Tensor], name: str) -> PeftModel:
    """Put an adapter into its base, in place; nothing of it may be missing or left over.

    Args:
        causal_lm: the base, without adapters.
        config: of the adapter.
        weights: of the adapter, by their names in its file.
        name: of the adapter, for messages.

    Raises:
        ModelError: weights are missing, left over or of another shape, or a target is not in the base.
    """
    with explain(name, "adapter", is_hub=False):
        model = PeftModel(causal_lm, config, adapter_name=ADAPTER)
        result: Any = set_peft_model_state_dict(model, weights, adapter_name=ADAPTER)
    own = {key for key, _ in model.named_parameters() if ADAPTER in key.split(".")}
    lacking = sorted(own & set(result.missing_keys))
    foreign = sorted(result.unexpected_keys)
    problems = [f"{len(lacking)} weights are missing from it ({lacking[0]}, ...)"] if lacking else []
    problems += [f"{len(foreign)} weights belong to no layer of the base ({foreign[0]}, ...)"] if foreign else []
    if problems:
        raise ModelError(
            f"the adapter '{name}' does not fit a {type(causal_lm).__name__}: {' and '.join(problems)}. It is damaged, or its "
            f"{CONFIG_FILE} names another base or other targets."
        )
    return model


@torch.no_grad()
def merge_adapter(causal_lm: PreTrainedModel, adapter: Adapter) -> PreTrainedModel:
    """Merge an adapter into its base, in place; returns a stock model in the base's dtypes, every parameter trainable.

    Args:
        causal_lm: the base. Memory for one layer in float32 is needed beside it.
        adapter: of this base.

    Raises:
        ModelError: the adapter cannot be read, or does not fit the base exactly.
    """
    with explain(adapter.location, "adapter", adapter.is_hub):
        config = PeftConfig.from_pretrained(adapter.location, revision=adapter.revision)
        weights = load_peft_weights(adapter.location, device="cpu", revision=adapter.revision)
    config.inference_mode = True
    model = attach_adapter(causal_lm, config, weights, adapter.location)
    for layer in [module for module in model.modules() if isinstance(module, LoraLayer)]:
        _merge_layer(layer)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "All adapters are already merged"
        )  # as they are; this merges saved modules and tokens
        merged: PreTrainedModel = model.merge_and_unload(safe_merge=True)
    for parameter in merged.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return merged.eval()


def _merge_layer(layer: Any) -> None:
    """Merge one layer in float32; what it wraps gets its dtype back."""
    base: nn.Module = layer.get_base_layer()
    dtypes = {name: parameter.dtype for name, parameter in base.named_parameters()}
    layer.float()
    layer.merge(safe_merge=True)
    for name, parameter in base.named_parameters():
        parameter.data = parameter.data.to(dtypes[name])
