"""Tiny random models of every supported family, with a byte-level tokenizer: for tests, and to try a recipe offline."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from unified_lm.core.errors import ModelError, did_you_mean
from unified_lm.core.random import derive_seed
from unified_lm.models.monet import MonetConfig

_SPECIAL_TOKENS = ("<pad>", "<s>", "</s>")
# merges make token boundaries depend on the context, as in real tokenizers; "Ġ" is how byte-level BPE writes a space
_MERGES: list[tuple[str, str]] = [
    *(("i", "n"), ("e", "r"), ("t", "h"), ("th", "e"), ("Ġ", "the"), ("a", "n"), ("an", "d"), ("Ġ", "and"), ("o", "n")),
    *(("r", "e"), ("Ġ", "a"), ("in", "g"), ("Ġ", "s"), ("Ġ", "w"), ("e", "s"), ("Ġ", "o"), ("Ġo", "f"), ("Ċ", "Ċ"), ("Ġ", "Ġ")),
]


def tiny_tokenizer(add_bos: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer built in code: pad 0, bos 1, eos 2, the 256 bytes and a few merges. Always the same.

    Args:
        add_bos: whether encoding with special tokens puts ``<s>`` first (as Llama and Mistral do; SmolLM2 and GPT-2 do not).

    Returns:
        A tokenizer that decodes what it encodes to the same text, whatever the text, and that `AutoTokenizer` loads after
        `save_pretrained`.
    """
    tokens = [*_SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(left + right for left, right in _MERGES)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=_MERGES))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if add_bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocabulary["<s>"])]
        )
    pad, bos, eos = _SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        model_max_length=1024,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


# Heads of size 16, with grouped queries if the family supports them. The standard deviation of the weights, 0.1, is large
# enough that attention is far from uniform and a wrong mask changes the output visibly.
_COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.1,
}
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_GPT: dict[str, Any] = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 1024, "initializer_range": 0.1}
_LATENT: dict[str, Any] = {  # multi-head latent attention: query-key heads of 24, value heads of 16
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 48,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}

TINY_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _COMMON,
    "mistral": _COMMON | {"head_dim": 16, "sliding_window": None},
    "mixtral": _COMMON | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen2": _COMMON,
    "qwen3": _COMMON | {"head_dim": 16},
    "qwen3_moe": _COMMON | _EXPERTS | {"head_dim": 16, "decoder_sparse_step": 1},
    "qwen2_moe": _COMMON | _EXPERTS | {"shared_expert_intermediate_size": 32, "decoder_sparse_step": 1},
    "granitemoe": _COMMON | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma2": _COMMON | {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8},
    "gemma3_text": _COMMON | {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8},
    "phi3": _COMMON | {"sliding_window": None},
    "gpt_neox": {key: value for key, value in _COMMON.items() if key != "num_key_value_heads"},
    "gpt2": _GPT,
    "olmoe": _COMMON | {"num_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v2": _COMMON | _LATENT | {"topk_method": "greedy"},
    "deepseek_v3": _COMMON | _LATENT,
    "gpt_oss": _COMMON | {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    "gptj": _GPT | {"rotary_dim": 8},
    "falcon": {k: _COMMON[k] for k in ("hidden_size", "num_hidden_layers", "num_attention_heads", "initializer_range")},
    MonetConfig.model_type: {key: value for key, value in _COMMON.items() if key != "intermediate_size"}
    | {"moe_experts": 16, "moe_dim": 4, "moe_heads": 2, "moe_topk": 4, "moe_groups": 2},
    "bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4, "initializer_range": 0.1},
}
"""Config values of the tiny model of each family."""


def tiny_config(family: str, **overrides: Any) -> PreTrainedConfig:
    """The config of a tiny model: 2 layers, hidden size 64, the vocabulary of `tiny_tokenizer`.

    Args:
        family: a `model_type`, one of `TINY_FAMILIES`.
        overrides: config values that replace the tiny ones.

    Raises:
        ModelError: the family has no tiny model.
    """
    if family not in TINY_FAMILIES:
        raise ModelError(f"no tiny model of family '{family}'.{did_you_mean(family, TINY_FAMILIES)}")
    tokenizer = tiny_tokenizer()
    values = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    return AutoConfig.for_model(family, **values | TINY_FAMILIES[family] | overrides)


def tiny_model(family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> PreTrainedModel:
    """A tiny causal language model with random weights, on the CPU, in evaluation mode.

    Args:
        family: a `model_type`, one of `TINY_FAMILIES`.
        seed: for drawing the weights; the global generators are restored.
        dtype: of the weights.
        overrides: config values that replace the tiny ones.

    Raises:
        ModelError: the family has no tiny model.
    """
    config = tiny_config(family, **overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed("tiny", family, seed))
        model = AutoModelForCausalLM.from_config(config)
    return model.to(dtype).eval()
