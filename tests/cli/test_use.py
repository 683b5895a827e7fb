"""`unified-lm encode | search | generate` on a tiny export."""

from pathlib import Path

import numpy as np
import pytest

from tests.inference.conftest import make_export
from unified_lm.cli import use
from unified_lm.core.errors import CheckpointError, DataError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_export(tmp_path_factory.mktemp("use") / "export")


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text("open a file\nparse a string\nsort a list\n")
    return path


def test_encode_writes_one_vector_a_line(folder: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    use.encode([str(folder), str(texts), "--out", str(tmp_path / "vectors.bin"), "--device", "cpu"])
    vectors = np.load(tmp_path / "vectors.bin")
    assert (vectors.shape, vectors.dtype) == ((3, 64), np.float32)
    assert "3 vectors of 64 dimensions" in capsys.readouterr().out


def test_search_finds_the_same_text(folder: Path, texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    use.search([str(folder), "parse a string", str(texts), "-k", "2", "--instruction", "", "--device", "cpu"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "1.000  parse a string"
    assert len(lines) == 2


def test_generate_answers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    use.generate([str(folder), "hello", "--max-new-tokens", "4", "--device", "cpu"])
    assert capsys.readouterr().out.endswith("\n")


def test_mistakes(folder: Path, texts: Path, tmp_path: Path) -> None:
    texts.write_text("a\n\nb\n")
    with pytest.raises(DataError, match="line 2 is empty"):
        use.search([str(folder), "a", str(texts)])
    with pytest.raises(DataError, match="cannot read"):
        use.search([str(folder), "a", str(tmp_path / "missing.txt")])
    with pytest.raises(CheckpointError, match="there is no folder"):
        use.generate([str(tmp_path / "missing"), "hello"])
