"""MONET as a transformers model: Auto classes, cache, generation, safetensors, gradient checkpointing, attention interface.

Weights have the names of the published checkpoints (`model.layers.N.router.w1`, `.norm1`, `.moe.u1`, ...), which load as they
are. A Llama skeleton, whose feed-forward layers are what `MonetConfig.feed_forward` says.
"""

from __future__ import annotations

from inspect import signature
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from unified_lm.models.monet.baselines import ExpertWeights, PeerExperts, SmoeRouter, SparseExperts
from unified_lm.models.monet.configuration import MonetConfig
from unified_lm.models.monet.experts import HorizontalExperts, VerticalExperts
from unified_lm.models.monet.router import MonetRouter

_TELLS_PLACES = "cache_position" in signature(create_causal_mask).parameters
"""Whether this version of transformers is told which places of the cache a mask is for."""

_EXPERTS = {"vertical": VerticalExperts, "horizontal": HorizontalExperts}
_BASELINES = {"dense": LlamaMLP, "smoe": SparseExperts, "peer": PeerExperts}

__all__ = ["MonetConfig", "MonetForCausalLM", "MonetModel", "load_balancing_loss_func"]


class MonetDecoderLayer(GradientCheckpointingLayer):
    """Attention, then the experts. The first layer of a group has the router of all of them."""

    def __init__(self, config: MonetConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = LlamaAttention(config, layer_idx)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        owns_router = config.has_router and layer_idx % config.moe_groups == 0
        self.router = MonetRouter(config) if owns_router else None
        if config.has_router:
            self.moe = _EXPERTS[config.moe_decompose](config)
        else:
            self.mlp = _BASELINES[config.feed_forward](config)

    def forward(
        self, hidden: torch.Tensor, gates: torch.Tensor | None = None, keep: torch.Tensor | None = None, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run the layer.

        Args:
            hidden: `[B, T, D]`.
            gates: float32 `[B, T, 2, H, E]` of the group's router; None where this layer has it, or there is none.
            keep: bool `[E, E]`, the experts that take part; None is all.
            options: of the attention.

        Returns:
            The states, and the gates that the group goes on with.
        """
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden), **options)
        hidden = hidden + attended
        inputs = self.post_attention_layernorm(hidden)
        if self.router is not None:
            gates, _ = self.router(inputs)
        flat = inputs.flatten(0, 1)
        output = self.mlp(flat) if gates is None else self.moe(flat, gates.flatten(0, 1), keep)
        return hidden + output.view_as(hidden), gates


class MonetPreTrainedModel(PreTrainedModel):
    """What transformers knows of the family."""

    config: MonetConfig
    config_class = MonetConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    compiles_blocks = False  # routers keep statistics between forwards: every layer would be compiled again and again
    _no_split_modules = ["MonetDecoderLayer"]  # noqa: RUF012 (transformers declares them so)
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _keep_in_fp32_modules_strict = {"norm1", "norm2"}  # noqa: RUF012  (a tenth of a change is lost in bfloat16)
    _can_record_outputs = {  # noqa: RUF012
        "router_logits": [OutputRecorder(MonetRouter, index=1), OutputRecorder(SmoeRouter, index=0)],
        "hidden_states": MonetDecoderLayer,
        "attentions": LlamaAttention,
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, VerticalExperts):
            init.zeros_(module.b1)
            init.zeros_(module.b2)
        elif isinstance(module, HorizontalExperts):
            init.zeros_(module.b)
        elif isinstance(module, ExpertWeights):
            init.normal_(module.up, std=std)
            init.normal_(module.down, std=std)
        elif isinstance(module, SmoeRouter):
            init.normal_(module.weight, std=std)
        elif isinstance(module, MonetRouter) and module.keep is not None:
            init.ones_(module.keep)


class MonetModel(MonetPreTrainedModel):
    """The decoder without its head."""

    def __init__(self, config: MonetConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([MonetDecoderLayer(config, number) for number in range(config.num_hidden_layers)])
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **options: Any,
    ) -> MoeModelOutputWithPast:
        """See `transformers.LlamaModel.forward`. With `output_router_logits` also the raw scores of the routers.

        Raises:
            ValueError: neither or both of `input_ids` and `inputs_embeds`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        hidden = cast("torch.Tensor", self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        places = torch.arange(hidden.shape[1], device=hidden.device) + seen
        position_ids = places[None] if position_ids is None else position_ids
        told: dict[str, Any] = {"cache_position": places} if _TELLS_PLACES else {}
        options |= {
            "attention_mask": create_causal_mask(
                config=self.config,
                inputs_embeds=hidden,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
                **told,
            ),
            "position_embeddings": self.rotary_emb(hidden, position_ids=position_ids),
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "use_cache": use_cache,
        }
        gates, keep = None, None
        for layer in self.layers:
            owner = cast("MonetDecoderLayer", layer)
            if owner.router is not None:
                gates, keep = None, owner.router.keep
            hidden, gates = layer(hidden, gates=gates, keep=keep, **options)
        return MoeModelOutputWithPast(
            last_hidden_state=cast("torch.FloatTensor", self.norm(hidden)), past_key_values=past_key_values
        )


class MonetForCausalLM(MonetPreTrainedModel, GenerationMixin):
    """The decoder with a language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: MonetConfig) -> None:
        super().__init__(config)
        self.model = MonetModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.feed_forward == "smoe":
            self.num_experts, self.num_experts_per_tok = config.num_experts, config.num_experts_per_tok
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **options: Any,
    ) -> MoeCausalLMOutputWithPast:
        """See `transformers.LlamaForCausalLM.forward`; the loss is that of the next token alone."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **options,
        )
        hidden = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **options)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )


AutoConfig.register("monet", MonetConfig)
AutoModel.register(MonetConfig, MonetModel)
AutoModelForCausalLM.register(MonetConfig, MonetForCausalLM)
