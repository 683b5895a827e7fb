"""A column that `columns` names is read, or the source is refused: every field of every kind of record."""

import json
from pathlib import Path

import pytest

from tests.data.rows.test_keys import ROWS, TURNS
from unified_lm.config.streams import RecordKind, SourceConfig
from unified_lm.core.errors import DataError
from unified_lm.data.rows.parse import FIELDS, RowParser
from unified_lm.data.rows.violations import RowError
from unified_lm.data.sources import RecordSource, open_source, open_sources

OTHER_CHATS = {
    "conversations": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    "text": {"text": ["q", "a"]},
    "prompt": {"prompt": "q", "completion": "a"},
    "completion": {"prompt": "q", "completion": "a"},
}
CASES = [(kind, field) for kind in RecordKind for field in FIELDS[kind]]


def rows_with(kind: RecordKind, field: str) -> tuple[dict, dict]:
    """A row that has the field, or could have it, under its own name; and the same row with it under "elsewhere"."""
    row = OTHER_CHATS.get(field, ROWS[kind]) if kind is RecordKind.CHAT else ROWS[kind]
    own = next((name for name in FIELDS[kind][field] if name in row), None)
    moved = {name: value for name, value in row.items() if name != own}
    return row, moved | {"elsewhere": "x" if own is None else row[own]}


def opened(tmp_path: Path, kind: RecordKind, rows: list[dict], columns: dict[str, str], **settings: str) -> RecordSource:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return open_source(SourceConfig(path=str(path), columns=columns, **settings), kind, 0)  # type: ignore[arg-type]


@pytest.mark.parametrize(("kind", "field"), CASES)
def test_a_column_that_no_row_has_is_refused(kind: RecordKind, field: str, tmp_path: Path) -> None:
    row, _ = rows_with(kind, field)
    with pytest.raises(
        DataError, match="messages" if field in ("conversations", "text") and kind is RecordKind.CHAT else "elsewhere"
    ):
        opened(tmp_path, kind, [row] * 3, {field: "elsewhere"})
    if kind is not RecordKind.CHAT or field in ("prompt", "completion"):
        return
    with pytest.raises(DataError, match="'elsewhere' to read"):
        opened(tmp_path, kind, [OTHER_CHATS["prompt"]] * 3, {field: "elsewhere"})


@pytest.mark.parametrize(("kind", "field"), CASES)
def test_a_column_that_some_row_has_is_read(kind: RecordKind, field: str, tmp_path: Path) -> None:
    row, moved = rows_with(kind, field)
    expected = RowParser(kind, {field: "elsewhere"})(moved)
    assert opened(tmp_path, kind, [moved] * 2, {field: "elsewhere"})[1] == expected
    optional = field in ("negative", "instruction", "system")
    if optional:
        source = opened(tmp_path, kind, [row, moved, row], {field: "elsewhere"})
        assert source[1] == expected != source[0]
        assert opened(tmp_path, kind, [row, row | {"elsewhere": None}], {field: "elsewhere"})[1] == RowParser(kind)(row)


def test_a_source_is_its_files_together(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"query": "q", "pos": "p"}\n')
    (folder / "b.jsonl").write_text('{"query": "q", "pos": "p", "worse": "n"}\n')
    config = SourceConfig(path=str(folder), columns={"negative": "worse"})
    assert [source.ignored for source in open_sources(config, RecordKind.PAIR, 0)] == [{}, {}]
    (folder / "b.jsonl").write_text('{"query": "q", "pos": "p", "worst": "n", "id": 3}\n')
    for opener in (open_source, open_sources):
        with pytest.raises(
            DataError, match=r"rows: no usable row has 'worse'.*columns=\{negative: worse\}.*Did you mean 'worst'"
        ):
            opener(SourceConfig(path=str(folder), columns={"negative": "worse"}, ignore=("worst",)), RecordKind.PAIR, 0)


def test_a_column_of_rows_that_are_left_out_is_no_column(tmp_path: Path) -> None:
    rows = [{"query": "q", "pos": "p"}, {"query": " ", "pos": "p", "worse": "n"}]
    with pytest.raises(DataError, match="no usable row has 'worse'"):
        opened(tmp_path, RecordKind.PAIR, rows, {"negative": "worse"}, on_empty="skip")


def test_a_column_beside_the_turns_is_not_read_and_no_row_has_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no usable row has 'log' to read.*\{text: log\}"):
        opened(tmp_path, RecordKind.CHAT, [{"messages": TURNS, "log": ["q", "a"]}], {"text": "log"})


def test_a_numbered_column_that_is_named_is_read_once() -> None:
    row = {"query": "q", "pos": "p", "neg_1": "n", "neg_2": "m"}
    assert [text.text for text in RowParser(RecordKind.PAIR, {"negative": "neg_1"})(row).negatives] == ["n", "m"]  # type: ignore[union-attr]


@pytest.mark.parametrize("field", FIELDS[RecordKind.TEXT])
def test_text_that_is_read_along_has_no_field_that_rows_may_lack(field: str) -> None:
    """So that the first row without the column ends the run: nobody reads all rows before."""
    with pytest.raises(RowError, match="elsewhere"):
        RowParser(RecordKind.TEXT, {field: "elsewhere"})({"text": "t"})
