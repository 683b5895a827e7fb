"""Parameters that are partitioned across ranks (ZeRO-3): how to load them, and how to see them whole.

No rank's accelerator ever holds the whole model. Rank 0 reads the checkpoint on the CPU as in any other run, with the same
checks of missing, unexpected and misshapen weights, and its errors are raised on every rank. Then every rank builds the
partitioned model without values, and receives its part of each weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from unified_lm.config.schema import ModelConfig
from unified_lm.core import distributed
from unified_lm.core.agreement import broadcast_object, run_on_rank0
from unified_lm.core.errors import ModelError
from unified_lm.models.headless import is_headless, mark_headless
from unified_lm.models.loading import DTYPES, LoadedModel, load_model


class Sharding(Protocol):
    """How parameters are partitioned across ranks."""

    def initializing(self, dtype: torch.dtype) -> AbstractContextManager[None]:
        """Context in which each new module's parameters are partitioned as soon as the module is complete."""

    def filling(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
        """Context in which parameters are whole; what rank 0 writes to them is partitioned again on leaving."""


def load_sharded(config: ModelConfig, sharding: Sharding, *, needs_head: bool = True) -> LoadedModel:
    """Load the model that a recipe names, like `load_model`, but partitioned. Collective.

    Args:
        config: the model part of a recipe.
        sharding: how parameters are partitioned.
        needs_head: see `load_model`.

    Raises:
        ModelError: see `load_model`; also if the partitioned model has other weights than the one that was loaded whole.
    """
    read: list[LoadedModel] = []  # stays empty except on rank 0

    def read_whole() -> dict[str, Any]:
        """Load the whole model on this rank; returns what the other ranks need to build it without weights."""
        loaded = load_model(config, needs_head=needs_head)
        read.append(loaded)
        causal_lm = loaded.causal_lm
        return {
            "config": causal_lm.config,
            "attention": causal_lm.config._attn_implementation,
            "generation_config": causal_lm.generation_config,
            "headless": is_headless(causal_lm),
            "tokenizer": loaded.tokenizer,
            "provenance": loaded.provenance,
            "buffers": dict(causal_lm.named_buffers()),
            # families keep some, as routers, in float32: a partition has the model's dtype, so every rank holds them whole
            "kept": {name: p.detach() for name, p in causal_lm.named_parameters() if p.dtype != DTYPES[config.dtype]},
        }

    known = run_on_rank0(read_whole)
    causal_lm = _build(config, known, sharding)
    _place_whole(causal_lm, known["kept"])
    whole = dict(read[0].causal_lm.named_parameters()) if read else {}
    _check_names(causal_lm, whole)
    for name, parameter in causal_lm.named_parameters():
        # one parameter at a time, so that an accelerator holds at most one whole parameter
        with sharding.filling([parameter]), torch.no_grad():
            if whole:
                parameter.copy_(whole[name])
    _copy_buffers(causal_lm, known["buffers"])
    if known["headless"]:
        mark_headless(causal_lm)
    return LoadedModel(causal_lm.eval(), known["tokenizer"], known["provenance"])


def _build(config: ModelConfig, known: dict[str, Any], sharding: Sharding) -> PreTrainedModel:
    """The partitioned model, its weights not yet filled."""
    dtype = DTYPES[config.dtype]
    with no_init_weights(), sharding.initializing(dtype):
        causal_lm: PreTrainedModel = AutoModelForCausalLM.from_config(
            known["config"],
            dtype=dtype,
            attn_implementation=known["attention"],
            trust_remote_code=config.trust_remote_code,
        )
    causal_lm.tie_weights()
    causal_lm.generation_config = known["generation_config"]
    embeddings: Any = causal_lm.get_input_embeddings()
    if getattr(embeddings, "padding_idx", None) is not None:
        embeddings.padding_idx = None  # as in `load_model`
    return causal_lm


def _place_whole(causal_lm: PreTrainedModel, values: dict[str, torch.Tensor]) -> None:
    """Replace partitioned parameters by whole ones with these values."""
    for name, value in values.items():
        owner, _, attribute = name.rpartition(".")
        parameter = nn.Parameter(value.to(distributed.local_device()))
        causal_lm.get_submodule(owner)._parameters[attribute] = parameter


def _check_names(causal_lm: PreTrainedModel, whole: dict[str, nn.Parameter]) -> None:
    """Check that the partitioned model has the loaded one's weights, shapes and dtypes; a missing one would stay unfilled."""
    found = {name: (distributed.full_shape(p), p.dtype) for name, p in causal_lm.named_parameters()}
    expected = broadcast_object({name: (tuple(p.shape), p.dtype) for name, p in whole.items()})
    if found != expected:
        differing = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        raise ModelError(
            f"{type(causal_lm).__name__} built in parts has other weights than the loaded one: {', '.join(differing[:3])}"
            f"{', ...' if len(differing) > 3 else ''}. This family cannot be loaded under ZeRO-3; use parallel=zero2."
        )


def _copy_buffers(causal_lm: PreTrainedModel, buffers: dict[str, torch.Tensor]) -> None:
    """Copy buffers (rotary frequencies, ...) as loaded: those created while parameters are partitioned take their dtype."""
    for name, _ in list(causal_lm.named_buffers()):
        owner, _, attribute = name.rpartition(".")
        causal_lm.get_submodule(owner)._buffers[attribute] = buffers[name].to(distributed.local_device())
