"""What a reader must not lose: repeated names are refused, and lines end where they end."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from unified_lm.cli.use import _lines
from unified_lm.core.errors import DataError
from unified_lm.data.rows.readers import read_rows, read_text_lines
from unified_lm.evaluation.embedding.offline_files import Layout, read_fields

SEPARATORS = ("\u2028", "\u2029", "\x0b", "\x0c", "\x1c", "\x85", "\r")


@pytest.mark.parametrize(
    ("name", "content", "where"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": "b", "text": "c"}\n', "line 2: an object has the key 'text'"),
        (
            "a.jsonl",
            '{"messages": [{"role": "user", "content": "b", "content": "c"}]}\n',
            "line 1: an object has the key 'content'",
        ),
        ("a.json", '[{"text": "a"},\n{"text": "b", "text": "c"}]', "an object has the key 'text'"),
        ("a.csv", "query,pos,query\na,b,c\n", "more than one column is called 'query'"),
        ("a.tsv", "query\tpos\tpos\na\tb\tc\n", "more than one column is called 'pos'"),
    ],
)
def test_repeated_names_are_refused(name: str, content: str, where: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=where):
        list(read_rows(tmp_path / name))


def test_repeated_columns_of_parquet_are_refused(tmp_path: Path) -> None:
    column = pa.array(["a"])
    pq.write_table(pa.Table.from_arrays([column, column], names=["text", "text"]), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="more than one column is called 'text'"):
        list(read_rows(tmp_path / "a.parquet"))


@pytest.mark.parametrize("name", ["test.csv", "test.tsv"])
def test_repeated_columns_of_an_evaluation_are_refused(name: str, tmp_path: Path) -> None:
    delimiter = "," if name.endswith("csv") else "\t"
    (tmp_path / name).write_text(delimiter.join(("text", "label", "text")) + "\n" + delimiter.join("abc") + "\n")
    with pytest.raises(DataError, match="more than one column is called 'text'"):
        list(read_fields(tmp_path / name, Layout({}, header=True, delimiter=None)))


def test_equal_keys_of_different_objects_are_fine(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a", "meta": {"text": "b"}}\n')
    assert [row for _, row in read_rows(tmp_path / "a.jsonl")] == [{"text": "a", "meta": {"text": "b"}}]


@pytest.mark.parametrize("separator", SEPARATORS)
def test_only_a_line_feed_ends_a_line(separator: str, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(f"\ufeffone{separator}two\r\nthree\n".encode())
    assert read_text_lines(path) == _lines(path) == [f"one{separator}two", "three"]
    assert [row["text"] for _, row in read_rows(path)] == [f"one{separator}two", "three"]


def test_invalid_bytes_name_their_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\ntw\xffo\n")
    with pytest.raises(DataError, match="line 2: not UTF-8"):
        read_text_lines(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (
            '{"text": "a"}\n{"text": ' + "9" * 5000 + "}\n",
            r"line 2: Exceeds the limit \(4300 digits\).*Write such a number as a text",
        ),
        ('{"text": "a"}\n' + "[" * 100_000 + "\n", "line 2: nested too deeply"),
    ],
)
def test_what_json_cannot_be_read_has_a_line(content: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=rf"a\.jsonl, {told}"):
        list(read_rows(path))


def test_names_of_parquet_that_are_not_utf8_are_told(tmp_path: Path) -> None:
    pq.write_table(pa.table({"query": ["a"], "pos": [["b"]]}), tmp_path / "a.parquet", store_schema=False)
    content = (tmp_path / "a.parquet").read_bytes()
    for name in (b"query", b"pos", b"list", b"element"):  # of columns, and of what is in a list
        (tmp_path / "b.parquet").write_bytes(content.replace(name, b"\x80" + name[1:]))
        with pytest.raises(DataError, match=r"b\.parquet: not a readable parquet file"):
            list(read_rows(tmp_path / "b.parquet"))


def test_texts_of_parquet_that_are_not_utf8_have_a_row(tmp_path: Path) -> None:
    offsets = pa.py_buffer(b"\0\0\0\0\2\0\0\0\4\0\0\0")
    texts = pa.Array.from_buffers(pa.string(), 2, [None, offsets, pa.py_buffer(b"ok\xff\xfe")])
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    rows = read_rows(tmp_path / "a.parquet")
    assert next(rows) == ("row 1", {"text": "ok"})
    with pytest.raises(DataError, match=r"a\.parquet, row 2: not UTF-8 \(invalid start byte at byte 0 of a text\)"):
        next(rows)


def test_a_time_in_an_unknown_zone_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": ["a"], "time": pa.array([0], pa.timestamp("us", tz="Nowhere/At_All"))}), path)
    with pytest.raises(DataError, match=r"rows\.parquet, row 1: "):
        list(read_rows(path))
