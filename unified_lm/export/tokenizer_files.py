"""The tokenizer of an export: the one that was trained with, which ends embedded texts as the template does.

An export that only embeds has a tokenizer that adds the template's end token itself, as those of published embedders do. Where
it also generates, a prompt must not end so: there sentence-transformers alone is told to add it (`embedding_settings`).
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from unified_lm.core.errors import CheckpointError
from unified_lm.data.prompts.encoding import PromptEncoder, Rejection
from unified_lm.data.prompts.templates import Template, adds_bos
from unified_lm.export.manifest import Manifest

_PROBES = ("What is it?", "the (__second) _text_ 12", "Zwölf – 十二", "  two  spaces\n\nlines")
"""Texts with the cases that conversions of tokenizers get wrong: punctuation, digits, non-ASCII and white space."""


def embedding_settings(tokenizer: PreTrainedTokenizerBase, template: Template, manifest: Manifest) -> dict[str, Any]:
    """Arguments with which `AutoTokenizer` reads the exported tokenizer for embedding.

    Args:
        tokenizer: that of the run, or the exported one.
        template: the prompt template.
        manifest: of the export.
    """
    # The tokenizer of a model that generates pads left, which would shift learned positions (GPT-2) of embedded texts.
    settings: dict[str, Any] = {"padding_side": "right"}
    if manifest.can_generate and PromptEncoder(template, tokenizer).appended_end is not None:
        # transformers then builds the whole of what is added: the BOS token would be lost if it were not named too.
        settings |= {"add_bos_token": adds_bos(tokenizer), "add_eos_token": True}
        if (end := template.end_token(tokenizer)) != tokenizer.eos_token:
            settings["eos_token"] = end
    return settings


def write_tokenizer(
    tokenizer: PreTrainedTokenizerBase, template: Template, manifest: Manifest, building: Path
) -> PreTrainedTokenizerBase:
    """Save a copy of the tokenizer with pad token, chat template and end token, and check that it reads back the same.

    Returns:
        The copy, without the end token.

    Raises:
        CheckpointError: it declares ordinary tokens as special, or what is read back encodes something else.
    """
    saved = copy.deepcopy(tokenizer)
    # `generate` continues the last column of a batch, which must not be padding; sentence-transformers is told to pad right.
    saved.padding_side = "left" if manifest.can_generate else "right"
    if saved.pad_token is None:
        saved.pad_token = saved.eos_token or saved.bos_token
    if manifest.can_generate and template.turns:
        saved.chat_template = template.chat_template(saved)
    own = {token.content for token in saved.added_tokens_decoder.values()}
    made_special = [token for token in saved.all_special_tokens if token not in own]
    if made_special:
        raise CheckpointError(
            f"the tokenizer declares ordinary tokens as special: {', '.join(map(repr, made_special))}. Once saved it would "
            "split texts at them. Remove them; for a mask token set tokenizer.mask_token = None."
        )
    encoder = PromptEncoder(template, tokenizer) if manifest.can_embed else None
    adds_end = encoder is not None and encoder.appended_end is not None and not manifest.can_generate
    written = with_end(saved, template.end_token(saved)) if adds_end else saved
    written.save_pretrained(building)
    back = AutoTokenizer.from_pretrained(building, local_files_only=True)
    for text in (*_PROBES, template.embedding_prompt(saved, "Find it.") + "the text"):
        if back(text)["input_ids"] != written(text)["input_ids"]:
            raise CheckpointError(
                f"the tokenizer encodes {text!r} differently once saved and loaded: AutoTokenizer loads it as a "
                f"{type(back).__name__} with special tokens {back.all_special_tokens}. This happens with a tokenizer of "
                f"another kind than transformers expects for family '{manifest.family}'."
            )
    if encoder is not None and encoder.appended_end is not None:
        _check_end(encoder, template, embedding_settings(tokenizer, template, manifest), building)
    return saved


def with_end(tokenizer: PreTrainedTokenizerBase, end: str) -> PreTrainedTokenizerBase:
    """A copy of a fast tokenizer that puts a special token after every text, behind whatever else it adds."""
    ending = copy.deepcopy(tokenizer)
    backend: Any = ending.backend_tokenizer
    description = json.loads(backend.to_str())
    first = description["post_processor"]
    last = {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": end, "type_id": 0}}],
        "pair": [
            {"Sequence": {"id": "A", "type_id": 0}},
            {"Sequence": {"id": "B", "type_id": 0}},
            {"SpecialToken": {"id": end, "type_id": 0}},
        ],
        "special_tokens": {end: {"id": end, "ids": [tokenizer.convert_tokens_to_ids(end)], "tokens": [end]}},
    }
    both = {"type": "Sequence", "processors": [first, last]}
    backend.post_processor = Tokenizer.from_str(
        json.dumps({**description, "post_processor": last if first is None else both})
    ).post_processor
    return ending


def _check_end(encoder: PromptEncoder, template: Template, settings: dict[str, Any], folder: Path) -> None:
    """Compare the exported tokenizer, read as sentence-transformers reads it, with the encoder of the run, truncation too."""
    stock = AutoTokenizer.from_pretrained(folder, local_files_only=True, **settings)
    prompt = template.embedding_prompt(encoder.tokenizer)
    whole = stock(prompt + _PROBES[0])["input_ids"]
    for text, limit in [*((text.strip(), 10_000) for text in _PROBES), (_PROBES[0], len(whole) - 1)]:
        (ours,) = encoder.embed([(text, "")], limit)
        found = stock(prompt + text, truncation=True, max_length=limit)["input_ids"]
        if isinstance(ours, Rejection) or found != ours.ids.tolist():
            raise CheckpointError(
                f"template '{template.name}' ends texts with {template.end_token(encoder.tokenizer)!r}, and the exported "
                f"tokenizer ({type(stock).__name__}, read with {settings}) encodes {text!r} as {found}. Take a tokenizer that "
                "adds this end itself, or a template without one and another pooling than last_token."
            )
    if encoder.appended_end not in stock.all_special_ids:
        raise CheckpointError(
            f"template '{template.name}' ends texts with {template.end_token(encoder.tokenizer)!r}, which is none of the "
            f"tokenizer's named special tokens ({', '.join(stock.all_special_tokens)}): sentence-transformers would take it "
            "for a part of the prompt. Make it the tokenizer's pad or eos token, or choose NAME+eos."
        )
