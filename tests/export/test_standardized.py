"""A standardized export: stock tools, in a process without unified_lm, give our vectors; and what is refused."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

from tests.export.export_cases import make_manifest
from unified_lm.cli.main import main
from unified_lm.core.errors import CheckpointError, ConfigError, DataError
from unified_lm.data.prompts.templates import get_template
from unified_lm.export.directory import export_model
from unified_lm.export.manifest import Manifest, StandardizerRecord
from unified_lm.export.standardized import write_standardized
from unified_lm.inference import UnifiedLM
from unified_lm.inference.standardize import fit_standardizer
from unified_lm.models.pooling import Projection
from unified_lm.models.standardizer import Standardizer
from unified_lm.models.tiny import tiny_model, tiny_tokenizer
from unified_lm.models.weights_hash import hash_weights

TEXTS = ["a short text", "A rather longer text, so that a batch of stock tools has padding in it.", "Zwölf – 十二", "x"]
CORPUS = [
    f"{first} {second} number {i}" for i in range(20) for first in ("sea", "bread", "oven") for second in ("and", "waits")
]
RECORD = StandardizerRecord(corpus="c", corpus_hash="h", num_texts=120, num_floored=0, relative_eps=1e-3)
_STOCK = """
import sys, numpy as np
from sentence_transformers import SentenceTransformer
for folder in sys.argv[2:]:
    model = SentenceTransformer(folder, device="cpu", trust_remote_code=False)
    texts = open(sys.argv[1], encoding="utf-8").read().splitlines()
    np.savez(folder + ".npz", documents=model.encode(texts), queries=model.encode(texts, prompt_name="query"))
assert not any(name.partition(".")[0] == "unified_lm" for name in sys.modules), "unified_lm was imported"
"""


def _stock_vectors(folder: Path) -> dict[str, np.ndarray]:
    modules = [module["type"] for module in json.loads((folder / "modules.json").read_text())]
    assert all(module.startswith("sentence_transformers.") for module in modules)
    model = SentenceTransformer(str(folder), device="cpu", trust_remote_code=False)
    return {"documents": model.encode(TEXTS), "queries": model.encode(TEXTS, prompt_name="query")}


def _export(folder: Path, projection: Projection | None = None, **changes: object) -> Path:
    export_model(
        tiny_model("llama"),
        tiny_tokenizer(),
        folder,
        manifest=make_manifest(**changes),
        template=get_template("grit"),
        projection=projection,
        verify="off",
    )
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text("\n".join(CORPUS) + "\n")
    return path


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> dict[str, tuple[Path, Path]]:
    """Case -> (plain, standardized), the latter written by the command."""
    root = tmp_path_factory.mktemp("exports")
    torch.manual_seed(0)
    made = {
        "plain": _export(root / "plain"),
        "projection": _export(root / "projection", Projection(64, 16)),
    }
    for name, folder in made.items():
        assert main(["standardize", str(folder), "--corpus", str(corpus), "--out", str(root / f"{name}-std")]) == 0
    return {name: (folder, root / f"{name}-std") for name, folder in made.items()}


@pytest.fixture(scope="module", params=["here", pytest.param("apart", marks=pytest.mark.slow)])
def stock(
    request: pytest.FixtureRequest, exports: dict[str, tuple[Path, Path]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, np.ndarray]]:
    """What sentence-transformers says: here, or in a process that never imports unified_lm, ten seconds later."""
    if request.param == "here":
        return {name: _stock_vectors(standardized) for name, (_, standardized) in exports.items()}
    texts = tmp_path_factory.mktemp("stock") / "texts.txt"
    texts.write_text("\n".join(TEXTS), encoding="utf-8")
    folders = [str(standardized) for _, standardized in exports.values()]
    done = subprocess.run(
        [sys.executable, "-c", _STOCK, str(texts), *folders],
        capture_output=True, text=True, check=False, timeout=300, cwd=texts.parent, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: dict(np.load(f"{folder}.npz")) for name, folder in zip(exports, folders, strict=True)}


@pytest.mark.parametrize("name", ["plain", "projection"])
def test_stock_tools_give_our_vectors(
    exports: dict[str, tuple[Path, Path]], stock: dict[str, dict[str, np.ndarray]], name: str
) -> None:
    plain, standardized = exports[name]
    model = UnifiedLM.from_pretrained(standardized, device="cpu")
    np.testing.assert_allclose(model.encode(TEXTS), stock[name]["documents"], atol=1e-5)
    np.testing.assert_allclose(model.encode(TEXTS, "Find the passage."), stock[name]["queries"], atol=1e-5)
    before = UnifiedLM.from_pretrained(plain, device="cpu").encode(TEXTS)
    assert np.abs(before - stock[name]["documents"]).max() > 1e-2, "standardization must matter for this test to mean it"


@pytest.mark.parametrize("name", ["plain", "projection"])
def test_the_corpus_is_standardized(exports: dict[str, tuple[Path, Path]], name: str) -> None:
    vectors = UnifiedLM.from_pretrained(exports[name][1], device="cpu").encode(CORPUS, normalize=False)
    np.testing.assert_allclose(vectors.mean(0), 0, atol=1e-3)
    np.testing.assert_allclose(vectors.std(0), 1, atol=1e-3)


def test_the_manifest_says_where_the_statistics_come_from(exports: dict[str, tuple[Path, Path]]) -> None:
    plain, standardized = exports["plain"]
    manifest, before = Manifest.load(standardized), Manifest.load(plain)
    record = manifest.standardizer
    assert record is not None
    assert (record.corpus, record.num_texts, record.relative_eps, record.instruction) == ("corpus.txt", len(CORPUS), 1e-3, "")
    assert len(record.corpus_hash) == 32
    assert replace(manifest, standardizer=None, weights_hash=before.weights_hash) == before
    assert manifest.weights_hash == hash_weights(standardized) != before.weights_hash
    assert f"{len(CORPUS)} texts of corpus.txt" in (standardized / "README.md").read_text()
    modules = [module["path"] for module in json.loads((standardized / "modules.json").read_text())]
    assert modules == ["", "1_Pooling", "2_Standardizer", "3_Normalize"]
    modules = [module["path"] for module in json.loads((exports["projection"][1] / "modules.json").read_text())]
    assert modules == ["", "1_Pooling", "2_Dense", "3_Standardizer", "4_Normalize"]


def test_the_fit_does_not_depend_on_order_blocks_or_copies(exports: dict[str, tuple[Path, Path]]) -> None:
    model = UnifiedLM.from_pretrained(exports["plain"][0], device="cpu")
    one = fit_standardizer(model, CORPUS)
    other = fit_standardizer(model, [*reversed(CORPUS), *CORPUS[:30], " ", ""])
    assert one.corpus_hash == other.corpus_hash
    assert other.num_texts == len(CORPUS)
    torch.testing.assert_close(one.standardizer.scale, other.standardizer.scale, rtol=1e-5, atol=0)
    assert fit_standardizer(model, CORPUS[:-1]).corpus_hash != one.corpus_hash
    assert model.standardizer is None


def test_standardizing_again_replaces_the_statistics(
    exports: dict[str, tuple[Path, Path]], corpus: Path, tmp_path: Path
) -> None:
    """Fitted on the vectors as the model gives them, not on standardized ones."""
    _, standardized = exports["plain"]
    assert main(["standardize", str(standardized), "--corpus", str(corpus), "--out", str(tmp_path / "again")]) == 0
    first, again = (UnifiedLM.from_pretrained(f, device="cpu").encode(TEXTS) for f in (standardized, tmp_path / "again"))
    np.testing.assert_allclose(again, first, atol=1e-6)


def test_refusals(exports: dict[str, tuple[Path, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain, _ = exports["plain"]
    few = tmp_path / "few.txt"
    few.write_text("\n".join(CORPUS[:20]))
    assert main(["standardize", str(plain), "--corpus", str(few), "--out", str(tmp_path / "x")]) == 2
    assert "has 20 texts; statistics need at least 100" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
    model = UnifiedLM.from_pretrained(plain, device="cpu")
    with pytest.raises(DataError, match="1 texts"):
        fit_standardizer(model, ["the same"] * 200)
    standardizer = Standardizer(torch.ones(64), torch.zeros(64))
    with pytest.raises(CheckpointError, match="lies in the export itself"):
        write_standardized(plain, plain / "inside", standardizer, RECORD)
    with pytest.raises(CheckpointError, match="3 dimensions, the export has 64"):
        write_standardized(plain, tmp_path / "y", Standardizer(torch.ones(3), torch.zeros(3)), RECORD)
    with pytest.raises(ConfigError, match="3 dimensions, the embeddings have 64"):
        model.standardizer = Standardizer(torch.ones(3), torch.zeros(3))
    writer = _export(tmp_path / "writer", modes=("generate",))
    with pytest.raises(CheckpointError, match="generate only"):
        write_standardized(writer, tmp_path / "z", standardizer, RECORD)
    with pytest.raises(CheckpointError, match="belongs to finished weights"):
        _export(tmp_path / "no", standardizer=RECORD)


@pytest.mark.parametrize("damage", ["missing", "not diagonal"])
def test_a_damaged_standardizer_is_refused(exports: dict[str, tuple[Path, Path]], tmp_path: Path, damage: str) -> None:
    write_standardized(
        exports["plain"][0], tmp_path / "std", Standardizer(torch.ones(64), torch.zeros(64)), RECORD, verify=False
    )
    path = tmp_path / "std" / "2_Standardizer" / "model.safetensors"
    tensors = load_file(path)
    path.unlink()
    if damage == "not diagonal":
        tensors["linear.weight"][3, 4] = 1
        save_file(tensors, path)
    with pytest.raises(
        CheckpointError, match="not a diagonal matrix" if damage == "not diagonal" else "cannot read the export's standardizer"
    ):
        UnifiedLM.from_pretrained(tmp_path / "std", device="cpu", check_weights=False)


def test_a_copy_that_stock_tools_read_otherwise_never_appears(
    exports: dict[str, tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check sees a module that is missing from modules.json."""
    import unified_lm.export.standardized as module

    modules = module.sentence_transformers_modules
    monkeypatch.setattr(module, "sentence_transformers_modules", lambda manifest: modules(replace(manifest, standardizer=None)))
    with pytest.raises(CheckpointError, match="sentence-transformers computes other vectors"):
        write_standardized(exports["plain"][0], tmp_path / "std", Standardizer(torch.ones(64), torch.ones(64)), RECORD)
    assert not (tmp_path / "std").exists()
