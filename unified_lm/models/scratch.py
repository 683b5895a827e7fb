"""Models that are pretrained: built of their description, with weights that a seed decides."""

from __future__ import annotations

import json
from hashlib import blake2b
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from unified_lm.config.schema import ModelConfig
from unified_lm.core.random import derive_seed
from unified_lm.models.architecture import blaming_architecture, check_architecture, described_config, override_dropout


def build_model(config: ModelConfig, dtype: torch.dtype) -> tuple[PreTrainedModel, dict[str, float]]:
    """A model of `config.architecture` on the CPU, its weights drawn in float32.

    Args:
        config: the model part of a recipe, of source "scratch".
        dtype: of the weights. Buffers, as rotary frequencies, stay as they are computed.

    Returns:
        The model, and what training changes in its configuration (`override_dropout`).

    Raises:
        ModelError: the values describe no model.
    """
    hf_config = described_config(config)
    check_architecture(hf_config, config.family, config.family)
    own = override_dropout(hf_config, config.attention_dropout)
    options: dict[str, Any] = {"attn_implementation": "eager"} if config.attention_kernel == "padded" else {}
    with blaming_architecture(config), torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed("scratch", config.family, config.init_seed))
        causal_lm: PreTrainedModel = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32, **options)
    for parameter in causal_lm.parameters():
        parameter.data = parameter.data.to(dtype)
    causal_lm.config.dtype = dtype
    return causal_lm, own


def description_hash(config: ModelConfig) -> str:
    """A short hash of `config.architecture`: nothing else tells a checkpoint with what settings its weights were trained."""
    return blake2b(json.dumps(config.architecture, sort_keys=True, default=str).encode(), digest_size=4).hexdigest()
