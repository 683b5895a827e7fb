"""Documents of files: a page is one, a row is one, and what is neither does not stand in the way."""

import json
from pathlib import Path

import pytest

from unified_lm.core.errors import DataError
from unified_lm.retrieval.documents import Document, text_id
from unified_lm.retrieval.files import read_documents


def test_a_folder_of_pages_may_hold_pictures_and_programs(tmp_path: Path) -> None:
    for name, content in (("b.md", "B"), ("a/a.rst", "A"), ("plot.png", "x"), ("run.py", "y"), (".git/c.md", "hidden")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    expected = [Document(str(tmp_path / name), text, str(tmp_path / name)) for name, text in (("a/a.rst", "A"), ("b.md", "B"))]
    assert list(read_documents(str(tmp_path))) == expected
    assert list(read_documents(str(tmp_path / "b.md"))) == expected[1:]
    (tmp_path / "rows.jsonl").write_text('{"text": "a row"}\n')
    assert list(read_documents(str(tmp_path))) == [*expected, Document(text_id("a row"), "a row", "rows.jsonl, line 1")]


def test_pages_of_one_name_in_two_folders_are_two_documents(tmp_path: Path) -> None:
    for folder in ("x", "y"):
        (tmp_path / folder / "docs").mkdir(parents=True)
        (tmp_path / folder / "docs" / "index.md").write_text(folder)
    found = [document for folder in ("x", "y") for document in read_documents(str(tmp_path / folder / "docs"))]
    assert len({document.id for document in found}) == 2


def test_rows_have_ids_titles_and_columns_of_their_own(tmp_path: Path) -> None:
    rows = [{"_id": 7, "title": "T", "body": "text"}, {"body": "bare"}]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = list(read_documents(str(tmp_path / "r.jsonl"), "body"))
    assert [(document.id, document.text) for document in found] == [("7", "T\ntext"), (text_id("bare"), "bare")]


def test_what_holds_no_document_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "plot.png").write_text("x")
    (tmp_path / "bad.md").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"bad\.md is not UTF-8"):
        list(read_documents(str(tmp_path)))
    (tmp_path / "bad.md").unlink()
    with pytest.raises(DataError, match=r"no data files: found plot\.png"):
        list(read_documents(str(tmp_path)))
    with pytest.raises(DataError, match="no such file or folder"):
        list(read_documents(str(tmp_path / "nothing")))
    (tmp_path / "r.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(DataError, match=r"r\.jsonl, line 1: no text under 'text' among \[body\]"):
        list(read_documents(str(tmp_path / "r.jsonl")))
