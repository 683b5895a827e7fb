"""Files of rows come whole or not at all, and give back the records that went in."""

from pathlib import Path

import pytest

from unified_lm.config.schema import SourceConfig
from unified_lm.core.errors import DataError
from unified_lm.core.outputs import RECORD
from unified_lm.data.rows.files import RowWriter, output_names, record_row, write_report, write_rows
from unified_lm.data.rows.readers import read_rows
from unified_lm.data.rows.records import (
    ChatRecord,
    GroundedRecord,
    PairRecord,
    PreferenceRecord,
    Record,
    RecordKind,
    Text,
    TextRecord,
)
from unified_lm.data.sources import open_source

RECORDS: dict[RecordKind, Record] = {
    RecordKind.PAIR: PairRecord(Text("q", "Find it"), (Text("a"), Text("b", "i")), (Text("n\nm"),)),
    RecordKind.CHAT: ChatRecord((("system", "s"), ("user", "u"), ("assistant", "a"))),
    RecordKind.TEXT: TextRecord("some text — naïve 日本"),
    RecordKind.PREFERENCE: PreferenceRecord("p", "c", False),
    RecordKind.GROUNDED: GroundedRecord(PairRecord(Text("q"), (Text("a", "i"),), (Text("n"), Text("m"))), ("x", "y")),
}


@pytest.mark.parametrize("kind", list(RecordKind))
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_records_come_back(kind: RecordKind, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unified_lm.data.rows.files._ROWS_PER_GROUP", 2)
    path = tmp_path / "deep" / f"rows{suffix}"
    assert write_rows(path, [record_row(RECORDS[kind])] * 5) == 5
    assert list(open_source(SourceConfig(path=str(path)), kind, 0)) == [RECORDS[kind]] * 5


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_rows(path, [{"text": "before"}])
    with pytest.raises(DataError, match="row 2: Object of type bytes"):
        write_rows(path, [{"text": "a"}, {"text": b"b"}])
    assert [file.name for file in tmp_path.iterdir() if file.name not in ("cache", RECORD)] == ["rows.jsonl"]
    assert path.read_text() == '{"text": "before"}\n'


def test_other_endings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"ends in \.jsonl, \.parquet, \.txt"):
        RowWriter(tmp_path / "rows.csv")
    with pytest.raises(DataError, match=r"ends in \.yaml"):
        write_report(tmp_path / "report.json", {})


@pytest.mark.parametrize("distance", [1, 5000])
def test_parquet_has_the_columns_of_all_rows(distance: int, tmp_path: Path) -> None:
    """Wherever a column appears first, in the first group of rows or in a later one."""
    rows = (
        [{"query": "a", "pos": ["b"]}] * distance
        + [{"query": "c", "pos": ["d"], "neg": ["e"], "score": 1.5}]
        + [{"neg": ["f"]}]
    )
    assert write_rows(tmp_path / "rows.parquet", rows) == distance + 2
    found = [row for _, row in read_rows(tmp_path / "rows.parquet")]
    names = ("query", "pos", "neg", "score")
    assert found == [{name: row.get(name) for name in names} for row in rows]


def test_outputs_of_a_folder_do_not_meet() -> None:
    assert output_names(["s1/a.jsonl.gz", "s2/a.jsonl", "b.v2.csv"], ".jsonl") == [
        Path("s1/a.jsonl"),
        Path("s2/a.jsonl"),
        Path("b.v2.jsonl"),
    ]
    with pytest.raises(DataError, match=r"a\.jsonl and a\.csv would both be written to a\.jsonl"):
        output_names(["a.jsonl", "a.csv"], ".jsonl")


def test_lines_come_back(tmp_path: Path) -> None:
    texts = ["a text", "two  spaces and\ta tab", "a\rb", "a\u2028b", "a\x0cb", "naïve 日本", "\ufeffa"]
    assert write_rows(tmp_path / "rows.txt", [{"text": text} for text in texts]) == len(texts)
    assert [row for _, row in read_rows(tmp_path / "rows.txt")] == [{"text": text} for text in texts]


@pytest.mark.parametrize(
    "row",
    [
        *(record_row(record) for kind, record in RECORDS.items() if kind is not RecordKind.TEXT),
        *({"text": text} for text in (None, 1, ["a"], "", " ", "a\nb", " a", "a\n", "a\r")),
        {"text": "a", "id": 1},
        {},
    ],
)
def test_a_row_that_is_no_line_goes_to_no_text_file(row: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"row 2 has .*a \.txt file holds texts of one line.*Name a \.jsonl or \.parquet file"):
        write_rows(tmp_path / "rows.txt", [{"text": "before"}, row])
    assert list(tmp_path.iterdir()) == []
