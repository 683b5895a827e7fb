"""Files, folders and data sets as sources: the same records from every format, and a message for every bad input."""

import gzip
import json
import logging
import pickle
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from unified_lm.config.schema import SourceConfig
from unified_lm.core.errors import DataError
from unified_lm.data.rows.records import ChatRecord, PairRecord, RecordKind, Text, TextRecord
from unified_lm.data.sources import RecordSource, open_source, open_sources

PAIR, CHAT, TEXT, PREFERENCE = RecordKind.PAIR, RecordKind.CHAT, RecordKind.TEXT, RecordKind.PREFERENCE
ROWS = [{"query": f"q{i}", "positive": f"p{i}", "negative": f"n{i}"} for i in range(3)]
RECORDS = [PairRecord(Text(f"q{i}"), (Text(f"p{i}"),), (Text(f"n{i}"),)) for i in range(3)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UNIFIED_LM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def jsonl(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def texts(path: Path, count: int, prefix: str = "t") -> Path:
    return jsonl(path, [{"text": f"{prefix}{i}"} for i in range(count)])


def opened(path: Path, kind: RecordKind = PAIR, seed: int = 0, **settings: object) -> RecordSource:
    return open_source(SourceConfig(path=str(path), **settings), kind, seed)  # type: ignore[arg-type]


def table(delimiter: str) -> str:
    return "".join(delimiter.join(cells) + "\n" for cells in (ROWS[0], *(row.values() for row in ROWS)))


def write(path: Path) -> Path:
    """ROWS in the format that the name says."""
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    content = {
        "rows.jsonl": lines.encode(),
        "rows.jsonl.gz": gzip.compress(lines.encode(), mtime=0),
        "array.json": json.dumps(ROWS, indent=1).encode(),
        "lines.json": lines.encode(),
        "rows.csv": b"\xef\xbb\xbf" + table(",").encode(),
        "rows.tsv": table("\t").encode(),
    }
    if path.name == "rows.parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    else:
        path.write_bytes(content[path.name])
    return path


@pytest.mark.parametrize(
    "name", ["rows.jsonl", "rows.jsonl.gz", "array.json", "lines.json", "rows.csv", "rows.tsv", "rows.parquet"]
)
def test_every_format_gives_the_same_records(name: str, tmp_path: Path) -> None:
    source = opened(write(tmp_path / name))
    assert list(source) == RECORDS
    assert source[-1] == RECORDS[-1]
    assert (source.name, source.kind, source.rejected.total()) == (name, PAIR, 0)
    # The fingerprint is that of the rows, whatever file they came in.
    assert source.fingerprint == opened(jsonl(tmp_path / "again" / "x.jsonl", ROWS)).fingerprint
    with pytest.raises(IndexError):
        source[3]


def test_every_kind_survives_the_cache(tmp_path: Path) -> None:
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "ü"}, {"role": "assistant", "content": "a"}]
    assert opened(jsonl(tmp_path / "c.jsonl", [{"messages": chat}]), CHAT)[0] == ChatRecord(
        (("system", "s"), ("user", "ü"), ("assistant", "a"))
    )
    (tmp_path / "t.txt").write_text("one\n\n  two  \n", encoding="utf-8")
    assert list(opened(tmp_path / "t.txt", TEXT)) == [TextRecord("one"), TextRecord("two")]
    row = {"prompt": "p", "completion": "c", "label": False}
    assert opened(jsonl(tmp_path / "p.jsonl", [row]), PREFERENCE)[0].desirable is False  # type: ignore[union-attr]
    row = {"query": ["find", "q"], "pos": [["", "a"], ["doc", "b"]]}
    assert opened(jsonl(tmp_path / "g.jsonl", [row]))[0] == PairRecord(Text("q", "find"), (Text("a"), Text("b", "doc")))


def test_more_rows_than_one_batch(tmp_path: Path) -> None:
    source = opened(texts(tmp_path / "t.jsonl", 2500), TEXT)
    assert [source[i] for i in (0, 1023, 1024, 2499)] == [TextRecord(f"t{i}") for i in (0, 1023, 1024, 2499)]
    assert len(source) == 2500


def test_place_says_where_a_record_came_from(tmp_path: Path) -> None:
    jsonl(tmp_path / "d" / "a.jsonl", [{"text": "a0"}, {"text": ""}, {"text": "a1"}])
    pq.write_table(pa.table({"text": ["b0", "b1"]}), tmp_path / "d" / "b.parquet")
    source = opened(tmp_path / "d", TEXT)
    assert source.location(1) == f"{tmp_path / 'd' / 'a.jsonl'}, line 3"
    assert source.location(-1) == f"{tmp_path / 'd' / 'b.parquet'}, row 2"


def test_a_source_can_be_sent_to_another_process(tmp_path: Path) -> None:
    source = opened(texts(tmp_path / "t.jsonl", 5), TEXT)
    assert source[2] == TextRecord("t2")
    assert list(pickle.loads(pickle.dumps(source))) == list(source)


def test_second_opening_does_not_parse_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "rows.jsonl")
    first = opened(path)

    def fail(*_: object) -> None:
        raise AssertionError("parsed again")

    monkeypatch.setattr("unified_lm.data.rows.record_cache._write", fail)
    assert list(opened(path)) == list(first)
    jsonl(path, [*ROWS, ROWS[0]])  # changed content must be parsed
    with pytest.raises(AssertionError, match="parsed again"):
        opened(path)


def test_instructions_fill_what_rows_leave_out(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "r.jsonl", [{"query": ["own", "a"], "pos": "b", "neg": [["d", "c"]]}, {"query": "a", "pos": "b"}])
    source = opened(path, instruction="find ", document_instruction="doc")
    assert source[0] == PairRecord(Text("a", "own"), (Text("b", "doc"),), (Text("c", "d"),))
    assert source[1] == PairRecord(Text("a", "find"), (Text("b", "doc"),))
    assert opened(path)[1] == PairRecord(Text("a"), (Text("b"),))


def test_limit_is_a_seeded_choice_in_order(tmp_path: Path) -> None:
    path = texts(tmp_path / "t.jsonl", 200)
    numbers = [int(record.text[1:]) for record in opened(path, TEXT, seed=1, limit=20)]  # type: ignore[union-attr]
    assert numbers == sorted(numbers)
    assert len(set(numbers)) == 20
    assert numbers != list(range(20))
    assert list(opened(path, TEXT, seed=1, limit=20)) == list(opened(path, TEXT, seed=1, limit=20))
    assert list(opened(path, TEXT, seed=1, limit=20)) != list(opened(path, TEXT, seed=2, limit=20))
    assert len(opened(path, TEXT, limit=500)) == 200


def test_fingerprint_changes_with_what_changes_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl")
    variants = [
        opened(path),
        opened(path, instruction="i"),
        opened(path, document_instruction="i"),
        opened(path, limit=2),
        opened(path, limit=1),
        opened(path, columns={"positive": "negative"}),
        opened(jsonl(tmp_path / "other.jsonl", ROWS[::-1])),
    ]
    assert len({source.fingerprint for source in variants}) == len(variants)
    assert opened(path, weight=3.0).fingerprint == variants[0].fingerprint


def test_fingerprint_is_the_same_in_another_process(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl")
    code = (
        "import sys; from unified_lm.config.schema import SourceConfig; from unified_lm.data.rows.records import RecordKind; "
        "from unified_lm.data.sources import open_source; "
        "print(open_source(SourceConfig(path=sys.argv[1], limit=2), RecordKind.PAIR, 5).fingerprint)"
    )
    result = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == opened(path, seed=5, limit=2).fingerprint


def test_folder_in_sorted_order_whole_and_by_file(tmp_path: Path) -> None:
    folder = tmp_path / "many"
    texts(folder / "b.jsonl", 3, "b")
    texts(folder / "a" / "z.jsonl", 2, "az")
    (folder / "c.txt").write_text("c0\n")
    (folder / "README.md").write_text("not data")
    (folder / ".hidden.jsonl").write_text("not JSON")
    whole = opened(folder, TEXT)
    assert [record.text for record in whole] == ["az0", "az1", "b0", "b1", "b2", "c0"]  # type: ignore[union-attr]
    assert whole.name == "many"
    parts = open_sources(SourceConfig(path=str(folder)), TEXT, 0)
    assert [part.name for part in parts] == ["many/a/z.jsonl", "many/b.jsonl", "many/c.txt"]
    assert [record for part in parts for record in part] == list(whole)


def test_limit_over_a_folder_is_shared_by_its_files(tmp_path: Path) -> None:
    texts(tmp_path / "d" / "a.jsonl", 50, "a")
    texts(tmp_path / "d" / "b.jsonl", 50, "b")
    config = SourceConfig(path=str(tmp_path / "d"), limit=10)
    parts = open_sources(config, TEXT, 3)
    assert [record for part in parts for record in part] == list(open_source(config, TEXT, 3))
    assert sum(map(len, parts)) == 10
    assert len(open_sources(SourceConfig(path=str(tmp_path / "d"), limit=1), TEXT, 3)) == 1


# Rejections


def test_blank_running_text_is_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = jsonl(tmp_path / "wiki.jsonl", [{"text": ""}, {"text": "a"}, {"text": " \n"}, {"text": "b"}])
    with caplog.at_level(logging.WARNING):
        source = opened(path, TEXT, limit=1)
    assert source.rejected == {"empty text after stripping": 2}
    assert opened(path, TEXT).rejected == source.rejected  # counted too when it comes from the cache
    assert source.summary() == "wiki.jsonl: 1 rows of 2, 2 rejected (2 x empty text after stripping)"
    assert source.summary() in caplog.text


def test_empty_text_of_a_pair_is_an_error_unless_skipped(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "r.jsonl", [ROWS[0], {"query": "  ", "positive": "p"}, {"query": "q", "positive": ""}])
    with pytest.raises(DataError, match=r"r\.jsonl, line 2, field 'query': got '  ' \(str\), expected text .*on_empty=skip"):
        opened(path)
    source = opened(path, on_empty="skip")
    assert list(source) == RECORDS[:1]
    assert source.rejected == {"empty query after stripping": 1, "empty positive after stripping": 1}


def test_all_rows_rejected(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "r.jsonl", [{"text": " "}, {"text": ""}])
    with pytest.raises(DataError, match=r"r\.jsonl: every row was rejected \(2 x empty text after stripping\)"):
        opened(path, TEXT)


# Bad input


@pytest.mark.parametrize(
    ("name", "content", "kind", "message"),
    [
        ("e.jsonl", b"", TEXT, r"e\.jsonl is empty: expected at least one row"),
        ("e.jsonl", b"\n\n", TEXT, r"e\.jsonl is empty: expected at least one row"),
        ("e.csv", b"text\n", TEXT, r"e\.csv is empty: expected at least one row"),
        (
            "e.jsonl",
            b'{"text": "a"}\n\n{"text": "b"\n',
            TEXT,
            r"e\.jsonl, line 3: malformed JSON: Expecting ',' delimiter at column \d+",
        ),
        ("e.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', TEXT, r"e\.jsonl, line 2: not UTF-8 \(invalid start byte at byte 10"),
        ("e.jsonl", b'{"text": "a"}\n{"text": 5}\n', TEXT, r"e\.jsonl, line 2, field 'text': got 5 \(int\), expected a text\."),
        (
            "e.jsonl",
            b'{"text": "a"}\n{"txet": "b"}\n',
            TEXT,
            r"line 2, field 'text': got no such column among .* Did you mean 'txet'\?",
        ),
        (
            "e.json",
            b'[\n{"text": "a"},\n{"text" "b"}]',
            TEXT,
            r"e\.json, line 3: malformed JSON: .* Expected an array of objects\.",
        ),
        ("e.json", b'[{"text": "a"},\n{"text": "\xff"}]', TEXT, r"e\.json, line 2: not UTF-8"),
        ("e.json", b'[{"text": "a"}, {"text": 5}]', TEXT, r"e\.json, item 2, field 'text': got 5 \(int\)"),
        ("e.csv", b"query,positive\nq,p\nq\n", PAIR, r"e\.csv, line 3: got 1 cells, expected 2 as in the header"),
        ("e.csv", b"query,positive\nq,p,x\n", PAIR, r"e\.csv, line 2: got 3 cells, expected 2 as in the header"),
        ("e.csv", b"query,positive\nq,\n", PAIR, r"e\.csv, line 2, field 'positive': got null \(or an empty cell\)"),
        ("e.csv", b'query,positive\nq,"p\n', PAIR, r"e\.csv, line 2: malformed table: unexpected end of data"),
        ("e.parquet", b"not parquet at all", PAIR, r"e\.parquet: not a readable parquet file"),
        ("e.jsonl.gz", b"not gzip", TEXT, r"e\.jsonl\.gz: the compressed file is cut short or damaged"),
        (
            "e.jsonl.gz",
            gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:30],
            TEXT,
            r"the compressed file is cut short or damaged",
        ),
        (
            "e.jsnl",
            b"{}",
            TEXT,
            r"e\.jsnl: unknown file type '\.jsnl', expected one of .*\.jsonl\.gz\. Did you mean '\.jsonl'\?",
        ),
        ("e", b"{}", TEXT, r"e: unknown file type ''"),
    ],
)
def test_broken_files(name: str, content: bytes, kind: RecordKind, message: str, tmp_path: Path, cache: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        opened(tmp_path / name, kind)
    assert not [path for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"]  # nothing half-made is kept


def test_a_bad_row_is_found_on_opening_even_beyond_the_limit(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "r.jsonl", [*({"text": "a"} for _ in range(3000)), {"text": None, "x": 1}, {"text": {}}])
    with pytest.raises(DataError, match=r"line 3002, field 'text': got {} \(dict\)"):
        opened(path, TEXT, limit=2)


def test_missing_file(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match=r"no such file or folder: .*row\.jsonl\. Did you mean 'rows\.jsonl'\?"):
        opened(tmp_path / "row.jsonl")
    with pytest.raises(
        DataError, match=r"no such file or folder: nowhere/x\.jsonl\. Paths are relative to the working directory"
    ):
        opened(Path("nowhere/x.jsonl"))


def test_folder_without_data(tmp_path: Path) -> None:
    (tmp_path / "f").mkdir()
    with pytest.raises(DataError, match=r"the folder .*f has no data files: found nothing, expected \.jsonl, "):
        opened(tmp_path / "f")
    (tmp_path / "f" / "notes.md").write_text("x")
    with pytest.raises(DataError, match=r"has no data files: found notes\.md"):
        opened(tmp_path / "f")
    (tmp_path / "f" / "state.json").write_text("{}")
    with pytest.raises(DataError, match=r"was written by datasets' save_to_disk\. Write parquet instead"):
        opened(tmp_path / "f")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"one of path, hub or builtin: got none of them"),
        ({"path": "a", "hub": "b"}, r"one of path, hub or builtin: got path=a and hub=b"),
        ({"builtin": "pydoc"}, r"source\.builtin: unknown value 'pydoc'\. Did you mean 'pydocs'\?"),
        ({"path": "a", "limit": 0}, r"limit of source a: got 0, expected at least 1 row"),
        ({"path": "a", "on_empty": "drop"}, r"on_empty: got 'drop', expected 'error' or 'skip'"),
        ({"path": "a", "streaming": True}, r"streaming=true without a limit reads running text along"),
        ({"hub": "a", "streaming": True}, r"read the first rows of a Hub data set with limit=N"),
    ],
)
def test_settings_that_do_not_fit(settings: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_source(SourceConfig(**settings), TEXT, 0)


# Hub data sets (a local folder in the Hub's layout stands for one)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    jsonl(tmp_path / "hub" / "train.jsonl", ROWS)
    jsonl(tmp_path / "hub" / "test.jsonl", ROWS[:1])
    return str(tmp_path / "hub")


def test_hub(hub: str) -> None:
    source = open_source(SourceConfig(hub=hub), PAIR, 0)
    assert list(source) == RECORDS
    assert source.name == f"{hub}/train"
    assert len(open_source(SourceConfig(hub=hub, split="test"), PAIR, 0)) == 1
    assert open_source(SourceConfig(hub=hub), PAIR, 0).fingerprint == source.fingerprint


def test_hub_streaming_reads_the_first_rows(hub: str) -> None:
    source = open_source(SourceConfig(hub=hub, streaming=True, limit=2), PAIR, 0)
    assert list(source) == RECORDS[:2]


def test_hub_errors(hub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"cannot read the Hub data set .*/dev: ValueError: Unknown split \"dev\""):
        open_source(SourceConfig(hub=hub, split="dev"), PAIR, 0)
    with pytest.raises(DataError, match=r"Hub data set .*train, row 1, field 'text': got no such column"):
        open_source(SourceConfig(hub=hub), TEXT, 0)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError, match=r"cannot read the Hub data set nobody/nothing/train: .*HF_HUB_OFFLINE is set"):
        open_source(SourceConfig(hub="nobody/nothing"), TEXT, 0)
