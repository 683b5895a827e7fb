"""Copies for engines: what reads the root config.json alone, as engines do, gives the vectors of sentence-transformers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from tests.export.export_cases import make_manifest
from unified_lm.cli.main import main
from unified_lm.core.errors import CheckpointError
from unified_lm.data.prompts.templates import get_template
from unified_lm.export.directory import export_model
from unified_lm.export.manifest import Manifest
from unified_lm.export.serving import ENGINES, write_serving
from unified_lm.models.pooling import Projection
from unified_lm.models.tiny import tiny_model, tiny_tokenizer
from unified_lm.models.weights_hash import hash_weights

TEXTS = ["a short text", "A rather longer text, of more tokens than a sliding window of eight has.", "Zwölf – 十二"]


def export(folder: Path, family: str = "llama", projection: Projection | None = None, **changes: object) -> Path:
    tokenizer, model = tiny_tokenizer(add_bos=family != "qwen3"), tiny_model(family)
    manifest, template = make_manifest(family=family, max_tokens=256, **changes), get_template("grit")
    export_model(model, tokenizer, folder, manifest=manifest, template=template, projection=projection, verify="off")
    return folder


@torch.no_grad()
def as_an_engine(folder: Path, prompt: str) -> np.ndarray:
    """Vectors from the root config.json and the mean over all tokens: what vLLM and TEI compute."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    states = [model(**tokenizer(prompt + text, return_tensors="pt")).last_hidden_state[0].mean(0) for text in TEXTS]
    return torch.nn.functional.normalize(torch.stack(states), dim=-1).numpy()


@pytest.mark.parametrize(
    ("engine", "family"),
    [*(("vllm-embed", family) for family in ("llama", "mistral", "phi3", "qwen3", "gemma3_text")), ("tei", "llama")],
)
def test_an_engine_gives_the_vectors_of_its_copy(tmp_path: Path, engine: str, family: str) -> None:
    source = export(tmp_path / "export", family)
    prompt = json.loads((source / "config_sentence_transformers.json").read_text())["prompts"]["query"]
    launch = write_serving(source, tmp_path / "served", engine, pool_prompt=True)
    assert str(tmp_path / "served") in launch
    assert launch in (tmp_path / "served" / "README.md").read_text()
    engines = as_an_engine(tmp_path / "served", prompt)
    ours = SentenceTransformer(str(tmp_path / "served"), device="cpu").encode(TEXTS, prompt_name="query")
    np.testing.assert_allclose(engines, ours, atol=2e-6)
    assert np.abs(as_an_engine(source, prompt) - ours).max() > 1e-2, "the export itself would embed causally there"
    whole = SentenceTransformer(str(source), device="cpu")
    whole[1].include_prompt = True
    np.testing.assert_allclose(ours, whole.encode(TEXTS, prompt_name="query"), atol=2e-6)


def test_a_copy_to_generate(tmp_path: Path) -> None:
    source = export(tmp_path / "export")
    assert write_serving(source, tmp_path / "served", "vllm-generate") == f"vllm serve {tmp_path / 'served'} --runner generate"
    names = {path.name for path in (tmp_path / "served").iterdir()}
    assert not names & {"modules.json", "1_Pooling", "sentence_bert_config.json"}
    tokens = torch.arange(3, 20)[None]
    models = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (source, tmp_path / "served")]
    assert torch.equal(*(model(tokens).logits for model in models))


def test_weights_are_links_and_the_export_is_left_alone(tmp_path: Path) -> None:
    source = export(tmp_path / "export")
    before = {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    write_serving(source, tmp_path / "served", "vllm-embed", pool_prompt=True)
    assert {path: path.read_bytes() for path in source.rglob("*") if path.is_file()} == before
    assert (tmp_path / "served" / "model.safetensors").samefile(source / "model.safetensors")
    manifest = Manifest.load(tmp_path / "served")
    assert manifest.modes == ("embed",)
    assert manifest.weights_hash == hash_weights(tmp_path / "served")


@pytest.mark.parametrize(
    ("engine", "family", "changes", "message"),
    [
        ("vllm-embed", "mixtral", {}, "runs family 'mixtral' causally whatever"),
        ("vllm-embed", "gemma2", {}, "runs family 'gemma2' causally whatever"),
        ("tei", "phi3", {}, "family 'phi3' is not one of its: llama, mistral, qwen2, qwen3"),
        ("vllm-embed", "llama", {"modes": ("generate",)}, "exported to generate only"),
        ("vllm-generate", "llama", {"modes": ("embed",)}, "exported to embed only"),
        ("vllm-embed", "llama", {}, "pools the prompt too"),
        ("vllm-embedd", "llama", {}, "Did you mean 'vllm-embed'"),
    ],
)
def test_what_an_engine_cannot_serve_is_refused(
    tmp_path: Path, engine: str, family: str, changes: dict[str, object], message: str
) -> None:
    source = export(tmp_path / "export", family, **changes)
    with pytest.raises(CheckpointError, match=message):
        write_serving(source, tmp_path / "served", engine, pool_prompt="prompt" not in message)
    assert not (tmp_path / "served").exists()


def test_layers_behind_the_pooling_are_refused(tmp_path: Path) -> None:
    source = export(tmp_path / "export", projection=Projection(64, 8))
    with pytest.raises(CheckpointError, match="layers behind the pooling"):
        write_serving(source, tmp_path / "served", "vllm-embed", pool_prompt=True)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export(tmp_path / "run" / "export")
    assert main(["export", str(tmp_path / "run"), "--for", "tei", "--pool-prompt"]) == 0
    written = capsys.readouterr()
    assert written.out.strip() == str(tmp_path / "run" / "export-tei")
    assert "text-embeddings-router --model-id" in written.err
    assert "--pooling mean" in written.err
    assert main(["export", str(tmp_path / "run"), "--step", "3", "--for", "tei"]) == 2
    assert "unified-lm export" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "run"), "--pool-prompt"]) == 2
    assert "no engine is named" in capsys.readouterr().err


def test_the_help_names_every_engine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(engine in text for engine in ENGINES)
