"""`encode(method=...)`: hidden states and routing of one forward, from the outside."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from unified_lm.cli.main import main
from unified_lm.core.errors import ConfigError, ModelError
from unified_lm.export.manifest import Manifest
from unified_lm.inference import UnifiedLM
from unified_lm.inference.standardize import fit_standardizer
from unified_lm.models.moee import METHODS
from unified_lm.retrieval.index import Index

TEXTS = ["one text", "Another, much longer text about something else.", "zwölf", "the last one"]
D, F = 64, 8  # two layers of four experts


@pytest.fixture(scope="module")
def folder(exported: Callable[..., Path]) -> Path:
    return exported("mixtral")


@pytest.fixture
def model(folder: Path) -> UnifiedLM:
    return UnifiedLM.from_pretrained(folder, device="cpu")


def test_the_parts_and_what_is_made_of_them(model: UnifiedLM) -> None:
    vectors = {method: model.encode(TEXTS, method=method, normalize=False) for method in METHODS}
    assert {method: value.shape[1] for method, value in vectors.items()} == {
        "hs": D,
        "rw": F,
        "moee_concat": D + F,
        "moee_sum": D + F,
    }
    assert np.array_equal(vectors["hs"], model.encode(TEXTS, normalize=False))
    np.testing.assert_allclose(vectors["rw"].reshape(4, 2, 4).sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(vectors["moee_concat"], np.hstack([vectors["hs"], vectors["rw"]]), rtol=1e-6)
    cosines = model.similarity(vectors["hs"], vectors["hs"]) + model.similarity(vectors["rw"], vectors["rw"])
    np.testing.assert_allclose(vectors["moee_sum"] @ vectors["moee_sum"].T, cosines, atol=1e-5)
    for method in METHODS:
        alone = np.stack([model.encode(text, method=method) for text in TEXTS])
        np.testing.assert_allclose(alone, model.encode(TEXTS, method=method, token_budget=20), atol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(alone, axis=1), 1, rtol=1e-5)


def test_a_model_that_embeds_so(folder: Path, tmp_path: Path) -> None:
    model = UnifiedLM.from_pretrained(folder, method="moee_sum", alpha=0.3, device="cpu")
    assert model.embedding_dim == D + F
    assert model.embedding_key != UnifiedLM.from_pretrained(folder, device="cpu").embedding_key
    np.testing.assert_allclose(model.encode(TEXTS), model.encode(TEXTS, method="moee_sum"))
    parts = {method: model.encode(TEXTS, method=method) for method in ("hs", "rw")}
    expected = (parts["hs"] @ parts["hs"].T + 0.3 * parts["rw"] @ parts["rw"].T) / 1.3
    np.testing.assert_allclose(model.encode(TEXTS) @ model.encode(TEXTS).T, expected, atol=1e-5)
    with Index.create(tmp_path / "index", model) as index:
        index.add(TEXTS)
        (found,) = index.search(TEXTS[1], k=1, instruction="")
        assert (found.document.text, round(found.score, 4)) == (TEXTS[1], 1.0)


def test_one_standardizer_serves_every_method(model: UnifiedLM) -> None:
    corpus = [f"{word} {number}" for number in range(60) for word in ("apples are", "nobody saw")]
    fitted = fit_standardizer(model, corpus, routing=True).standardizer
    assert fitted.dim == D + F
    states = fit_standardizer(model, corpus).standardizer
    with pytest.raises(ConfigError, match=rf"has {D + F} dimensions, the embeddings have {D}\."):
        model.standardizer = fitted
    routed = UnifiedLM(
        model._backbone.causal_lm, model.prompt_encoder.tokenizer, template="grit", method="moee_concat", standardizer=fitted
    )
    model.standardizer = states
    both = routed.encode(corpus, normalize=False)
    np.testing.assert_allclose(both.mean(0), 0, atol=1e-3)
    np.testing.assert_allclose(routed.encode(corpus, method="hs", normalize=False), both[:, :D], atol=1e-5)
    np.testing.assert_allclose(routed.encode(corpus, method="rw", normalize=False), both[:, D:], atol=1e-5)
    np.testing.assert_allclose(model.encode(corpus, normalize=False), both[:, :D], atol=2e-3)
    with pytest.raises(ConfigError, match=rf"has {D} dimensions; method rw needs one of {D} \+ {F}"):
        model.encode(TEXTS, method="rw")


def test_an_export_that_embeds_with_routing(folder: Path, model: UnifiedLM, tmp_path: Path, capsys) -> None:
    corpus, out = tmp_path / "texts.txt", tmp_path / "routed"
    corpus.write_text("".join(f"{word} {number}\n" for number in range(60) for word in ("apples are", "nobody saw")))
    arguments = [str(folder), "--corpus", str(corpus), "--device", "cpu"]
    assert main(["standardize", *arguments, "--out", str(out), "--method", "moee_sum", "--alpha", "0.3"]) == 0
    routed = UnifiedLM.from_pretrained(out, device="cpu")
    fitted = fit_standardizer(model, corpus.read_text().splitlines(), routing=True).standardizer
    parts = fitted(model.encode(TEXTS, method="moee_concat", normalize=False, output="torch")).numpy()
    states, routing = (part / np.linalg.norm(part, axis=1, keepdims=True) for part in (parts[:, :D], parts[:, D:]))
    np.testing.assert_allclose(routed.encode(TEXTS), np.hstack([states, 0.3**0.5 * routing]) / 1.3**0.5, atol=1e-4)
    manifest = Manifest.load(out)
    assert (manifest.method, manifest.alpha, manifest.embedding_dim) == ("moee_sum", 0.3, D + F)
    assert not (out / "modules.json").exists(), "sentence-transformers would pool states and leave routing out"
    assert "must not be used for it" in (out / "README.md").read_text()
    assert "method" not in json.loads((folder / "unified_lm.json").read_text()), "earlier versions read other exports"
    capsys.readouterr()
    for wrong, said in [
        (["export", str(out), "--for", "vllm-embed", "--out", str(tmp_path / "v")], "vllm-embed"),
        (["standardize", str(out), *arguments[1:], "--out", str(tmp_path / "again")], "embeds with method moee_sum already"),
    ]:
        assert main(wrong) == 2
        assert said in capsys.readouterr().err


def test_mistakes(model: UnifiedLM, folder: Path, exported: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match="unknown embedding method 'moe_sum'"):
        model.encode(TEXTS, method="moe_sum")
    with pytest.raises(ConfigError, match="alpha: got -1"):
        UnifiedLM.from_pretrained(folder, method="moee_sum", alpha=-1.0, device="cpu")
    dense = UnifiedLM.from_pretrained(exported("llama"), device="cpu")
    with pytest.raises(ModelError, match="'llama' has no router"):
        dense.encode(TEXTS, method="rw")
