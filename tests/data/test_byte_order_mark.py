"""A byte-order mark at the start of a user's file is no part of what is read, whatever the file."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from unified_lm.cli.arguments import read_stdin
from unified_lm.composition.locate import read_yaml
from unified_lm.config.streams import RecordKind, SourceConfig
from unified_lm.core.user_files import parse_yaml
from unified_lm.data.rows.readers import read_text_lines
from unified_lm.data.rows.texts import open_rows
from unified_lm.data.sources import open_source
from unified_lm.evaluation.embedding.instructions import load_table
from unified_lm.evaluation.generation.perplexity import read_domain
from unified_lm.evaluation.words.data import read_conll
from unified_lm.retrieval.files import read_documents

MARK = b"\xef\xbb\xbf"
ROWS = [{"text": "one text"}, {"text": "another text"}]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS)
FILES = {
    **{f"rows{suffix}": "one text\nanother text\n" for suffix in (".txt", ".md", ".rst")},
    "rows.jsonl": JSONL,
    "lines.json": JSONL,
    "array.json": json.dumps(ROWS),
    "rows.csv": "text,id\none text,1\nanother text,2\n",
    "rows.tsv": "text\tid\none text\t1\nanother text\t2\n",
}
PAGES = ("rows.md", "rows.rst")


def texts(path: Path) -> list[Any]:
    return list(open_source(SourceConfig(path=str(path)), RecordKind.TEXT, 0))


OF_ROWS: dict[str, Callable[[Path], Any]] = {
    "open_source": texts,
    "open_rows": lambda path: [row for rows in open_rows(str(path)) for _, row in rows.rows()],
    "read_domain": lambda path: read_domain("name", path).documents,
    "read_documents": lambda path: [(document.id, document.text) for document in read_documents(str(path))],
}
OTHERS: dict[str, tuple[str, str, Callable[[Path], Any]]] = {
    "lines": ("a.txt", "one\ntwo\n", read_text_lines),
    "words": ("a.conll", "Rain NN B-NP O\nfalls VB B-VP O\n\nSnow NN B-NP O\n", lambda path: read_conll(path, path).train),
    "instructions": ("a.json", '{"tasks": {"SciFact": "Find it"}}', lambda path: load_table(str(path)).tasks),
    "description": ("task.yaml", "type: sts\nname: mine\n", lambda path: parse_yaml(path.read_bytes())),
    "recipe": ("mine.yaml", "max_steps: 3\nseed: 1\n", read_yaml),
}
CASES = [
    *((f"{reader}, {name}", name, content, read) for reader, read in OF_ROWS.items() for name, content in FILES.items()),
    *((label, *case) for label, case in OTHERS.items()),
]
CASES = [case for case in CASES if case[1] not in PAGES or case[0].startswith("read_documents")]


@pytest.mark.parametrize(("name", "content", "read"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_a_file_with_the_mark_is_read_as_the_one_without(
    name: str, content: str, read: Callable[[Path], Any], tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode())
    expected = read(path)
    path.write_bytes(MARK + content.encode())
    found = read(path)
    assert found == expected
    assert found
    assert "\ufeff" not in repr(found)


@pytest.mark.parametrize("line", [False, True])
def test_standard_input_too(monkeypatch: pytest.MonkeyPatch, line: bool) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(MARK + b"Which are red?\n")))
    assert read_stdin(line=line) == "Which are red?\n"
