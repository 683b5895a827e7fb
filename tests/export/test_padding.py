"""Batches that need padding, through stock tools: each prompt is answered, and each text embedded, as if it were alone."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.export.export_cases import make_manifest
from unified_lm.data.prompts.templates import get_template
from unified_lm.export.directory import export_model
from unified_lm.models.tiny import tiny_model, tiny_tokenizer

PROMPTS = ["json", "What does the function json.loads of the standard library return, and when does it raise an error?"]
FAMILIES = ["llama", "mistral", "mixtral", "qwen3", "gemma2", "gpt2", "gpt_neox", "gpt_oss", "gptj", "falcon", "bloom"]
TEXTS = ["x", "A rather longer text, so that the first has padding in a batch.", "Zwölf – 十二"]


def write(folder: Path, family: str, template: str = "grit", **changes: object) -> Path:
    manifest = make_manifest(family=family, **changes)
    tokenizer = tiny_tokenizer(add_bos=family not in ("qwen3", "gpt2"))
    export_model(tiny_model(family), tokenizer, folder, manifest=manifest, template=get_template(template), verify="off")
    return folder


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_batched_prompts_are_answered_as_each_alone(tmp_path: Path, family: str) -> None:
    folder = write(tmp_path / "export", family)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()

    def answers(prompts: list[str], **options: object) -> list[list[int]]:
        batch = tokenizer(prompts, return_tensors="pt", padding=True, **options)
        tokens = model.generate(**batch, max_new_tokens=12, do_sample=False, eos_token_id=None)
        return tokens[:, batch["input_ids"].shape[1] :].tolist()

    alone = [answers([prompt])[0] for prompt in PROMPTS]
    assert answers(PROMPTS) == alone
    assert answers(PROMPTS, padding_side="right") != alone, "padding must matter for this test to mean it"


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gpt2", "gemma2"])
@pytest.mark.parametrize(
    ("pooling", "template"), [("mean", "grit"), ("last_token", "grit"), ("cls", "grit"), ("weighted_mean", "plain")]
)
def test_batched_texts_are_embedded_as_each_alone(tmp_path: Path, family: str, pooling: str, template: str) -> None:
    folder = write(tmp_path / "export", family, template, pooling=pooling, instructions={})
    assert AutoTokenizer.from_pretrained(folder).padding_side == "left"
    model = SentenceTransformer(str(folder), device="cpu")
    alone = np.concatenate([model.encode([text]) for text in TEXTS])
    np.testing.assert_allclose(model.encode(TEXTS), alone, atol=2e-6)


def test_an_export_that_only_embeds_pads_right(tmp_path: Path) -> None:
    folder = write(tmp_path / "export", "llama", modes=("embed",))
    assert AutoTokenizer.from_pretrained(folder).padding_side == "right"
