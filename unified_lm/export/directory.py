"""The dual-mode export: one folder that stock tools load in both modes with trust_remote_code=False.

`AutoModelForCausalLM` reads the root config.json (`"is_causal": true`); sentence-transformers overlays it with the
`config_kwargs` of sentence_bert_config.json (`{"is_causal": false}`). The overlay only applies to keys that the root has:
without the root key it is silently ignored, and the embeddings are causal.

This module writes what transformers reads; `sentence_transformers_files` writes the rest.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unified_lm.core.errors import CheckpointError, did_you_mean
from unified_lm.core.files import write_json, write_text
from unified_lm.core.outputs import check_folder, write_folder
from unified_lm.core.typed import require_typed
from unified_lm.data.prompts.templates import Template
from unified_lm.export.manifest import MERGED, Manifest, library_versions
from unified_lm.export.merge import ModelParts, merged_weights
from unified_lm.export.model_card import model_card
from unified_lm.export.sentence_transformers_files import (
    POOLING_MODES,
    write_projection,
    write_refusal,
    write_sentence_transformers,
)
from unified_lm.export.tokenizer_files import embedding_settings, write_tokenizer
from unified_lm.export.verify import Verification, verify_export
from unified_lm.export.weight_files import Digest, write_weights
from unified_lm.models.pooling import Projection
from unified_lm.models.quiet import quiet_loading
from unified_lm.models.routing import router_sizes
from unified_lm.models.weights_hash import hash_weights

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Storage dtypes of exported weights, by name."""

_log = logging.getLogger(__name__)


def export_model(
    causal_lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    target: Path,
    *,
    manifest: Manifest,
    template: Template,
    projection: Projection | None = None,
    own_config: Mapping[str, Any] | None = None,
    verify: str = "full",
    sentence_transformers: bool = True,
    max_shard_size: str = "5GB",
    parts: ModelParts | None = None,
) -> Manifest:
    """Write the export folder; on any failure a previous `target` is unchanged.

    Adapters are merged and quantized weights dequantized on the way to the files, one layer at a time. Call it in one process.
    The model is not changed, whatever its attention kernel.

    Args:
        causal_lm: a causal language model, possibly with the adapters of `models.lora.apply_lora`.
        tokenizer: its tokenizer. A copy is saved, with a chat template where the model generates, and a pad token.
        target: the folder to create, or to replace where it is an export and holds nothing else (`core.outputs`).
        manifest: what to record. `embedding_dim`, `versions`, `weights_hash` and the template's fields are filled in here.
        template: the prompt template that training used.
        projection: linear head `[D] -> [P]` on the pooled vector, or None.
        own_config: the base checkpoint's own values of what training changed in its configuration (attention dropout).
        verify: what to verify before the folder appears, see `Verification`: "full", "sampled" or "off".
        sentence_transformers: whether sentence-transformers must be able to load it. False exports models that it cannot
            express (see `sentence_transformers_obstacle`) for transformers and `UnifiedLM` only; so does a method with routing.
        max_shard_size: largest weight file.
        parts: how to take the model's weights, where they are partitioned or not needed afterwards.

    Returns:
        The manifest as written.

    Raises:
        OutputError: `target` holds what this package did not write, or is a file or a link.
        CheckpointError: a setting is unknown, sentence-transformers cannot express the model, a check fails, or the folder
            cannot be written.
    """
    check = Verification.parse(verify)
    sentence_transformers = sentence_transformers and manifest.stock_tools_embed
    _check_request(manifest, projection, Path(target))
    wanted = manifest.can_embed and sentence_transformers
    if wanted and (obstacle := sentence_transformers_obstacle(manifest, template, tokenizer)):
        raise CheckpointError(
            f"sentence-transformers cannot express this model: {obstacle} Train with another pooling, or export with "
            "sentence_transformers=False for transformers and UnifiedLM only."
        )
    hidden_size = causal_lm.config.get_text_config().hidden_size
    complete = complete_manifest(manifest, causal_lm, template, projection)
    written: list[Manifest] = []

    def fill(building: Path) -> None:
        """Write every file of the export into `building`, and verify it there."""
        digests = _write_model(parts or ModelParts(causal_lm), building, complete.dtype, max_shard_size, check)
        saved_tokenizer = write_tokenizer(tokenizer, template, complete, building)
        overlay = _write_config(building, complete, own_config or {})
        _write_generation_config(causal_lm, saved_tokenizer, template, complete, building)
        if projection is not None:
            write_projection(projection, DTYPES[complete.dtype], building)
        if complete.can_embed and sentence_transformers:
            strings = prompts(complete, template, saved_tokenizer)
            settings = embedding_settings(tokenizer, template, complete)
            write_sentence_transformers(complete, strings, hidden_size, overlay, settings, building)
        elif complete.can_embed and not complete.stock_tools_embed:
            write_refusal(building)
        final = replace(complete, weights_hash=hash_weights(building))
        final.save(building)
        write_text(building / "README.md", model_card(final, prompts(final, template, saved_tokenizer), sentence_transformers))
        # before the rename: an exception here leaves a previous export in place
        verify_export(building, digests, final, template, check, sentence_transformers)
        written.append(final)

    with quiet_loading(reports=False):
        write_folder(Path(target), MERGED, fill)
    _log.info("exported to %s (verified: %s)", target, check.value)
    return written[0]


def complete_manifest(
    manifest: Manifest, causal_lm: PreTrainedModel, template: Template, projection: Projection | None
) -> Manifest:
    """The manifest with everything that follows from what is exported, except the hash of its weights."""
    projection_dim = None if projection is None else projection.linear.out_features
    size = 0 if manifest.method == "rw" else projection_dim or causal_lm.config.get_text_config().hidden_size
    size += 0 if manifest.method == "hs" else sum(router_sizes(causal_lm))
    return replace(
        manifest,
        family=causal_lm.config.model_type,
        template=template.name,
        template_fields=asdict(template),
        embedding_dim=size if manifest.can_embed else 0,
        projection_dim=projection_dim,
        versions=library_versions(),
    )


def prompts(manifest: Manifest, template: Template, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Prompt name -> the string that precedes a text; "query" and "document" always exist."""
    instructions = {"query": "", "document": "", **manifest.instructions}
    return {name: template.embedding_prompt(tokenizer, instruction) for name, instruction in instructions.items()}


def sentence_transformers_obstacle(manifest: Manifest, template: Template, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Why sentence-transformers cannot embed like this model, or None if it can.

    It is known before training, so that a run whose export cannot work is refused at once.
    """
    if template.pools_prompt:
        return None
    if manifest.pooling == "weighted_mean" and any(prompts(manifest, template, tokenizer).values()):
        return (
            "its weighted mean counts positions from the start of the prompt, ours from the start of the text, and "
            f"the template '{template.name}' puts a prompt before the text."
        )
    return None


def check_tokenizer(
    causal_lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, template: Template, manifest: Manifest
) -> None:
    """Check before training that the tokenizer can be exported.

    Args:
        causal_lm: whose configuration decides how `AutoTokenizer` reads the files.
        tokenizer: its tokenizer.
        template: the prompt template.
        manifest: of the export to come.

    Raises:
        CheckpointError: see `export_model`.
    """
    with quiet_loading(reports=False), tempfile.TemporaryDirectory() as folder:
        write_json(Path(folder) / "config.json", {"model_type": causal_lm.config.model_type})
        write_tokenizer(tokenizer, template, replace(manifest, family=causal_lm.config.model_type), Path(folder))


def template_of(manifest: Manifest) -> Template:
    """The template that an export records.

    Raises:
        CheckpointError: the manifest's template fields are not those of a template.
    """
    where = f"the export's template '{manifest.template}' cannot be read"
    fix = "It is damaged, or of another version; export again."
    return require_typed(Template, manifest.template_fields, where, CheckpointError, fix=fix)


def stop_token_ids(
    template: Template, tokenizer: PreTrainedTokenizerBase, known: int | Sequence[int] | None = None
) -> list[int]:
    """Tokens that end an answer: those in `known`, the template's own if it is a single token, and the tokenizer's end of text.

    Args:
        template: the prompt template.
        tokenizer: of the model.
        known: the model's own end tokens, as a generation config has them.
    """
    stop_ids = [] if known is None else [known] if isinstance(known, int) else list(known)
    closing = (
        tokenizer(template.closing("assistant", tokenizer), add_special_tokens=False)["input_ids"] if template.turns else []
    )
    for token in (closing[0] if len(closing) == 1 else None, tokenizer.eos_token_id):
        if token is not None and token not in stop_ids:
            stop_ids.append(token)
    return stop_ids


def _check_request(manifest: Manifest, projection: Projection | None, target: Path) -> None:
    check_folder(target, MERGED)
    if manifest.pooling not in POOLING_MODES:
        raise CheckpointError(f"unknown pooling '{manifest.pooling}'.{did_you_mean(manifest.pooling, POOLING_MODES)}")
    if manifest.dtype not in DTYPES:
        raise CheckpointError(f"unknown dtype '{manifest.dtype}'.{did_you_mean(manifest.dtype, DTYPES)}")
    if manifest.standardizer is not None:
        raise CheckpointError(
            "a standardizer belongs to finished weights: export without one, then `unified-lm standardize EXPORT`."
        )
    if projection is not None and not manifest.can_embed:
        raise CheckpointError("a projection has no effect in an export that does not embed. Remove it, or add mode 'embed'.")


def _write_model(parts: ModelParts, building: Path, dtype: str, max_shard_size: str, check: Verification) -> dict[str, Digest]:
    """Write the weights and a first config.json; returns digests of the weights, where they are verified."""
    skeleton = parts.skeleton()
    if skeleton.generation_config is not None:
        _drop_sampling_options(skeleton.generation_config)
    skeleton.save_pretrained(building, state_dict={})  # configurations only
    weights, digests = merged_weights(parts), check is not Verification.OFF
    return write_weights(skeleton, weights, building, DTYPES[dtype], max_shard_size, digests=digests)


def _drop_sampling_options(generation_config: Any) -> None:
    """Remove sampling options of a greedy config: transformers refuses to save a temperature with `do_sample=False`."""
    if not generation_config.do_sample:
        for name in ("temperature", "top_p", "top_k", "min_p", "typical_p"):
            if getattr(generation_config, name, None) is not None:
                setattr(generation_config, name, None)


def _write_config(building: Path, manifest: Manifest, own: Mapping[str, Any]) -> dict[str, Any]:
    """Complete config.json, with the checkpoint's `own` values of what training changed in it.

    Returns:
        The overlay that turns it into the embedding model's config.
    """
    path = building / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["dtype"] = manifest.dtype
    # The name of our attention function means nothing to stock tools, which choose their own.
    for name in ("_attn_implementation", "attn_implementation", "_attn_implementation_internal"):
        config.pop(name, None)
    text = _text_section(config)
    text.update(own)
    # Stock tools cannot be told of a first token that sees itself alone: what they read of such an export is causal.
    causal_embedding = manifest.attention != "bidirectional"
    # The root serves generation if the model generates; then the overlay makes embeddings bidirectional.
    text["is_causal"] = causal_embedding or manifest.can_generate
    text["use_cache"] = True
    _add_older_rope(text)
    write_json(path, config)
    overlay: dict[str, Any] = {"is_causal": causal_embedding}
    return overlay if text is config else {"text_config": overlay}


def _add_older_rope(text: dict[str, Any]) -> None:
    """Repeat the rotary settings where transformers 4 looks for them: it takes its defaults otherwise, in silence.

    Only settings that are the same for all layers; those that differ by type of layer have other names in every family.
    """
    rope = text.get("rope_parameters")
    if not isinstance(rope, dict) or not isinstance(rope.get("rope_theta"), int | float):
        return
    text["rope_theta"] = rope["rope_theta"]
    names = _OLDER_ROPE.get(text.get("model_type", ""), {"partial_rotary_factor": "partial_rotary_factor"})
    text.update({older: rope[name] for older, name in names.items() if name in rope})
    if rope.get("rope_type", "default") != "default":
        own = {"rope_theta", "partial_rotary_factor"}  # never parts of the scaling there
        text["rope_scaling"] = {name: value for name, value in rope.items() if name not in own}


_NEOX_ROPE = {"rotary_emb_base": "rope_theta", "rotary_pct": "partial_rotary_factor"}
_OLDER_ROPE = {"gpt_neox": _NEOX_ROPE, "gpt_neox_japanese": _NEOX_ROPE}
"""Family -> names of its own that transformers 4 has for rotary settings -> their names in `rope_parameters`."""


def _text_section(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config.json that the language model reads; multimodal models nest it."""
    nested = config.get("text_config")
    return cast("dict[str, Any]", nested) if isinstance(nested, dict) else config


def _write_generation_config(
    causal_lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, template: Template, manifest: Manifest, building: Path
) -> None:
    """Make `generate` stop where the template's answers end."""
    path = building / "generation_config.json"
    if not manifest.can_generate:
        path.unlink(missing_ok=True)
        return
    value = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    value.pop("_from_model_config", None)  # it would mark all values as copies of config.json
    stop_ids = stop_token_ids(template, tokenizer, value.get("eos_token_id"))
    if stop_ids:
        value["eos_token_id"] = stop_ids[0] if len(stop_ids) == 1 else stop_ids
    for name in ("bos_token_id", "pad_token_id"):
        if getattr(tokenizer, name) is not None:
            value[name] = getattr(tokenizer, name)
    value["use_cache"] = True
    write_json(path, value)
