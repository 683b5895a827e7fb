"""`unified-lm index | ask | chat` on a tiny export."""

import io
import json
from pathlib import Path

import pytest

from tests.inference.conftest import make_export
from unified_lm.cli import retrieve
from unified_lm.cli.main import main
from unified_lm.core.errors import CheckpointError, ConfigError, DataError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_export(tmp_path_factory.mktemp("retrieve") / "export")


@pytest.fixture
def index(folder: Path, tmp_path: Path) -> Path:
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages" / "a.md").write_text("# Apples\nApples are red.")
    rows = [{"id": "b", "title": "Bears", "text": "Bears are brown."}, {"text": "Clouds are white."}]
    (tmp_path / "pages" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = tmp_path / "index"
    retrieve.index([str(tmp_path / "pages"), "--model", str(folder), "--out", str(made), "--device", "cpu"])
    return made


def test_files_are_indexed_once(index: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    retrieve.index([str(tmp_path / "pages"), "--model", str(folder), "--out", str(index), "--device", "cpu"])
    told = capsys.readouterr().out
    assert ": 3 documents" in told
    assert "0 added, 3 unchanged" in told


def test_ask_shows_passages_mode_and_times(index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    retrieve.ask([str(index), "Which are brown?", "-k", "2", "--max-new-tokens", "4", "--compare", "--device", "cpu"])
    said = " ".join(capsys.readouterr().err.split())
    assert "[1] " in said
    assert "[2] " in said
    assert "document_cache (bidirectional)" in said
    assert "prompt tokens from the cache" in said
    assert "without caches (document_then_query)" in said
    assert "rows.jsonl, line" in said or "a.md" in said
    retrieve.ask([str(index), "Which?", "--mode", "no_retrieval", "--max-new-tokens", "2", "--device", "cpu"])
    assert "0 of" in capsys.readouterr().err
    retrieve.ask([str(index), "Which?", "--rerank", "pointwise", "--max-new-tokens", "2", "--device", "cpu"])


def test_chat_ends_with_an_empty_line(index: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Which are red?\r\nAnd white?\n\nnot read\n")))
    retrieve.chat([str(index), "--max-new-tokens", "2", "--device", "cpu"])
    said = capsys.readouterr().err
    assert said.count("first token after") == 2


def test_input_that_is_no_utf8_is_one_message(
    index: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (["ask", str(index), "-"], ["chat", str(index)], ["generate", str(folder), "-"]):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n")))
        assert main([*command, "--device", "cpu"]) == 2
        assert "error: standard input is not UTF-8 (invalid continuation byte at byte 3)" in capsys.readouterr().err


def test_mistakes(index: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CheckpointError, match="is no index"):
        retrieve.ask([str(tmp_path / "pages"), "x"])
    with pytest.raises(ConfigError, match="unknown mode 'cache'"):
        retrieve.ask([str(index), "x", "--mode", "cache", "--device", "cpu"])
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"body": "x"}\n')
    common = ["--model", str(folder), "--device", "cpu", "--out"]
    with pytest.raises(DataError, match=r"line 1: no text under 'text' among \[body\]"):
        retrieve.index([str(rows), *common, str(tmp_path / "new")])
    with pytest.raises(DataError, match="no such file"):
        retrieve.index([str(tmp_path / "missing.txt"), *common, str(tmp_path / "new"), "--states", "none"])
    assert not (tmp_path / "new").exists(), "what cannot be read makes no index, whose settings would be in the way"
    retrieve.index([str(rows), "--column", "body", *common, str(tmp_path / "new")])
    with pytest.raises(DataError, match="the question is empty"):
        retrieve.ask([str(index), " ", "--device", "cpu"])
    with pytest.raises(ConfigError, match="--budget-gb: 0 stores nothing"):
        retrieve.index([str(rows), "--budget-gb", "0", *common, str(tmp_path / "new")])
    assert main(["ask", str(index), "x", "--rerank", "pairwise", "--device", "cpu"]) == 2
    assert "unknown way to rerank" in capsys.readouterr().err
