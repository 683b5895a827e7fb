"""`unified-lm data ...` from argument list to files and messages."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.inference.conftest import exported  # noqa: F401 - the fixture
from unified_lm.cli.data_mine import source_config
from unified_lm.cli.main import main
from unified_lm.config.schema import SourceConfig
from unified_lm.core.errors import UserError
from unified_lm.data.rows.published import PUBLISHED


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNIFIED_LM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")


def pairs(path: Path, count: int = 12) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"query": f"question {i} about tea", "pos": [f"answer {i} on {'tea' * i}"]} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_mine(exported: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    rows, model = pairs(tmp_path / "rows.jsonl"), str(exported())
    arguments = ["--model", model, "--negatives", "2", "--depth", "5", "--max-fraction", "0", "--instruction", "Find it"]
    assert main(["data", "mine", str(rows), *arguments, "--out", str(tmp_path / "mined.jsonl"), "--shard", "1/1"]) == 0
    assert "mean similarity to the query: mined" in capsys.readouterr().out
    mined = [json.loads(line) for line in (tmp_path / "mined.jsonl").read_text().splitlines()]
    assert [row["query"] for row in mined] == [["Find it", f"question {i} about tea"] for i in range(12)]
    assert all(len(row["neg"]) == 2 for row in mined)
    assert main(["data", "mine", str(rows), *arguments, "--out", str(tmp_path / "other.jsonl"), "--shard", "3/2"]) == 2
    assert "expected i/n with i from 1 to n" in capsys.readouterr().err


def test_each_file_of_a_folder_is_mined_by_itself(exported: Callable[..., Path], tmp_path: Path) -> None:  # noqa: F811
    for name in ("a", "b"):
        pairs(tmp_path / "rows" / f"{name}.jsonl", 8)
    arguments = ["--model", str(exported()), "--out", str(tmp_path / "mined"), "--negatives", "1", "--depth", "3"]
    assert main(["data", "mine", str(tmp_path / "rows"), *arguments]) == 0
    found = sorted(path.name for path in (tmp_path / "mined").iterdir() if not path.name.startswith("."))
    assert found == ["a.jsonl", "a.report.yaml", "b.jsonl", "b.report.yaml"]


def test_files_that_are_called_alike_keep_their_folders(exported: Callable[..., Path], tmp_path: Path) -> None:  # noqa: F811
    for name in ("s1", "s2"):
        pairs(tmp_path / "rows" / name / "a.jsonl", 8)
    arguments = ["--model", str(exported()), "--out", str(tmp_path / "mined"), "--negatives", "1", "--depth", "3"]
    assert main(["data", "mine", str(tmp_path / "rows"), *arguments]) == 0
    found = sorted(str(path.relative_to(tmp_path / "mined")) for path in (tmp_path / "mined").rglob("*.jsonl"))
    assert found == ["s1/a.jsonl", "s2/a.jsonl"]


def test_files_whose_rows_would_go_to_one_file_are_refused(
    exported: Callable[..., Path],  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pairs(tmp_path / "rows" / "a.jsonl", 8)
    (tmp_path / "rows" / "a.csv").write_text("query,pos\n" + "".join(f"q{i},p{i}\n" for i in range(8)))
    arguments = ["--model", str(exported()), "--out", str(tmp_path / "mined"), "--negatives", "1", "--depth", "3"]
    assert main(["data", "mine", str(tmp_path / "rows"), *arguments]) == 2
    assert "a.csv and a.jsonl would both be written to a.jsonl" in capsys.readouterr().err
    assert not (tmp_path / "mined").exists()


def test_overlap(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = pairs(tmp_path / "rows.jsonl")
    (tmp_path / "eval.tsv").write_text("sentence1\tsentence2\nquestion 3 about tea\tsomething else altogether here\n")
    out, report = tmp_path / "clean.jsonl", tmp_path / "overlap.yaml"
    arguments = [str(rows), str(tmp_path / "eval.tsv"), "--write", str(out), "--report", str(report), "--kinds", "exact,ngram"]
    assert main(["data", "overlap", *arguments]) == 0
    assert "1 of 12 training rows (8.33%) overlap with 2 evaluation texts" in capsys.readouterr().out
    assert len(out.read_text().splitlines()) == 11
    assert yaml.safe_load(report.read_text())["kinds"]["exact"] == 1
    assert main(["data", "overlap", *arguments[:2], "--kinds", "exat"]) == 2
    assert "Did you mean 'exact'" in capsys.readouterr().err


def test_overlap_writes_rows_as_they_are_or_not_at_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "eval.tsv").write_text("sentence1\na text that is in both sets\n")
    texts = tmp_path / "texts.txt"
    texts.write_text("two  spaces between\ta tab and words\na text that is in both sets\n")
    clean = tmp_path / "out" / "clean.txt"
    more = [str(tmp_path / "eval.tsv"), "--kinds", "exact", "--write"]
    assert main(["data", "overlap", str(texts), *more, str(clean)]) == 0
    assert clean.read_text() == "two  spaces between\ta tab and words\n"
    before = clean.read_bytes()
    tagged = tmp_path / "tagged.jsonl"
    tagged.write_text('{"text": "a text"}\n{"text": "another text", "label": 1}\n')
    capsys.readouterr()
    for rows, told in (
        (pairs(tmp_path / "rows.jsonl"), "rows.jsonl, line 1 has the columns"),
        (tagged, "line 2 has the columns"),
    ):
        assert main(["data", "overlap", str(rows), *more, str(clean)]) == 2
        assert told in capsys.readouterr().err
        assert clean.read_bytes() == before
    missing = [
        "data",
        "overlap",
        str(tagged),
        str(tmp_path / "eval.tsv"),
        "--columns",
        "none",
        "--write",
        str(tmp_path / "a.csv"),
    ]
    assert main(missing) == 2
    assert "expected a name that ends in .jsonl" in capsys.readouterr().err, "before the evaluation sets are read"


def test_the_former_spelling_of_a_kind_is_accepted(tmp_path: Path) -> None:
    rows, report = pairs(tmp_path / "rows.jsonl"), tmp_path / "overlap.yaml"
    (tmp_path / "eval.tsv").write_text("sentence1\nQuestion 3 about TEA!\n")
    for spelling in ("normalised", "normalized"):
        arguments = [str(rows), str(tmp_path / "eval.tsv"), "--report", str(report), "--kinds", f"exact,{spelling}"]
        assert main(["data", "overlap", *arguments]) == 0
        assert yaml.safe_load(report.read_text())["kinds"] == {"exact": 0, "normalized": 1, "ngram": 0, "near": 0}


def test_the_name_of_a_report_is_judged_before_the_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "overlap", "missing.jsonl", "missing.tsv", "--report", str(tmp_path / "overlap.json")]) == 2
    assert "expected a name that ends in .yaml" in capsys.readouterr().err


def test_prepare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "wiki1m_for_simcse.txt").write_text("One sentence.\n\nAnother one.\n")
    out = tmp_path / "data"
    assert main(["data", "prepare", "wiki1m", "--out", str(out), "--from", str(tmp_path / "wiki1m_for_simcse.txt")]) == 0
    told = capsys.readouterr().out
    assert "2 rows in 1 file(s), 0 left out" in told
    assert f"data=wiki1m data.wiki1m={out}/wiki1m_for_simcse.txt" in told
    assert (out / "wiki1m_for_simcse.txt").read_text() == "One sentence.\nAnother one.\n"
    assert main(["data", "prepare", "wiki2m", "--out", str(out)]) == 2
    assert "Did you mean 'wiki1m'" in capsys.readouterr().err


def test_unknown_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data"]) == 2
    assert "no command given. Known: mine, overlap, prepare." in capsys.readouterr().err
    assert main(["data", "mien"]) == 2
    assert "Did you mean 'mine'" in capsys.readouterr().err


def test_sources_on_the_command_line() -> None:
    assert source_config("rows", "dev", "") == SourceConfig(path="rows", split="dev")
    assert source_config("hub:a/b:c", "dev", "query=q,positive=p") == SourceConfig(
        hub="a/b", subset="c", split="dev", columns={"query": "q", "positive": "p"}
    )
    assert source_config("builtin:pydocs", "test", "") == SourceConfig(builtin="pydocs", split="test")
    with pytest.raises(UserError, match="expected field=column"):
        source_config("rows.jsonl", "train", "query")


ROWS = ("[1]", "[]", "5", '"x"', "null", "true")
"""JSON that is no object."""


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("place", ["train", "evaluation"])
def test_overlap_refuses_rows_that_are_no_objects(
    row: str, place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = pairs(tmp_path / "good.jsonl"), pairs(tmp_path / "bad.jsonl", 1)
    bad.write_text(f"{bad.read_text()}{row}\n")
    files = [bad, good] if place == "train" else [good, bad]
    assert main(["data", "overlap", *map(str, files), "--write", str(tmp_path / "clean.jsonl")]) == 2
    assert "bad.jsonl, line 2: expected an object with named columns, got " in capsys.readouterr().err
    assert not (tmp_path / "clean.jsonl").exists()


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("name", PUBLISHED)
def test_prepare_refuses_rows_that_are_no_objects(
    name: str, row: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stems = [part.split for part in PUBLISHED[name].parts] or ["nq" if name == "echo" else "train"]
    (tmp_path / "in").mkdir()
    for stem in stems:
        (tmp_path / "in" / f"{stem}.jsonl").write_text(f"{row}\n")
    assert main(["data", "prepare", name, "--from", str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert f"{stems[0]}.jsonl, line 1, field '(row)': got " in said
    assert "expected an object with named columns" in said
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
