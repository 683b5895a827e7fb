"""`unified-lm encode | search | generate` on a tiny export."""

from pathlib import Path

import numpy as np
import pytest

from tests.full_disk import full_disk
from tests.inference.conftest import make_export
from unified_lm.cli import use
from unified_lm.cli.main import main
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
    with pytest.raises(DataError, match="cannot be read"):
        use.search([str(folder), "a", str(tmp_path / "missing.txt")])
    with pytest.raises(CheckpointError, match="there is no folder"):
        use.generate([str(tmp_path / "missing"), "hello"])


@pytest.mark.parametrize(
    ("out", "told"),
    [
        ("texts.txt/v.npy", "is a file, not a folder"),
        ("/proc/v.npy", "/proc takes no files"),
        ("new/" + "x" * 300 + ".npy", "a name of more than 255 bytes"),
        ("x" * 300 + ".npy", "File name too long"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_before_the_model_is_looked_for(
    out: str, told: str, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["encode", "no_such_model", str(texts), "--out", out]) == 2
    assert told in capsys.readouterr().err


def test_an_output_at_home(
    folder: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home").mkdir()
    assert main(["encode", str(folder), str(texts), "--out=~/v.npy", "--device", "cpu"]) == 0
    assert np.load(tmp_path / "home" / "v.npy").shape == (3, 64)
    assert not (tmp_path / "~").exists()
    assert main(["encode", str(folder), str(texts), "--out=~nobody_of_that_name/v.npy", "--device", "cpu"]) == 2
    assert "argument --out: ~nobody_of_that_name/v.npy: there is no user of that name." in capsys.readouterr().err
    assert main(["encode", str(folder), str(texts), "--out=./~v.npy", "--device", "cpu"]) == 0
    assert (tmp_path / "~v.npy").is_file()


def test_a_disk_that_is_full_at_the_end_is_one_message(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts, out = tmp_path / "texts.txt", tmp_path / "v.npy"
    texts.write_text("".join(f"text {number}\n" for number in range(100)))
    with full_disk(10_000):
        assert main(["encode", str(folder), str(texts), "--out", str(out), "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert f"{out}: not everything could be written: 6400 requested" in said
    assert "Look whether the disk is full" in said
    assert [path.name for path in tmp_path.iterdir()] == ["texts.txt"]


def test_a_device_is_tried_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["encode", "no_such_model", "no.txt", "--out", str(tmp_path / "v.npy"), "--device", "banana"]) == 2
    assert "device 'banana' cannot be used here" in capsys.readouterr().err


def test_the_traceback_behind_a_message_can_be_seen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", "no_such_run"]) == 2
    assert "Traceback" not in capsys.readouterr().err
    monkeypatch.setenv("UNIFIED_LM_TRACEBACK", "1")
    assert main(["report", "no_such_run"]) == 2
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert "error: no such run: no_such_run" in shown
