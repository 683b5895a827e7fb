"""Rows in every accepted shape, and the message for every broken one."""

import json
import re
from pathlib import Path

import pytest

from unified_lm.core.errors import DataError
from unified_lm.data.rows.parse import RowParser
from unified_lm.data.rows.records import ChatRecord, PairRecord, PreferenceRecord, RecordKind, Text, TextRecord
from unified_lm.data.rows.violations import EmptyTextError, RowError

pair = RowParser(RecordKind.PAIR)
chat = RowParser(RecordKind.CHAT)
text = RowParser(RecordKind.TEXT)
preference = RowParser(RecordKind.PREFERENCE)
grounded = RowParser(RecordKind.GROUNDED)
ANSWERED = ChatRecord((("user", "hi"), ("assistant", "hello")))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        pytest.param(
            {"query": ["Find: ", "q"], "pos": [["", "p"]], "neg": [["Doc\n", "n1"], "n2"]},
            PairRecord(Text("q", "Find"), (Text("p"),), (Text("n1", "Doc"), Text("n2"))),
            id="gritlm",
        ),
        pytest.param({"query": "q", "pos": ["p1", "p2"]}, PairRecord(Text("q"), (Text("p1"), Text("p2"))), id="strings"),
        pytest.param(
            {"query": "q", "positive": "p", "negative": "n"}, PairRecord(Text("q"), (Text("p"),), (Text("n"),)), id="echo"
        ),
        pytest.param(
            {"anchor": "q", "positive": "p", "negative_10": "n10", "negative_2": "n2", "negative_3": None, "score": 1},
            PairRecord(Text("q"), (Text("p"),), (Text("n2"), Text("n10"))),
            id="sentence-transformers",
        ),
        pytest.param({"query": " q ", "pos": "p", "neg": None}, PairRecord(Text(" q "), (Text("p"),)), id="null-negatives"),
    ],
)
def test_pairs(row: dict, expected: PairRecord) -> None:
    assert pair(row) == expected


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}, ANSWERED),
        ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}, ANSWERED),
        ({"text": ["hi", "hello"]}, ANSWERED),
        ({"prompt": "hi", "completion": "hello"}, ANSWERED),
        (
            {
                "messages": [
                    {"role": "system", "content": ""},
                    {"role": "user", "content": "hi"},
                    {"role": "assistant", "content": "hello"},
                ]
            },
            ANSWERED,
        ),
    ],
    ids=["messages", "sharegpt", "gritlm", "prompt", "empty-system"],
)
def test_chats(row: dict, expected: ChatRecord) -> None:
    assert chat(row) == expected


@pytest.mark.parametrize(("label", "desirable"), [(True, True), (0, False), ("True", True), ("0", False)])
def test_preferences(label: object, desirable: bool) -> None:
    row = {"prompt": "p", "completion": "c", "label": label}
    assert preference(row) == PreferenceRecord("p", "c", desirable)


def test_columns_rename_fields_under_any_of_their_names() -> None:
    for field in ("query", "anchor"):
        parser = RowParser(RecordKind.PAIR, {field: "question", "pos": "passage"})
        assert parser({"question": "q", "passage": "p"}) == PairRecord(Text("q"), (Text("p"),))
    assert RowParser(RecordKind.TEXT, {"text": "body"})({"body": "b", "text": "not this"}) == TextRecord("b")
    alpaca = RowParser(RecordKind.CHAT, {"prompt": "instruction", "completion": "output"})
    assert alpaca({"instruction": "hi", "output": "hello"}) == ANSWERED


def test_numbered_negatives_come_by_number() -> None:
    row = {"query": "q", "pos": "p", "neg_10": "c", f"neg_{'9' * 5000}": "d", "neg_2": "b", "neg_01": "a"}
    assert [text.text for text in pair(row).negatives] == ["a", "b", "c", "d"]


def test_names_of_ignored_keys_can_be_written() -> None:
    parser = RowParser(RecordKind.CHAT)
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello", "b\ud800": 1}]
    parser({"messages": turns, "a\ud800": 1})
    assert parser.ignored == {"a\\ud800": 1, "messages[].b\\ud800": 1}


def test_columns_with_an_unknown_field() -> None:
    with pytest.raises(DataError, match=r"columns: a pair row has no field 'querry'\. Did you mean 'query'\?"):
        RowParser(RecordKind.PAIR, {"querry": "question"})


@pytest.mark.parametrize(
    ("parser", "row", "message"),
    [
        (pair, ["q", "p"], r"field '\(row\)': got \['q', 'p'\] \(list\), expected an object with named columns"),
        (pair, {"qeury": "q", "pos": "p"}, r"field 'query': got no such column \(nor 'anchor'\) among \[qeury, pos\], "),
        (
            pair,
            {"qeury": "q", "pos": "p"},
            r"expected a text or \[instruction, text\]\. Did you mean 'qeury'\?.*columns={query: NAME}",
        ),
        (pair, {"query": 7, "pos": "p"}, r"field 'query': got 7 \(int\), expected a text or \[instruction, text\]"),
        (pair, {"query": ["a", "b", "c"], "pos": "p"}, r"field 'query': got \['a', 'b', 'c'\] \(list\)"),
        (pair, {"query": "q", "pos": [["i", "t"], 3]}, r"field 'pos\[1\]': got 3 \(int\)"),
        (pair, {"query": "q", "pos": []}, r"field 'pos': got an empty list, expected at least one text"),
        (pair, {"query": "q", "pos": "p", "neg": 3}, r"field 'neg': got 3 \(int\), expected a text, or a list"),
        (pair, {"query": "q", "pos": "p", "positive": "p"}, r"got columns 'positive' and 'pos', expected only one of them"),
        (pair, {"query": "half \ud800", "pos": "p"}, r"field 'query': got half of a surrogate pair at character 5"),
        (
            chat,
            {"text": "running"},
            r"field 'text': got 'running' \(str\), expected a list \[user, assistant, \.\.\.\].*format=text",
        ),
        (chat, {"message": []}, r"field 'messages': got no such column among \[message\], .*Did you mean 'message'\?"),
        (chat, {"messages": "hi"}, r"field 'messages': got 'hi' \(str\), expected a list of {role, content}"),
        (
            chat,
            {"messages": [{"role": "bot", "content": "x"}]},
            r"field 'messages\[0\]\.role': got 'bot' \(str\), expected one of",
        ),
        (chat, {"messages": [{"role": "user"}]}, r"field 'messages\[0\]\.content': got only role, expected a text"),
        (chat, {"messages": [{"role": "user", "content": 1}]}, r"field 'messages\[0\]\.content': got 1 \(int\)"),
        (chat, {"messages": [{"role": "user", "content": "x"}]}, r"got 1 turns and no assistant turn, expected at least one"),
        (chat, {"prompt": "x"}, r"field 'completion': got no such column among \[prompt\]"),
        (text, {"text": ["a", "b"]}, r"field 'text': got \['a', 'b'\] \(list\), expected a text.*format=chat"),
        (text, {"sentence": "a"}, r"field 'text': got no such column among \[sentence\]"),
        (
            preference,
            {"prompt": "p", "completion": "c", "label": "good"},
            r"field 'label': got 'good' \(str\), expected true or false",
        ),
        (preference, {"prompt": "p", "completion": "c", "label": 2}, r"field 'label': got 2 \(int\)"),
        (preference, {"prompt": "p", "completion": "c", "label": None}, r"field 'label': got null"),
    ],
)
def test_broken_rows(parser: RowParser, row: object, message: str) -> None:
    with pytest.raises(RowError, match=message):
        parser(row)


@pytest.mark.parametrize(
    ("parser", "row", "field", "reason"),
    [
        (pair, {"query": " \n", "pos": "p"}, "query", "empty query after stripping"),
        (pair, {"query": ["i", ""], "pos": "p"}, r"query\[1\]", "empty query[*] after stripping"),
        (pair, {"query": "q", "pos": ["p", "", ""]}, r"pos\[1\]", "empty pos[*] after stripping"),
        (pair, {"query": None, "pos": "p"}, "query", "empty query after stripping"),
        (chat, {"text": ["hi", " "]}, r"text\[1\]", "empty text[*] after stripping"),
        (text, {"text": ""}, "text", "empty text after stripping"),
    ],
)
def test_empty_texts(parser: RowParser, row: object, field: str, reason: str) -> None:
    with pytest.raises(
        EmptyTextError, match=f"field '{field}': got .*, expected text with something besides whitespace"
    ) as caught:
        parser(row)
    assert caught.value.reason == reason


@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_a_turn_without_content_is_no_empty_text(column: str) -> None:
    """Chats write turns so whose content is elsewhere; an empty cell of a table is an empty text (above)."""
    role, content = ("role", "content") if column == "messages" else ("from", "value")
    turns = [{role: "user", content: "q"}, {role: "assistant", content: None}]
    with pytest.raises(RowError, match=rf"field '{column}\[1\]\.{content}': got null, expected a text") as caught:
        chat({column: turns})
    assert not isinstance(caught.value, EmptyTextError)
    turns[1][content] = " "
    with pytest.raises(EmptyTextError):
        chat({column: turns})


def test_long_values_are_shortened_in_messages() -> None:
    with pytest.raises(RowError) as caught:
        text({"text": list(range(10_000))})
    assert len(str(caught.value)) < 300


def test_the_examples_of_the_documentation_parse() -> None:
    page = (Path(__file__).parents[3] / "docs" / "data-formats.md").read_text(encoding="utf-8")
    kinds = {"Pairs": pair, "Chats": chat, "Text": text, "Preferences": preference, "Questions with documents": grounded}
    parsed = 0
    for section in page.split("\n## ")[1:]:
        parser = kinds.get(section.partition("\n")[0])
        for block in re.findall(r"```json\n(.*?)```", section, re.DOTALL):
            assert parser is not None
            parsed += len([parser(json.loads(line)) for line in block.splitlines()])
    assert parsed == 15
