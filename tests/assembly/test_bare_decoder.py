"""Decoders that are published without a language-model head, to embed: trained, exported and used, never asked to generate."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import Normalize, Pooling, Transformer
from tokenizers import processors
from transformers import AutoModel, AutoModelForCausalLM

from tests.assembly.test_publish import embedding_run
from tests.engine.small_run import small_run
from tests.processes import Group
from unified_lm.assembly import build_run
from unified_lm.cli.main import main
from unified_lm.cli.script import train
from unified_lm.composition.compose import compose_run
from unified_lm.config.schema import ModelConfig
from unified_lm.core.errors import CheckpointError, ModelError
from unified_lm.inference import UnifiedLM
from unified_lm.models.headless import is_headless
from unified_lm.models.loading import load_model
from unified_lm.models.tiny import TINY_FAMILIES, tiny_model, tiny_tokenizer

TEXTS = ["open a file", "a text of\nseveral lines, and some more", "x"]
PROMPTS = {"e5_instruct": "Instruct: Find it.\nQuery: ", "qwen3_embedding": "Instruct: Find it.\nQuery:"}
OWN = {"e5_instruct": ("mistral", False), "qwen3_embedding": ("qwen3", True)}
"""Template -> family of the model that it is named for, and whether that one's head is the embedding table."""


def published(folder: Path, template: str = "e5_instruct") -> Path:
    """A folder as these models are published: a bare decoder whose tokenizer ends texts, for sentence-transformers."""
    family, tied = OWN[template]
    tiny_model(family, tie_word_embeddings=tied).get_decoder().save_pretrained(folder / "bare")
    tokenizer = tiny_tokenizer()
    ends = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> <s> $B </s>", special_tokens=ends
    )
    tokenizer.save_pretrained(folder / "bare")
    transformer = Transformer(str(folder / "bare"))
    pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode="lasttoken", include_prompt=True)
    SentenceTransformer(modules=[transformer, pooling, Normalize()], device="cpu").save(str(folder / "published"))
    assert json.loads((folder / "published" / "config.json").read_text())["architectures"][0].endswith("Model")
    return folder / "published"


def stock_vectors(folder: Path, prompt: str) -> np.ndarray:
    return SentenceTransformer(str(folder), device="cpu").encode(TEXTS, prompt=prompt, normalize_embeddings=True)


def keys(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return set(file.keys())


def run_of(folder: Path, template: str, name: str, *more: str) -> list[str]:
    """Arguments of a run from a published folder, as docs/data-formats.md has them."""
    kept = [a for a in embedding_run(folder, f"model.name={folder}/published") if a != "model=tiny_random"]
    own = [f"streams.embedding.template={template}", "streams.embedding.attention=causal", f"run_dir={folder}/{name}"]
    own += ["streams.embedding.sources.0.instruction='Find it.'", f"model.family={OWN[template][0]}"]
    return [*kept, "model.source=hub", "model.dtype=float32", "export.dtype=float32", *own, *more]


@pytest.mark.parametrize("template", OWN)
def test_a_published_embedder_is_used_trained_and_exported(template: str, tmp_path: Path) -> None:
    base, prompt = published(tmp_path, template), PROMPTS[template]
    options = {"template": template, "attention": "causal", "pooling": "last_token", "device": "cpu"}
    model = UnifiedLM.from_pretrained(base, **options)
    assert np.allclose(model.encode(TEXTS, instruction="Find it."), stock_vectors(base, prompt), atol=1e-5)
    run = build_run(compose_run(run_of(tmp_path, template, "untrained")))
    headless = not OWN[template][1]
    assert any("no language-model head" in notice for notice in run.loaded.provenance["notices"]) == headless
    train(run_of(tmp_path, template, "run"))
    export = tmp_path / "run" / "export"
    assert json.loads((export / "unified_lm.json").read_text())["modes"] == ["embed"]
    trained = stock_vectors(export, prompt)
    assert np.allclose(
        UnifiedLM.from_pretrained(export, device="cpu").encode(TEXTS, instruction="Find it."), trained, atol=1e-5
    )
    assert not np.allclose(trained, stock_vectors(base, prompt), atol=1e-4), "a step was taken"
    with torch.no_grad():
        ids = torch.tensor([[1, 7, 9]])
        ours, stock = (kind.from_pretrained(export) for kind in (AutoModelForCausalLM, AutoModel))
        assert torch.equal(ours.get_decoder()(ids).last_hidden_state, stock(ids).last_hidden_state)
    build_run(compose_run([*run_of(tmp_path, template, "next"), f"model.init_from={export}"]))


def test_what_a_model_without_head_cannot_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = published(tmp_path)
    train(run_of(tmp_path, "e5_instruct", "run", "checkpoint.every=1"))
    export = tmp_path / "run" / "export"
    assert not any("lm_head" in key for key in keys(export)), "zeros or noise in a file would be taken for a head"
    with pytest.raises(CheckpointError, match="exported to embed only, so it cannot generate"):
        UnifiedLM.from_pretrained(export, device="cpu").generate("Hello")
    with pytest.raises(ModelError, match="came without a language-model head: it embeds"):
        UnifiedLM.from_pretrained(base, template="grit", device="cpu").generate("Hello")
    refused = "no language-model head, which token losses and generation need"
    for more in (["export.modes=[generate]"], ["export.modes=[embed,generate]"]):
        with pytest.raises(ModelError, match=refused):
            build_run(compose_run(run_of(tmp_path, "e5_instruct", "other", *more)))
    both = [a for a in small_run(tmp_path, tmp_path / "both") if a != "model=tiny_random"]
    start = ["model.source=hub", f"model.name={base}", "model.family=mistral", "model.dtype=float32"]
    with pytest.raises(ModelError, match=refused):
        build_run(compose_run([*both, *start]))
    (tmp_path / "texts.txt").write_text("a text\nanother text\n")
    assert main(["eval", "perplexity", str(export), "--data", f"t={tmp_path}/texts.txt"]) == 2
    assert "came without a language-model head" in capsys.readouterr().err
    assert main(["upcycle", str(base), "--out", str(tmp_path / "mixture")]) == 2
    assert refused in capsys.readouterr().err
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "again")]) == 0
    assert keys(tmp_path / "again") == keys(export)


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_a_bare_decoder_of_every_family(family: str, tmp_path: Path) -> None:
    whole = tiny_model(family, tie_word_embeddings=False)
    whole.get_decoder().save_pretrained(tmp_path / "bare")
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    config = ModelConfig(name=str(tmp_path / "bare"), tokenizer=str(tmp_path / "tokenizer"), dtype="float32")
    with pytest.raises(ModelError, match="no language-model head"):
        load_model(config)
    torch.manual_seed(1)
    loaded = load_model(config, needs_head=False)
    torch.manual_seed(2)
    again = load_model(config, needs_head=False)
    assert loaded.provenance["fingerprint"] == again.provenance["fingerprint"], "nothing of it is random"
    assert is_headless(loaded.causal_lm)
    assert not any(value.any() for value in loaded.causal_lm.get_output_embeddings().parameters())
    kept = dict(loaded.causal_lm.get_decoder().named_parameters())
    assert all(torch.equal(kept[name], value) for name, value in whole.get_decoder().named_parameters())
    loaded.causal_lm.save_pretrained(tmp_path / "saved")
    assert keys(tmp_path / "saved") == {f"{loaded.causal_lm.base_model_prefix}.{key}" for key in keys(tmp_path / "bare")}


def test_more_than_the_head_missing_is_refused(tmp_path: Path) -> None:
    base = published(tmp_path)
    path = base / "config.json"
    path.write_text(path.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    with pytest.raises(ModelError, match="10 weights are missing from the checkpoint"):
        load_model(ModelConfig(name=str(base), dtype="float32"), needs_head=False)


def test_partitioned_over_two_processes(tmp_path: Path) -> None:
    published(tmp_path)
    group = Group(run_of(tmp_path, "e5_instruct", "run", "parallel=zero3"), 2, tmp_path / "log")
    assert group.wait(120) == [0, 0], group.output()
    assert not any("lm_head" in key for key in keys(tmp_path / "run" / "export"))
