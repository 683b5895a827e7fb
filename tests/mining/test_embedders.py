"""Our exports and sentence-transformers folders behind one face."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.inference.conftest import (
    exported,  # noqa: F401 - the fixture
    make_export,
)
from unified_lm.core.errors import CheckpointError, ConfigError, ModelError
from unified_lm.data.rows.records import Text
from unified_lm.inference import UnifiedLM
from unified_lm.mining.embedders import folder_hash, load_embedder
from unified_lm.models import precision

TEXTS = [Text("what is a fugue"), Text("a lawn mower", "Find the tool."), Text("an organ", "Find the tool."), Text("tea")]


@pytest.fixture(scope="module")
def folder(exported: Callable[..., Path]) -> Path:  # noqa: F811
    return exported()


def test_our_export_reads_instructions(folder: Path) -> None:
    embedder, model = load_embedder(str(folder), device="cpu"), UnifiedLM.from_pretrained(folder, device="cpu")
    for vectors, default in ((embedder.queries(TEXTS), "Find the passage."), (embedder.documents(TEXTS), "")):
        expected = np.stack([model.encode(text.text, text.instruction or default) for text in TEXTS])
        np.testing.assert_allclose(vectors, expected, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(embedder.queries(TEXTS), axis=1), 1, atol=1e-5)


def test_the_same_folder_through_sentence_transformers(folder: Path, tmp_path: Path) -> None:
    """Without our manifest the folder is a sentence-transformers model: equal vectors, and prompts as told."""
    pytest.importorskip("sentence_transformers")
    plain = tmp_path / "plain"
    plain.mkdir()
    for path in folder.rglob("*"):
        if path.is_file() and path.name != "unified_lm.json":
            (plain / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            (plain / path.relative_to(folder)).write_bytes(path.read_bytes())
    ours, teacher = load_embedder(str(folder), device="cpu"), load_embedder(str(plain), device="cpu")
    bare = [Text(text.text) for text in TEXTS]
    np.testing.assert_allclose(teacher.queries(TEXTS), ours.queries(bare), atol=1e-5)
    np.testing.assert_allclose(teacher.documents(TEXTS), ours.documents(bare), atol=1e-5)
    template = "<s><|user|>\n{instruction}\n<|embed|>\n"
    prompted = load_embedder(str(plain), device="cpu", query_prompt=template.removeprefix("<s>"))
    assert prompted.key != teacher.key
    again = load_embedder(str(plain), device="cpu", query_prompt="about {instruction}: ")
    assert not np.allclose(again.queries(TEXTS)[1], teacher.queries(TEXTS)[1], atol=1e-3)
    with pytest.raises(ConfigError, match=r"the document prompt '\{task\}' has a field that is not \{instruction\}"):
        load_embedder(str(plain), document_prompt="{task}")


@pytest.mark.parametrize("has_unit", [True, False])
@pytest.mark.parametrize("kind", ["export", "sentence-transformers"])
def test_auto_is_float32_where_the_stored_type_is_emulated(
    kind: str, has_unit: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "bfloat16_unit", lambda device: "unit" if has_unit else None)
    folder = make_export(tmp_path / "export", changes={"dtype": "bfloat16"})
    if kind != "export":
        (folder / "unified_lm.json").unlink()
    auto = load_embedder(str(folder), device="cpu", dtype="auto")
    same = load_embedder(str(folder), device="cpu", dtype="bfloat16" if has_unit else "float32")
    assert np.array_equal(auto.documents(TEXTS), same.documents(TEXTS))
    other = load_embedder(str(folder), device="cpu", dtype="float32" if has_unit else "bfloat16")
    assert not np.array_equal(auto.documents(TEXTS), other.documents(TEXTS))
    assert auto.key != other.key
    with pytest.raises(ConfigError, match="unknown dtype 'int8'"):
        load_embedder(str(folder), device="cpu", dtype="int8")


def test_the_key_follows_content_and_settings(folder: Path, tmp_path: Path) -> None:
    assert load_embedder(str(folder), device="cpu").key != load_embedder(str(folder), device="cpu", max_tokens=64).key
    (tmp_path / "a").write_text("x")
    before = folder_hash(tmp_path)
    (tmp_path / ".hidden").write_text("y")
    assert folder_hash(tmp_path) == before
    (tmp_path / "b").write_text("y")
    assert folder_hash(tmp_path) != before


@pytest.mark.parametrize("damaged", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_teacher_with_damaged_files_is_one_message(damaged: str, tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    teacher = make_export(tmp_path / "teacher")
    (teacher / "unified_lm.json").unlink()
    content = (teacher / damaged).read_bytes()
    (teacher / damaged).write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelError, match=r"'.*teacher'"):
        load_embedder(str(teacher), device="cpu")


def test_mistakes(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither unified_lm\.json .* nor modules\.json"):
        load_embedder(str(tmp_path))
    with pytest.raises(CheckpointError, match="no folder"):
        load_embedder(str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match="leave out the prompts"):
        load_embedder(str(folder), query_prompt="q: ")
