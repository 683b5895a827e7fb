"""How long a sample may be: learned positions end, and some rotary frequencies follow the longest position of a whole pack."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from unified_lm.core.errors import ConfigError

_OFFSETS = (0, 2)
"""Rows that a table of learned positions has beyond the longest sequence (OPT and BioGPT reserve two)."""


@dataclass(frozen=True)
class PositionLimit:
    """The longest sample that a model can run in a pack.

    Attributes:
        tokens: of the longest sample.
        reason: what happens to longer ones, as the end of a sentence.
    """

    tokens: int
    reason: str


def position_limit(causal_lm: PreTrainedModel) -> PositionLimit | None:
    """The longest sample of a model, or None if positions are computed, each by itself.

    Frequencies that follow the sequence length are read off the model's rotary modules, since that is what transformers
    computes with: dynamic NTK has a table of its own for every length over the original one, LongRoPE one for all of them.
    transformers takes the length from the longest position of the pack, so a sample would depend on its neighbors.
    """
    config: Any = causal_lm.config.get_text_config(decoder=True)
    limits = [learned_positions(causal_lm)]
    for module in causal_lm.modules():
        types = getattr(module, "rope_type", None)
        for layer_type, rope_type in types.items() if isinstance(types, dict) else [(None, types)]:
            limits.append(_rotary(module, config, layer_type, rope_type))
    return min((limit for limit in limits if limit is not None), key=lambda limit: limit.tokens, default=None)


def learned_positions(causal_lm: PreTrainedModel) -> PositionLimit | None:
    """The number of positions that a model has learned, where it has a table of them; no way of running it goes beyond."""
    rows = getattr(causal_lm.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if rows is None:
        return None
    tokens = causal_lm.get_input_embeddings()
    tokens = getattr(tokens, "base_layer", tokens)
    tables = (module for module in causal_lm.modules() if isinstance(module, nn.Embedding) and module is not tokens)
    # GPT-J and CodeGen keep the sines of every position in a buffer of this name.
    computed = any(name.rpartition(".")[2] == "embed_positions" for name, _ in causal_lm.named_buffers())
    if computed or any(table.num_embeddings - rows in _OFFSETS for table in tables):
        return PositionLimit(rows, f"family '{causal_lm.config.model_type}' has a table of {rows} positions")
    return None


def check_lengths(causal_lm: PreTrainedModel, lengths: Mapping[str, int]) -> None:
    """Refuse limits that the model's positions cannot serve.

    Args:
        causal_lm: the model.
        lengths: name of a setting, or of several that add up -> the longest sample that it allows, in tokens.

    Raises:
        ConfigError: it names every setting that is too large.
    """
    limit = position_limit(causal_lm)
    if limit is not None:
        problems = [
            f"{key}: got {length}, but {limit.reason}. Lower it to {limit.tokens} or less."
            for key, length in lengths.items()
            if length > limit.tokens
        ]
        if problems:
            raise ConfigError(problems)


def _rotary(module: nn.Module, config: Any, layer_type: str | None, rope_type: object) -> PositionLimit | None:
    if not isinstance(rope_type, str):
        return None
    told = f"its '{rope_type}' rotary frequencies follow the longest sample of a pack"
    if "dynamic" in rope_type:
        # One less, since transformers goes back to the original table only below its length.
        tokens = int(getattr(module, "original_max_seq_len", config.max_position_embeddings)) - 1
        return PositionLimit(tokens, f"beyond {tokens} tokens {told}")
    if rope_type == "longrope":
        settings = config.rope_parameters if layer_type is None else config.rope_parameters[layer_type]
        tokens = int(settings["original_max_position_embeddings"])
        return PositionLimit(tokens, f"beyond {tokens} tokens {told}")
    return None
