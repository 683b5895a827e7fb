"""How much memory a run will need, part by part, before anything is loaded.

Parameters are counted exactly, on the model built without storage (torch's meta device). Weights, gradients and optimizer
state follow from the counts. Activations and logits are formulas for the largest pack; they leave out what the allocator
wastes and what kernels need for a moment.

Legend: H hidden size, F width of the feed-forward layer, A and K query and key-value heads, d their size, b bytes of the
compute type.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from unified_lm.config.schema import ModelConfig, RunConfig
from unified_lm.core.distributed import local_device
from unified_lm.core.errors import ModelError
from unified_lm.engine.accounting.state_bytes import Sizes, state_bytes
from unified_lm.engine.coupled import forwarded_twice
from unified_lm.models.architecture import blaming_architecture, described_config
from unified_lm.models.frozen import freeze
from unified_lm.models.lora import apply_lora, linear_module_names
from unified_lm.models.origin import has_export, weights_origin
from unified_lm.models.precision import AUTO, auto_dtype
from unified_lm.models.tiny import tiny_config
from unified_lm.objectives.cross_entropy import TILE_BYTES

_FLOAT32 = 4
_HEAD_NORMS = ("qwen3", "qwen3_moe", "gemma3", "gemma3_text", "olmoe")  # families that normalize queries and keys
_NF4_BYTES = 0.5 + 0.127 / 8  # QLoRA (2023), section 3: double quantization leaves 0.127 bits of constants per parameter
_PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "embeddings", "communication")


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a run needs.

    Attributes:
        num_parameters: of the model with its adapters and projection.
        num_trainable: those that are trained.
        tokens_by_stream: upper bound of one step's tokens over all ranks, per stream: every sample at its limit.
        packs_per_rank: upper bound of the forwards of one step on one rank.
        optimizer_steps: of the run.
        world_size: ranks.
        bytes_by_part: bytes per GPU for each part, in the order of the table.
    """

    num_parameters: int
    num_trainable: int
    tokens_by_stream: Mapping[str, int]
    packs_per_rank: int
    optimizer_steps: int
    world_size: int
    bytes_by_part: Mapping[str, int]

    @property
    def tokens_per_step(self) -> int:
        """Upper bound of the tokens of one step, over all ranks and streams."""
        return sum(self.tokens_by_stream.values())

    @property
    def total_bytes(self) -> int:
        """Bytes per GPU, all parts."""
        return sum(self.bytes_by_part.values())


def estimate(config: RunConfig, world_size: int = 1) -> Estimate:
    """Estimate the memory of a run per GPU without loading weights.

    Args:
        config: the run.
        world_size: ranks; what each holds depends on `parallel.backend`. "auto" counts as holding everything on each.

    Raises:
        ModelError: the family is unknown to transformers, or the model's configuration cannot be found.
    """
    if config.model.dtype == AUTO:
        config = replace(config, model=replace(config.model, dtype=auto_dtype(local_device())[0]))
    model_config = model_configuration(config.model)
    model = _build_without_storage(model_config, config.model)
    base = sum(parameter.numel() for parameter in model.parameters())
    weights = _weight_bytes(config, model)
    threshold = config.parallel.persistence_threshold
    small = sum(parameter.numel() for parameter in model.parameters() if parameter.numel() <= threshold)
    largest = max(parameter.numel() for parameter in model.parameters())
    with torch.device("meta"):  # adapters, too, are only counted
        adapters = apply_lora(model, config.lora, config.seed).num_trainable if config.lora is not None else 0
    projection = _projection_parameters(config, model_config)
    if config.optim.frozen:
        freeze(model, config.optim.frozen)
    trainable = projection + sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    with blaming_architecture(config.model):
        activations = activation_bytes(config, model_config, pack_tokens(config, world_size))
        activations *= max(1, min(config.packing.num_retained or 1, packs_twice(config, world_size)))
    tokens = {name: stream.tokens_per_step for name, stream in config.streams.items()}
    pack = pack_tokens(config, world_size)
    state = state_bytes(
        config.parallel,
        world_size,
        Sizes(
            weights=weights + adapters * _weight_bytes_each(config.model) + projection * _FLOAT32,
            num_parameters=base + adapters + projection,
            num_trainable=trainable,
            num_small=small,
            weight_bytes=_weight_bytes_each(config.model),
            is_bfloat16=config.model.dtype == "bfloat16",
            transient=_transient_gradient(config, largest),
            num_whole=projection if config.model.dtype == "bfloat16" else 0,
        ),
    )
    parts = {
        **{part: state[part] for part in ("weights", "gradients", "optimizer")},
        "activations": activations,
        "logits": _logit_bytes(config, model_config, pack),
        "embeddings": _batch_bytes(config, model_config),
        "communication": state["communication"],
    }
    assert tuple(parts) == _PARTS
    return Estimate(
        num_parameters=base + adapters + projection,
        num_trainable=trainable,
        tokens_by_stream=tokens,
        packs_per_rank=max(1, math.ceil(sum(tokens.values()) / world_size / config.packing.token_budget)),
        optimizer_steps=config.max_steps,
        world_size=world_size,
        bytes_by_part=parts,
    )


# --- the model ---------------------------------------------------------------------------------------------------------


def model_configuration(model: ModelConfig) -> PretrainedConfig:
    """The transformers configuration of a model, an adapter's base among them: what the run would load, or a description of it.

    A recipe's `architecture` describes its own base, so `init_from` counts before it, once there is an export.

    Raises:
        ModelError: nothing says what the model looks like.
    """
    described = tiny_config(model.family) if model.tiny_random else described_config(model) if model.architecture else None
    # Without an export an earlier stage of a chain has not been run.
    if described is not None and (model.init_from is None or not has_export(model.init_from)):
        return described
    try:
        base = weights_origin(model)
        return AutoConfig.from_pretrained(base.location, revision=base.revision, trust_remote_code=model.trust_remote_code)
    except (ModelError, OSError, ValueError) as error:
        place, reason = model.init_from or model.name, str(error).splitlines()[0].rstrip(".")
        raise ModelError(
            f"cannot estimate: no configuration of the model '{place}' at hand ({reason}). "
            "Give model.family and model.architecture={hidden_size: ..., ...}, or a local folder."
        ) from error


def _build_without_storage(config: PretrainedConfig, described: ModelConfig) -> PreTrainedModel:
    with blaming_architecture(described), torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=described.trust_remote_code)
    if not any(parameter.numel() for parameter in model.parameters()):
        raise ModelError(f"model.architecture: a {described.family} model of these sizes has no parameters.")
    return model


def _projection_parameters(config: RunConfig, model_config: PretrainedConfig) -> int:
    dim = config.model.projection_dim
    return 0 if dim is None else (model_config.hidden_size + 1) * dim


# --- bytes -------------------------------------------------------------------------------------------------------------


def _compute_bytes(model: ModelConfig) -> int:
    return 2 if model.dtype == "bfloat16" or model.autocast else _FLOAT32


def _weight_bytes_each(model: ModelConfig) -> int:
    """Per weight; under autocast with the bfloat16 copy that a forward keeps for its backward."""
    return 2 if model.dtype == "bfloat16" else _FLOAT32 + (2 if model.autocast else 0)


def _weight_bytes(config: RunConfig, model: PreTrainedModel) -> int:
    each = _weight_bytes_each(config.model)
    total = sum(parameter.numel() for parameter in model.parameters()) * each
    if config.lora is not None and config.lora.quantize_4bit:
        linear = sum(model.get_submodule(name).weight.numel() for name in linear_module_names(model))  # type: ignore
        total -= round(linear * (each - _NF4_BYTES))
    return total


def _transient_gradient(config: RunConfig, largest: int) -> int:
    """The one bfloat16 gradient that exists before it is added to its float32 sum: at most the largest parameter's."""
    return 2 * largest if config.model.dtype == "bfloat16" and config.lora is None else 0


def activation_bytes(config: RunConfig, model_config: PretrainedConfig, num_tokens: int) -> int:
    """What one pack's forward keeps for its backward.

    Per token a layer keeps, for each of its two norms, the float32 input and two results (4H + 2bH); queries, keys, values and
    the attention's output (b d (2A + 2K)); and four tensors of the feed-forward width (4bF, for every active expert). With
    checkpointing every layer keeps its input (bH), and one layer at a time the whole; where products are kept, each of its
    matrices' results too (queries, keys, values and two results of H; two, or with experts two each, of F).

    Against what autograd really kept (hidden size 256, 4 layers): within 2 % for Llama, Mixtral and Qwen3, up to 20 %
    too much with LoRA (50 % with frozen experts), and half of it for GPT-2, whose activation function keeps more.

    Args:
        config: dtype, checkpointing and LoRA.
        model_config: sizes.
        num_tokens: of the pack.
    """
    b = _compute_bytes(config.model)
    hidden, layers = model_config.hidden_size, model_config.num_hidden_layers
    layer = _layer_bytes(config, model_config, b)
    edges = hidden * (_FLOAT32 + 3 * b)  # the embedding's output, and the final norm
    kept = layers * layer
    if config.model.gradient_checkpointing:
        products = 0 if recomputes_layers(config.model) else _product_bytes(model_config, b)
        kept = layers * (hidden * b + products) + layer
    return num_tokens * (kept + edges)


def recomputes_layers(model: ModelConfig) -> bool:
    """Whether a backward computes the matrix products of a layer again."""
    return model.gradient_checkpointing and model.checkpoint_keeps == "inputs"


def _product_bytes(model_config: PretrainedConfig, b: int) -> int:
    """Bytes per token of the results of a layer's matrix products with weights."""
    hidden, heads, kv_heads, head_dim, experts, width = _layer_sizes(model_config)
    return b * ((heads + 2 * kv_heads) * head_dim + hidden + 2 * width + hidden * max(1, experts))


def _layer_sizes(model_config: PretrainedConfig) -> tuple[int, int, int, int, int, int]:
    """H, A, K, d, experts of a token (0 of a dense layer), and F over all of them."""
    hidden, heads = model_config.hidden_size, model_config.num_attention_heads
    kv_heads = getattr(model_config, "num_key_value_heads", None) or heads
    head_dim = getattr(model_config, "head_dim", None) or hidden // heads
    experts = getattr(model_config, "num_experts_per_tok", None) or 0
    width = getattr(model_config, "intermediate_size", None) or 4 * hidden
    if experts:
        width = experts * (getattr(model_config, "moe_intermediate_size", None) or width)
    return hidden, heads, kv_heads, head_dim, experts, width


def _layer_bytes(config: RunConfig, model_config: PretrainedConfig, b: int) -> int:
    """Bytes that one layer keeps per token."""
    hidden, heads, kv_heads, head_dim, experts, width = _layer_sizes(model_config)
    attention = 2 * (heads + kv_heads) * head_dim
    if model_config.model_type in _HEAD_NORMS:
        attention += (heads + kv_heads) * head_dim * (_FLOAT32 + b) // b
    layer = 2 * hidden * (_FLOAT32 + 2 * b) + b * attention + 4 * b * width + (2 * b * hidden * experts if experts else 0)
    if config.lora is not None and config.lora.dropout:
        layer += 3 * hidden + heads * head_dim + 2 * hidden + width  # one byte of dropout mask for each adapter input
    return layer


def _logit_bytes(config: RunConfig, model_config: PretrainedConfig, num_tokens: int) -> int:
    """Logits of one tile and their gradient, in float32; never those of a whole pack (`objectives/cross_entropy.py`)."""
    if not any(stream.objective.uses_logits for stream in config.streams.values()):
        return 0
    return 2 * min(TILE_BYTES, num_tokens * model_config.vocab_size * _FLOAT32)


def _batch_bytes(config: RunConfig, model_config: PretrainedConfig) -> int:
    """What objectives over the whole batch hold on every rank."""
    dim = config.model.projection_dim or model_config.hidden_size
    return sum(s.objective.batch_bytes(s.batch_size, s.group_size, dim) for s in config.streams.values())


def pack_tokens(config: RunConfig, world_size: int) -> int:
    """Upper bound of the tokens of one pack: the budget, or less where a rank's whole step is smaller."""
    longest = max(stream.longest_sample for stream in config.streams.values())
    step = math.ceil(sum(stream.tokens_per_step for stream in config.streams.values()) / world_size)
    return max(longest, min(config.packing.token_budget, step))


def packs_twice(config: RunConfig, world_size: int) -> int:
    """Upper bound of the packs of one step on one rank that GradCache would forward twice if it kept no graph.

    Args:
        config: the run.
        world_size: ranks.
    """
    twice = forwarded_twice({name: stream.objective for name, stream in config.streams.items()})
    tokens = sum(config.streams[name].tokens_per_step for name in twice)
    return math.ceil(tokens / world_size / config.packing.token_budget)
