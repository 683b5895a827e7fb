"""Every setting of a source, with every kind of source: it changes what is read, or it is refused."""

import json
from dataclasses import asdict, fields
from pathlib import Path

import datasets
import pytest

from unified_lm.config.streams import RecordKind, SourceConfig
from unified_lm.core.errors import DataError
from unified_lm.data import sources as sources_module
from unified_lm.data.sources import INSTRUCTED, open_source

ROWS = [{"query": f"q{i}", "positive": f"p{i}", "negative": f"n{i}", "other": f"o{i}"} for i in range(8)]
EMPTY = [*ROWS, {"query": "q", "positive": " ", "negative": "n"}]
LABELED = [row | {"label": 0} for row in ROWS]

NOT_OF_ROWS = {"weight": "how often rows are drawn, not which; positive for all kinds (test_streams)"}
"""Settings that act elsewhere."""
SETTINGS = {
    "subset": "sentences",
    "revision": "abc",
    "data_dir": "code",
    "split": "test",
    "streaming": True,
    "limit": 2,
    "instruction": "Find",
    "document_instruction": "Passage",
    "columns": {"query": "other"},
    "ignore": ("label",),
    "on_empty": "skip",
    "on_unusable": "skip",
    "weight": 2.0,
}
"""A value of each that differs from the default."""
CONTENT = {"on_empty": EMPTY, "ignore": LABELED, "on_unusable": LABELED[:1] + ROWS[1:]}
"""Rows to which a setting matters; `ROWS` for the others."""
REFUSED = {
    ("path", "subset"),
    ("path", "revision"),
    ("path", "data_dir"),
    ("folder", "data_dir"),
    ("builtin", "data_dir"),
    ("path", "streaming"),
    ("folder", "subset"),
    ("folder", "revision"),
    ("folder", "streaming"),
    ("builtin", "revision"),
    ("builtin", "streaming"),
}
KINDS = ("path", "folder", "hub", "builtin")


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("UNIFIED_LM_CACHE", str(tmp_path / "cache"))

    def write(path: Path, rows: list) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    def make(kind: str, rows: list) -> SourceConfig:
        if kind == "path":
            return SourceConfig(path=str(write(tmp_path / "rows.jsonl", rows)))
        if kind == "folder":
            for name, part in (("train", rows), ("test", rows[::-1])):
                write(tmp_path / "folder" / f"{name}-00000-of-00001.jsonl", part)
            return SourceConfig(path=str(tmp_path / "folder"), split="train")

        def selected(*parts: object) -> list:
            """Other rows for other parts of a data set."""
            changed = [part for part in parts if part not in (None, "train", False)]
            return [row | {"query": row["query"] + "".join(map(str, changed))} for row in rows]

        def load(name, subset, *, split, revision, streaming, data_dir=None):
            found = datasets.Dataset.from_list(selected(subset, split, revision, data_dir))
            return iter(found) if streaming else found

        monkeypatch.setattr(datasets, "load_dataset", load)
        monkeypatch.setattr(
            sources_module,
            "pydocs_file",
            lambda subset, split, kind: ("pydocs", write(tmp_path / f"{subset}-{split}.jsonl", selected(subset, split))),
        )
        return SourceConfig(hub="a/b") if kind == "hub" else SourceConfig(builtin="pydocs")

    return make


def read(config: SourceConfig) -> object:
    """What is read, or why not."""
    try:
        source = open_source(config, RecordKind.PAIR, 0)
    except DataError as error:
        return f"refused: {error}"
    return list(source), source.rejected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "field", [field.name for field in fields(SourceConfig) if field.name not in ("path", "hub", "builtin")]
)
def test_every_setting_changes_what_is_read_or_is_refused(make, kind, field):
    assert field in SETTINGS, f"a new setting of sources: say what it changes, and give it a value in SETTINGS ({field})"
    base = make(kind, CONTENT.get(field, ROWS))
    given = {name: getattr(base, name) for name in (f.name for f in fields(base))} | {field: SETTINGS[field]}
    if field == "streaming":  # needs a limit; reads the first rows where the whole data set gives a random choice
        base = SourceConfig(**asdict(base) | {"limit": 3})
        given["limit"] = 3
    before, after = read(base), read(SourceConfig(**given))
    refused = isinstance(after, str)
    if field in NOT_OF_ROWS:
        assert after == before
    elif (kind, field) in REFUSED or (kind, field) == ("path", "split"):
        assert refused, after
        assert field in after
        if (kind, field) in REFUSED:
            assert any(field in problem for problem in SourceConfig(**given).problems("source"))
    else:
        assert not refused, after
        assert after != before


@pytest.mark.parametrize("field", [*SETTINGS])
def test_the_values_differ_from_the_defaults(field):
    assert getattr(SourceConfig(), field) != SETTINGS[field]


@pytest.mark.parametrize("kind", [kind for kind in RecordKind if kind not in INSTRUCTED])
def test_instructions_of_other_rows_than_pairs_are_refused(tmp_path, kind):
    for field in ("instruction", "document_instruction"):
        with pytest.raises(DataError, match="only pairs and grounded rows have them"):
            open_source(SourceConfig(path=str(tmp_path), **{field: "x"}), kind, 0)


def test_unusable_rows_are_counted_by_reason(tmp_path):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    called = [turns[0], {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}, *turns]
    rows = [turns, called, [*turns, {"role": "tool", "content": "4"}], [turns[0], {"role": "assistant", "content": ""}]]
    rows += [[turns[0], {"role": "assistant", "content": "\ud83d"}], [turns[0], {"role": "assistant", "content": 5}]] * 2
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    source = open_source(SourceConfig(path=str(path), on_unusable="skip"), RecordKind.CHAT, 0)
    assert len(source) == 1
    assert sorted(source.rejected.values()) == [1, 1, 1, 2, 2]
    assert source.rejected["messages[*].tool_calls: a key that bears meaning and is not read"] == 1
    assert source.rejected["messages[*].content: not valid Unicode text"] == 2
    with pytest.raises(DataError, match="line 2, field 'messages"):
        open_source(SourceConfig(path=str(path), on_empty="skip"), RecordKind.CHAT, 0)


@pytest.mark.parametrize("key", [item.name for item in fields(SourceConfig) if item.name != "path"])
def test_half_a_surrogate_in_a_setting_is_refused(tmp_path, key):
    """Of a source that is made in Python; a recipe's settings are checked as they are read."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"query": "q", "pos": ["p"]}\n')
    for text in ("\ud800", {"query": "\ud800"}, ("\ud800",)):
        source = SourceConfig(**{"path": str(path), key: text})
        with pytest.raises(DataError, match=rf"{key} of source .*rows.jsonl holds bytes that are not UTF-8|one of path, hub"):
            open_source(source, RecordKind.PAIR, 0)


def test_half_a_surrogate_in_an_instruction_is_a_row_to_refuse_or_skip(tmp_path):
    rows = [
        {"query": ["Find \ud83d", "q"], "pos": ["p"]},
        {"query": "q", "instruction": "\udfff", "pos": ["p"]},
        {"query": "q", "pos": ["p"]},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = open_source(SourceConfig(path=str(path), on_unusable="skip"), RecordKind.PAIR, 0)
    assert len(source) == 1
    assert source.rejected == {"query[*]: not valid Unicode text": 1, "instruction: not valid Unicode text": 1}
    with pytest.raises(DataError, match=r"line 1, field 'query\[0\]': .*half of a surrogate pair"):
        open_source(SourceConfig(path=str(path)), RecordKind.PAIR, 0)


def test_splits_of_a_folder(make, tmp_path):
    config = make("folder", ROWS)
    folder = tmp_path / "folder"

    def queries(split: str | None) -> list[str]:
        return [record.query.text for record in open_source(SourceConfig(path=str(folder), split=split), RecordKind.PAIR, 0)]

    assert config.split == "train"
    train = [row["query"] for row in ROWS]
    assert queries("train") == queries("training") == train
    assert queries("test") == queries("eval") == train[::-1]
    assert queries("all") == train[::-1] + train  # in sorted order
    with pytest.raises(DataError, match=r"several splits: test \(1\), train \(1\)\. Say which with split=train"):
        queries(None)
    with pytest.raises(DataError, match=r"no file of the split 'dev': found test \(1\), train \(1\)"):
        queries("dev")
    (folder / "test-00000-of-00001.jsonl").unlink()
    assert queries(None) == train
    (folder / "train-00000-of-00001.jsonl").rename(folder / "attestation.jsonl")  # no word of a split, though one is in it
    assert queries(None) == queries("train") == train
    with pytest.raises(DataError, match="found no file that names a split"):
        queries("test")
