"""Whatever stands in a file of rows, of an evaluation task or of a table: rows, or a clear error that names the file."""

from __future__ import annotations

import gzip
import io
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import strategies as st

from tests.properties.cases import MANY, TEXTS, VALUES, Case, mutated, require_text, run_cases, to_json
from unified_lm.cli.experts import _scored_rows
from unified_lm.config.schema import SourceConfig
from unified_lm.core.errors import UserError
from unified_lm.data.rows.files import record_row
from unified_lm.data.rows.keys import ROW_KEYS, TURN_KEYS
from unified_lm.data.rows.parse import FIELDS
from unified_lm.data.rows.prepare import prepare
from unified_lm.data.rows.published import PUBLISHED
from unified_lm.data.rows.readers import read_text_lines
from unified_lm.data.rows.records import RecordKind
from unified_lm.data.rows.texts import open_rows
from unified_lm.data.sources import open_source
from unified_lm.evaluation.analyses.future import read_triples
from unified_lm.evaluation.analyses.texts import read_scored_pairs
from unified_lm.evaluation.embedding.instructions import load_table
from unified_lm.evaluation.embedding.offline import Kind, read_task
from unified_lm.evaluation.generation.perplexity import read_domain
from unified_lm.evaluation.words.data import read_conll
from unified_lm.mining.overlap import OverlapConfig, build_index, find_overlap
from unified_lm.retrieval.files import read_documents

# --- what files hold ---------------------------------------------------------------------------------------------------

_COLUMNS = sorted(
    {
        *(name for fields in FIELDS.values() for names in fields.values() for name in names),
        *ROW_KEYS,
        *("neg_1", "pos2", "querry", "id", "_id", "title", "score", "sentence1", "sentence2", "query-id", "corpus-id"),
        *("prefix", "anchor", "similar", "different", "", "x"),
    }
)
GOOD_ROWS = (
    {"query": "a question", "pos": ["an answer"], "neg": ["another text"]},
    {"query": ["an instruction", "a question"], "pos": [["", "an answer"]]},
    {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hello to you"}]},
    {"conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hello to you"}]},
    {"text": "some running text of several words"},
    {"prompt": "say", "completion": "said", "label": True},
    {"sentence1": "one text", "sentence2": "another text", "score": 0.5, "label": 1},
    {"prefix": "He sat on the", "anchor": "river bank", "similar": "bank of the river", "different": "bank of England"},
    {"id": "1", "title": "a title", "text": "a text"},
    {"query-id": "1", "corpus-id": "1", "score": 1},
)
_TURN = st.dictionaries(st.sampled_from(["role", "content", "from", "value", *TURN_KEYS, "weigth"]), VALUES, max_size=3)
_CELLS = st.one_of(VALUES, st.lists(_TURN, max_size=2), st.lists(st.lists(TEXTS, min_size=2, max_size=2), max_size=2))
ROW = st.one_of(
    st.sampled_from(GOOD_ROWS),
    st.sampled_from(GOOD_ROWS).flatmap(mutated),
    st.dictionaries(st.sampled_from(_COLUMNS), _CELLS, max_size=4),
    VALUES,
)
ROWS = st.one_of(st.lists(ROW, min_size=1, max_size=3), st.sampled_from(GOOD_ROWS).map(lambda row: [row, row]))
RAW = st.sampled_from(
    [
        *(b"", b"\n\n", b"{", b"[", b"[1,", b"null\n", b"1\n", b'"a"\n', b"\xff\xfe{", b"\xef\xbb\xbf{}", b"\0\0\0\0\n"),
        b'{"text": "' + b"\xed\xa0\x80" + b'"}\n',
        b'{"text": "\\ud800"}\n',
        b'{"text": "some words", "query": "\\ud800 and a word", "sentence1": "\\ud800", "score": 1}\n' * 2,
        b'{"text": "some words", "x\\ud800": 1}\n' * 2,
        b'{"prefix": "a", "anchor": "b", "similar": "c \\udfff", "different": "d"}\n' * 2,
        b'{"id": "\\ud800", "title": "\\udfff", "text": "some words of a text"}\n{"id": "b", "text": "some words of a text"}\n',
        b'{"query": "a", "pos": ["b"], "neg_' + b"9" * 5000 + b'": "c"}\n',
        b'{"text": "a", "text": "b"}\n',
        b'{"text": ' + b"9" * 5000 + b"}\n",
        b'{"id": "1", "text": "a", "score": ' + b"9" * 5000 + b"}\n",
        b'{"text": ' + b"[" * 100_000 + b"\n",
        b'{"text": ' + b'{"a":' * 100_000 + b"\n",
        b'{"query": "a", "pos": [' + b"[" * 300 + b"]" * 300 + b"]}\n",
        b'{"text": NaN}\n{"text": 1e999}\n',
        b'text\n"a\n',
        b"text,text\na,b\n",
        b"query,pos\n" + b"x" * 200_000 + b",y\n",
        b"text\na\rb\r\nc\0d\n",
        b'query\tpos\n"a"b"\tc\n',
    ]
)


def _parquet(rows: list[Any]) -> bytes | None:
    columns: dict[str, list[Any]] = {}
    for name in dict.fromkeys(str(name) for row in rows if isinstance(row, Mapping) for name in row):
        columns[name] = [row.get(name) if isinstance(row, Mapping) else None for row in rows]
    try:
        sink = io.BytesIO()
        pq.write_table(pa.table({name: pa.array(cells) for name, cells in columns.items()}), sink)
        return sink.getvalue()
    except (pa.ArrowException, UnicodeError, OverflowError, TypeError):
        return None


def _bad_text_parquet() -> bytes:
    text = pa.Array.from_buffers(pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0\4\0\0\0"), pa.py_buffer(b"\xff\xfeok")])
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": text, "query": text, "pos": text}), sink)
    return sink.getvalue()


def _table(rows: list[Any], delimiter: str) -> bytes:
    names = list(dict.fromkeys(str(name) for row in rows if isinstance(row, Mapping) for name in row))
    lines = [names, *([_cell(row.get(name)) for name in names] if isinstance(row, Mapping) else [_cell(row)] for row in rows)]
    return "".join(delimiter.join(line) + "\n" for line in lines).encode("utf-8", "surrogatepass")


def _cell(value: Any) -> str:
    return value if isinstance(value, str) else "" if value is None else json.dumps(value)


def content(rows: list[Any], suffix: str, escaped: bool = False) -> bytes:
    """Rows in the format of an extension, as a careless program writes them; JSON may spell half a pair of surrogates."""
    if suffix == ".parquet":
        return _parquet(rows) or _bad_text_parquet()
    if suffix in (".csv", ".tsv"):
        return _table(rows, "," if suffix == ".csv" else "\t")
    if suffix == ".txt":
        return "".join(f"{row}\n" for row in rows).encode("utf-8", "surrogatepass")
    if escaped:
        return json.dumps(rows).encode() if suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows).encode()
    return to_json(rows) if suffix == ".json" else b"".join(to_json(row) + b"\n" for row in rows)


@st.composite
def files(draw: st.DrawFn) -> tuple[str, bytes]:
    """(extension, content) of a file: rows, rows with damaged bytes, or no rows at all."""
    suffix = draw(st.sampled_from([".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet", ".jsonl.gz", ".csv.gz"]))
    plain, escaped = suffix.removesuffix(".gz"), draw(st.booleans())
    data = draw(st.one_of(ROWS.map(lambda rows: content(rows, plain, escaped)), RAW))
    if suffix.endswith(".gz"):
        data = gzip.compress(data, mtime=0)
    damage = draw(st.sampled_from(["none", "none", "none", "cut", "byte"]))
    if damage != "none" and data:
        place = draw(st.integers(0, len(data) - 1))
        data = data[:place] if damage == "cut" else data[:place] + draw(st.binary(min_size=1, max_size=2)) + data[place + 1 :]
    return suffix, data


# --- who reads them ----------------------------------------------------------------------------------------------------


def _records(kind: RecordKind) -> Callable[[Path, Case], object]:
    def read(path: Path, case: Case) -> object:
        source = open_source(SourceConfig(path=str(path), **case["options"]), kind, 0)
        return [(source.location(i), record_row(record)) for i, record in enumerate(source)], source.summary()

    return read


def _overlap(path: Path, case: Case) -> object:
    other = path.with_name("evaluation.jsonl")
    other.write_text('{"text": "some running text of several words"}\n')
    train, evaluation = (path, other) if case["way"] else (other, path)
    config = OverlapConfig()
    index = build_index([("evaluation", file) for file in open_rows(str(evaluation))], config)
    suffix = ".parquet" if case["way"] and case["format"] else ".jsonl"
    return find_overlap(open_rows(str(train)), index, write=path.with_name(f"out{suffix}")).as_dict()


def _prepare(path: Path, case: Case) -> object:
    return prepare(case["published"], path.parent / "out", local=path, suffix=".parquet" if case["format"] else ".jsonl")


def _task(path: Path, case: Case) -> object:
    kind = case["task"]["type"]
    for name in ("train", "test", "corpus", "queries", "qrels"):
        if name != case["part"]:
            rows = {"corpus": GOOD_ROWS[8], "queries": GOOD_ROWS[8], "qrels": GOOD_ROWS[9]}.get(name, {"text": "a", "label": 0})
            (path.parent / f"{name}.jsonl").write_bytes(b"".join(to_json(row) + b"\n" for row in (rows, {**rows, "label": 1})))
    suffix = "".join(path.suffixes)
    path.rename(path.with_name(f"{case['part']}{suffix}"))
    (path.parent / "task.yaml").write_text(f"type: {kind}\n")
    return read_task(path.parent)


READERS: Mapping[str, Callable[[Path, Case], object]] = {
    **{kind.value: _records(kind) for kind in RecordKind},
    "overlap": _overlap,
    "prepare": _prepare,
    "task": _task,
    "triples": lambda path, case: read_triples(path),
    "scored pairs": lambda path, case: read_scored_pairs(str(path), 5),
    "domain": lambda path, case: read_domain("d", path),
    "lines": lambda path, case: read_text_lines(path),
    "documents": lambda path, case: list(read_documents(str(path), "text" if case["way"] else "query")),
    "scored rows": lambda path, case: _scored_rows(path, "sentence1" if case["way"] else "text", "score"),
    "conll": lambda path, case: read_conll(path, path, {"word": 0, "pos": -1} if case["way"] else None),
}
CASES = st.fixed_dictionaries(
    {
        "file": files(),
        "reader": st.sampled_from(sorted(READERS)),
        "options": st.fixed_dictionaries(
            {},
            optional={
                "on_empty": st.sampled_from(["error", "skip"]),
                "on_unusable": st.sampled_from(["error", "skip"]),
                "limit": st.sampled_from([1, 10**30]),
                "columns": st.dictionaries(st.sampled_from(["query", "positive", "text", "label"]), TEXTS, max_size=1),
                "ignore": st.sampled_from([("label",), ("weight", "text")]),
                "instruction": TEXTS,
            },
        ),
        "way": st.booleans(),
        "format": st.booleans(),
        "published": st.sampled_from(sorted(PUBLISHED)),
        "task": st.fixed_dictionaries({"type": st.sampled_from([kind.value for kind in Kind])}),
        "part": st.sampled_from(["train", "test", "corpus", "queries", "qrels"]),
    }
)


def _texts(value: Any) -> Iterator[str]:
    """Every text in what a reader returns."""
    if isinstance(value, str):
        yield value
    elif is_dataclass(value):
        yield from (text for field in fields(value) for text in _texts(getattr(value, field.name)))
    elif isinstance(value, Mapping):
        yield from (text for item in value.items() for text in _texts(item))
    elif isinstance(value, (list, tuple)):
        yield from (text for item in value for text in _texts(item))


def check(case: Case) -> None:
    suffix, data = case["file"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "in", f"rows{suffix}")
        path.parent.mkdir()
        path.write_bytes(data)
        try:
            for text in _texts(READERS[case["reader"]](path, case)):
                text.encode()  # what is read can be tokenized, hashed, stored and printed
        except UserError as error:
            require_text(error, naming=("rows", str(path.parent), "columns", "ignore", "evaluation sets", "evaluation.jsonl"))
        left = [str(p) for p in Path(folder).rglob(".*") if p.name != ".unified_lm_written"]
        assert not left, f"temporary files are left: {left}"


# --- task.yaml and instruction tables ------------------------------------------------------------------------------------

_TASK = {
    "type": "retrieval",
    "name": "mine",
    "columns": {"text": "text"},
    "files": {"corpus": "corpus.jsonl"},
    "instruction": {"query": "Find it", "document": "a text"},
    "languages": ["eng-Latn"],
    "header": True,
    "delimiter": ",",
    "description": "a task",
}
_STS = {**_TASK, "type": "sts"}
_TABLE = {
    "name": "mine",
    "tasks": {"SciFact": {"query": "Find it", "document": ""}, "STS": "Compare"},
    "types": {"Retrieval": "Find it"},
    "documents_with_instruction": ["Clustering"],
    "source": "here",
}
DESCRIPTIONS = st.one_of(
    st.fixed_dictionaries(
        {"what": st.just("task"), "value": st.one_of(mutated(_TASK), mutated({**_TASK, "type": "sts"}), VALUES)}
    ),
    st.fixed_dictionaries({"what": st.just("table"), "value": st.one_of(mutated(_TABLE), VALUES)}),
    st.fixed_dictionaries({"what": st.sampled_from(["task", "table"]), "raw": st.one_of(RAW, st.binary(max_size=20))}),
)


def check_description(case: Case) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / ("task.yaml" if case["what"] == "task" else "table.json")
        for file, row in (("corpus", GOOD_ROWS[8]), ("queries", GOOD_ROWS[8]), ("qrels", GOOD_ROWS[9]), ("test", GOOD_ROWS[6])):
            (folder / f"{file}.jsonl").write_bytes(
                b"".join(to_json(each) + b"\n" for each in (row, {**row, "score": 0.25, "id": 2}))
            )
        if "raw" in case:
            path.write_bytes(case["raw"])
        elif case["what"] == "task":
            path.write_bytes(yaml.safe_dump(case["value"], allow_unicode=True).encode("utf-8", "surrogatepass"))
        else:
            path.write_bytes(to_json(case["value"]))
        try:
            if case["what"] == "task":
                task = read_task(folder)
                assert isinstance(task.name, str)
                assert all(isinstance(language, str) for language in task.languages)
            else:
                table = load_table(str(path))
                assert all(isinstance(name, str) for name in table.documents_with_instruction)
        except UserError as error:
            require_text(error, naming=(str(folder),))


def _halved(value: Any) -> Any:
    """A row whose every text ends in half a pair of surrogates."""
    if isinstance(value, str):
        return f"{value} \ud800"
    if isinstance(value, list):
        return [_halved(item) for item in value]
    return (
        {key: item if key in ("role", "from") else _halved(item) for key, item in value.items()}
        if isinstance(value, dict)
        else value
    )


@pytest.mark.parametrize("reader", sorted(set(READERS) - {"lines", "conll", "prepare"}))
def test_half_a_pair_of_surrogates_is_refused_by_every_reader(reader: str, tmp_path: Path) -> None:
    case = {"options": {}, "way": True, "format": False, "task": {"type": "sts"}, "part": "test"}
    told = []
    for number, row in enumerate(GOOD_ROWS):
        path = tmp_path / str(number) / "rows.jsonl"
        path.parent.mkdir()
        path.write_text(2 * f"{json.dumps(_halved(row))}\n")
        try:
            for text in _texts(READERS[reader](path, case)):
                text.encode()
        except UserError as error:
            told.append(str(error))
    assert any("surrogate" in text or "Unicode" in text for text in told), told


def test_rows_are_read_or_refused() -> None:
    run_cases(CASES, check, 60)


def test_descriptions_of_tasks_are_read_or_refused() -> None:
    run_cases(DESCRIPTIONS, check_description, 40)


@pytest.mark.slow
def test_many_rows_are_read_or_refused() -> None:
    run_cases(CASES, check, MANY)


@pytest.mark.slow
def test_many_descriptions_of_tasks_are_read_or_refused() -> None:
    run_cases(DESCRIPTIONS, check_description, MANY)
