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
from unified_lm.config.objectives import EMBEDDING_METHODS
from unified_lm.core.errors import CheckpointError
from unified_lm.data.prompts.templates import get_template
from unified_lm.export.directory import export_model
from unified_lm.export.manifest import Manifest
from unified_lm.export.sentence_transformers_files import POOLING_MODES
from unified_lm.export.serving import ENGINES, write_serving
from unified_lm.models.families import OWN_FAMILIES
from unified_lm.models.pooling import Projection
from unified_lm.models.tiny import tiny_model, tiny_tokenizer
from unified_lm.models.weights_hash import hash_weights

OLDER = {
    "mean": "pooling_mode_mean_tokens",
    "weighted_mean": "pooling_mode_weightedmean_tokens",
    "last_token": "pooling_mode_lasttoken",
    "cls": "pooling_mode_cls_token",
}
"""Our name of a pooling -> the key that sentence-transformers had for it before version 6, and TEI still reads."""
TEXTS = ["a short text", "A rather longer text, of more tokens than a sliding window of eight has.", "Zwölf – 十二"]


def export(folder: Path, family: str = "llama", projection: Projection | None = None, **changes: object) -> Path:
    tokenizer, model = tiny_tokenizer(add_bos=family != "qwen3"), tiny_model(family)
    manifest = make_manifest(**{"family": family, "max_tokens": 256, **changes})
    template = get_template(manifest.template)
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
    [
        *(("vllm-embed", family) for family in ("llama", "mistral", "phi3", "qwen3", "gemma3_text")),
        *(("tei", family) for family in sorted(ENGINES["tei"].bidirectional)),
    ],
)
def test_an_engine_gives_the_vectors_of_its_copy(tmp_path: Path, engine: str, family: str) -> None:
    source = export(tmp_path / "export", family)
    prompt = json.loads((source / "config_sentence_transformers.json").read_text())["prompts"]["query"]
    launch = write_serving(source, tmp_path / "served", engine, pool_prompt=True)
    assert str(tmp_path / "served") in launch
    assert launch in (tmp_path / "served" / "README.md").read_text()
    config = json.loads((tmp_path / "served" / "config.json").read_text())
    assert (config["is_causal"], config["use_bidirectional_attention"]) == (False, True)
    engines = as_an_engine(tmp_path / "served", prompt)
    ours = SentenceTransformer(str(tmp_path / "served"), device="cpu").encode(TEXTS, prompt_name="query")
    np.testing.assert_allclose(engines, ours, atol=2e-6)
    assert np.abs(as_an_engine(source, prompt) - ours).max() > 1e-2, "the export itself would embed causally there"
    whole = SentenceTransformer(str(source), device="cpu")
    whole[1].include_prompt = True
    np.testing.assert_allclose(ours, whole.encode(TEXTS, prompt_name="query"), atol=2e-6)


@pytest.mark.parametrize("engine", ["vllm-embed", "tei"])
@pytest.mark.parametrize("family", sorted(ENGINES["tei"].bidirectional))
def test_an_export_that_embeds_causally_stays_causal(tmp_path: Path, engine: str, family: str) -> None:
    source = export(tmp_path / "export", family, attention="causal")
    write_serving(source, tmp_path / "served", engine, pool_prompt=True)
    config = json.loads((tmp_path / "served" / "config.json").read_text())
    assert config["is_causal"] is True
    assert "use_bidirectional_attention" not in config
    prompt = json.loads((source / "config_sentence_transformers.json").read_text())["prompts"]["query"]
    ours = SentenceTransformer(str(tmp_path / "served"), device="cpu").encode(TEXTS, prompt_name="query")
    np.testing.assert_allclose(as_an_engine(tmp_path / "served", prompt), ours, atol=2e-6)


def test_a_family_that_tei_runs_causally_alone(tmp_path: Path) -> None:
    source = export(tmp_path / "export")  # of another family: transformers reads no tiny tokenizer as Qwen2's
    (family,) = set(ENGINES["tei"].families or ()) - ENGINES["tei"].bidirectional
    change(source / "unified_lm.json", family=family)
    with pytest.raises(CheckpointError, match=f"runs family '{family}' causally whatever"):
        write_serving(source, tmp_path / "served", "tei", pool_prompt=True)
    change(source / "unified_lm.json", attention="causal")
    write_serving(source, tmp_path / "served", "tei", pool_prompt=True)
    assert "use_bidirectional_attention" not in json.loads((tmp_path / "served" / "config.json").read_text())


@pytest.mark.parametrize("engine", [name for name, engine in ENGINES.items() if engine.mode == "embed"])
@pytest.mark.parametrize("pooling", POOLING_MODES)
def test_every_pooling_is_served_or_refused(tmp_path: Path, engine: str, pooling: str) -> None:
    template = {"template": "plain", "instructions": {}} if pooling == "weighted_mean" else {}
    source = export(tmp_path / "export", pooling=pooling, **template)
    called = dict(ENGINES[engine].poolings).get(pooling)
    if called is None:
        with pytest.raises(CheckpointError, match=f"it has no pooling '{pooling}'"):
            write_serving(source, tmp_path / "served", engine, pool_prompt=True)
        return
    launch = write_serving(source, tmp_path / "served", engine, pool_prompt=True)
    assert launch.endswith({"vllm-embed": "--runner pooling", "tei": f"--pooling {called}"}[engine])
    written = json.loads((tmp_path / "served" / "1_Pooling" / "config.json").read_text())
    assert written["pooling_mode"] == POOLING_MODES[pooling]
    assert [key for key, value in written.items() if key.startswith("pooling_mode_") and value] == [OLDER[pooling]]


def test_tei_calls_the_last_token_so(tmp_path: Path) -> None:
    source = export(tmp_path / "export", pooling="last_token")
    assert write_serving(source, tmp_path / "served", "tei").endswith("--pooling last-token")


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


def change(path: Path, **values: object) -> None:
    """Other values in a file of JSON."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


ROPES: dict[str, dict[str, object]] = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 2.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


@pytest.mark.parametrize("rope", ROPES)
def test_scaled_rotary_frequencies_are_refused_for_tei_alone(tmp_path: Path, rope: str) -> None:
    model = tiny_model("llama", rope_parameters={"rope_type": rope, "rope_theta": 10000.0, **ROPES[rope]})
    manifest = make_manifest(family="llama", max_tokens=64)
    export_model(model, tiny_tokenizer(), tmp_path / "export", manifest=manifest, template=get_template("grit"), verify="off")
    write_serving(tmp_path / "export", tmp_path / "vllm", "vllm-embed", pool_prompt=True)
    with pytest.raises(CheckpointError, match=f"does not read rotary frequencies of type '{rope}'"):
        write_serving(tmp_path / "export", tmp_path / "served", "tei", pool_prompt=True)
    assert not (tmp_path / "served").exists()


@pytest.mark.parametrize("engine", ["vllm-embed", "tei"])
def test_vectors_that_no_engine_computes_are_refused(tmp_path: Path, engine: str) -> None:
    source = export(tmp_path / "export")
    for method in sorted(set(EMBEDDING_METHODS) - {"hs"}):
        change(source / "unified_lm.json", method=method)
        with pytest.raises(CheckpointError, match=rf"embeds with routing \(method {method}\)"):
            write_serving(source, tmp_path / "served", engine, pool_prompt=True)
    change(source / "unified_lm.json", method="hs")
    (source / "config_sentence_transformers.json").unlink()
    with pytest.raises(CheckpointError, match="has no files of sentence-transformers"):
        write_serving(source, tmp_path / "served", engine, pool_prompt=True)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("family", sorted(OWN_FAMILIES))
def test_families_of_our_own_are_refused(tmp_path: Path, engine: str, family: str) -> None:
    source = export(tmp_path / "export")
    change(source / "unified_lm.json", family=family)
    with pytest.raises(CheckpointError, match=f"family '{family}' is this project's own"):
        write_serving(source, tmp_path / "served", engine, pool_prompt=True)


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
