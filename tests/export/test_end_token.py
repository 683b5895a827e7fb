"""Templates with an end token, and those whose prompt merges with the text: stock sentence-transformers gives our vectors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerFast

from tests.data.prompts.tokenizers_for_tests import chat_byte_level, metaspace
from tests.export.export_cases import make_manifest
from unified_lm.core.errors import CheckpointError
from unified_lm.data.prompts.templates import Template, get_template
from unified_lm.export.directory import export_model, sentence_transformers_obstacle
from unified_lm.export.serving import write_serving
from unified_lm.inference.unified import UnifiedLM
from unified_lm.models.tiny import tiny_model, tiny_tokenizer

LONG = "A rather longer text, which the limit of thirty-two tokens cuts somewhere in the middle of it. " * 3
TEXTS = ["a short text", LONG, "Zwölf – 十二", "hello"]
BOTH, EMBED = ("embed", "generate"), ("embed",)


def export(
    folder: Path, template: Template, tokenizer: PreTrainedTokenizerFast, modes: tuple[str, ...] = EMBED, pooling: str = "mean"
) -> Path:
    model = tiny_model("llama", vocab_size=max(300, len(tokenizer) + 8))
    manifest = make_manifest(max_tokens=48, modes=modes, pooling=pooling, attention="causal")
    export_model(model, tokenizer, folder, manifest=manifest, template=template, verify="off")
    return folder


JOINED = replace(get_template("e5_instruct"), pools_prompt=False)


@pytest.mark.parametrize(
    ("template", "make", "modes", "pooling"),
    [
        (get_template("grit+eos"), tiny_tokenizer, BOTH, "last_token"),
        (get_template("grit+eos"), metaspace, BOTH, "mean"),
        (get_template("grit+eos"), chat_byte_level, EMBED, "last_token"),
        (get_template("e5_instruct"), tiny_tokenizer, EMBED, "last_token"),
        (get_template("e5_instruct"), metaspace, EMBED, "weighted_mean"),
        (get_template("qwen3_embedding"), chat_byte_level, EMBED, "last_token"),
        (JOINED, chat_byte_level, EMBED, "mean"),
        (JOINED, tiny_tokenizer, EMBED, "mean"),
        (replace(get_template("grit"), embedding_end="<|endoftext|>"), chat_byte_level, BOTH, "mean"),
    ],
    ids=lambda value: getattr(
        value, "name", getattr(value, "__name__", "+".join(value) if isinstance(value, tuple) else value)
    ),
)
def test_stock_vectors_equal_ours(tmp_path: Path, template: Template, make, modes: tuple[str, ...], pooling: str) -> None:
    folder = export(tmp_path / "export", template, make(), modes, pooling)
    stock = SentenceTransformer(str(folder), device="cpu")
    ours = UnifiedLM.from_pretrained(folder, device="cpu")
    for prompt, instruction in (("query", "Find the passage."), ("document", "")):
        np.testing.assert_allclose(stock.encode(TEXTS, prompt_name=prompt), ours.encode(TEXTS, instruction), atol=2e-6)
    features = stock[0].preprocess([LONG])
    end = template.end_token(make())
    assert stock.tokenizer.convert_ids_to_tokens(features["input_ids"][0])[-1] == end, "cut texts too end with it"
    plain = AutoTokenizer.from_pretrained(folder)("hello")["input_ids"]
    assert (plain[-1] == plain_id(folder, end)) == (modes == EMBED), "a prompt to continue does not end"


def plain_id(folder: Path, token: str) -> int:
    return int(AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids(token))


@torch.no_grad()
@pytest.mark.parametrize("modes", [EMBED, BOTH])
def test_an_engines_copy_ends_texts_too(tmp_path: Path, modes: tuple[str, ...]) -> None:
    """Engines read tokenizer.json, and nothing of sentence-transformers' arguments."""
    source = export(tmp_path / "export", get_template("grit+eos"), tiny_tokenizer(), modes, "last_token")
    write_serving(source, tmp_path / "served", "vllm-embed")
    prompt = json.loads((source / "config_sentence_transformers.json").read_text())["prompts"]["document"]
    tokenizer, model = AutoTokenizer.from_pretrained(tmp_path / "served"), AutoModel.from_pretrained(tmp_path / "served").eval()
    last = model(**tokenizer(prompt + "hello", return_tensors="pt")).last_hidden_state[0, -1]
    ours = UnifiedLM.from_pretrained(source, device="cpu").encode("hello")
    np.testing.assert_allclose(torch.nn.functional.normalize(last, dim=-1).numpy(), ours, atol=2e-6)


def test_an_end_that_stock_tools_take_for_a_part_of_the_prompt_is_refused(tmp_path: Path) -> None:
    tokenizer = chat_byte_level()
    tokenizer.pad_token = tokenizer.eos_token  # "<|endoftext|>" is then a special token without a name
    with pytest.raises(CheckpointError, match="none of the tokenizer's named special tokens"):
        export(tmp_path / "export", get_template("qwen3_embedding"), tokenizer)


def test_a_weighted_mean_over_the_prompt_is_what_stock_tools_compute() -> None:
    manifest = make_manifest(pooling="weighted_mean")
    assert sentence_transformers_obstacle(manifest, get_template("e5_instruct"), tiny_tokenizer()) is None
    assert "weighted mean counts" in str(sentence_transformers_obstacle(manifest, JOINED, tiny_tokenizer()))
