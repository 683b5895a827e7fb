"""No key that bears meaning is ignored in silence: each is read, or refused; every other key is counted."""

import json
import re
from collections.abc import Iterator

import pytest

from tests.engine.small_run import small_run
from unified_lm.cli.script import train
from unified_lm.core.errors import DataError
from unified_lm.data.prompts.encoding import Encoded, PromptEncoder
from unified_lm.data.prompts.templates import get_template
from unified_lm.data.rows.files import record_row
from unified_lm.data.rows.keys import LEARNED_KEYS, ORDINARY, ROW_KEYS, TURN_KEYS, near_miss
from unified_lm.data.rows.parse import FIELDS, RowParser
from unified_lm.data.rows.records import ChatRecord, PairRecord, RecordKind, Text
from unified_lm.data.rows.violations import MeaningfulKeyError, RowError
from unified_lm.models.tiny import tiny_tokenizer

TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
ROWS = {
    RecordKind.PAIR: {"query": "q", "pos": "p"},
    RecordKind.CHAT: {"messages": TURNS},
    RecordKind.TEXT: {"text": "t"},
    RecordKind.PREFERENCE: {"prompt": "p", "completion": "c", "label": 1},
    RecordKind.GROUNDED: {"query": "q", "pos": ["a"], "answers": ["b"]},
}


@pytest.mark.parametrize("kind", RecordKind)
@pytest.mark.parametrize("key", ROW_KEYS)
def test_every_meaningful_key_of_a_row_is_read_or_refused_or_means_nothing_to_its_kind(kind, key):
    parser, row = RowParser(kind), ROWS[kind]
    fields = {name for names in FIELDS[kind].values() for name in names}
    value = 0 if key in ("label", "desirable") and key in fields else "something"
    given = {name: v for name, v in row.items() if name != key and not (key == "desirable" and name == "label")} | {key: value}
    if key in fields:
        assert parser(given) != parser(row), f"{kind} reads '{key}'"
        return
    for empty in (None, "", [], {}):
        assert parser(row | {key: empty}) == parser(row)
    parser.ignored.clear()
    if not any(kind in found.kinds for found in ROW_KEYS[key]):
        assert parser(given) == parser(row)
        assert parser.ignored == {key: 1}
        return
    with pytest.raises(MeaningfulKeyError, match=f"field '{key}': got 'something'"):
        parser(given)
    passing = RowParser(kind, ignore=(key,))
    assert passing(given) == parser(row)
    assert passing.ignored == {key: 1}


@pytest.mark.parametrize("key", ["system", "system_prompt", "input", "context", "history", "tools", "tool_calls", "images"])
@pytest.mark.parametrize("kind", [RecordKind.CHAT, RecordKind.PREFERENCE, RecordKind.GROUNDED])
def test_what_an_answer_depends_on_is_read_or_refused_by_every_kind_with_an_answer(kind, key):
    parser, row = RowParser(kind), ROWS[kind]
    if any(key in names for names in FIELDS[kind].values()):
        assert parser(row | {key: "something"}) != parser(row)
        return
    with pytest.raises(MeaningfulKeyError, match=f"field '{key}': got 'something'"):
        parser(row | {key: "something"})


@pytest.mark.parametrize("key", TURN_KEYS)
def test_every_meaningful_key_of_a_turn_is_refused(key):
    chat = RowParser(RecordKind.CHAT)
    row = {"messages": [TURNS[0], TURNS[1] | {key: ["x"]}]}
    with pytest.raises(MeaningfulKeyError, match=rf"field 'messages\[1\]\.{key}'"):
        chat(row)
    assert chat({"messages": [TURNS[0], TURNS[1] | {key: None}]}) == chat(ROWS[RecordKind.CHAT])
    assert RowParser(RecordKind.CHAT, ignore=(key,))(row) == chat(ROWS[RecordKind.CHAT])


@pytest.mark.parametrize("key", LEARNED_KEYS)
def test_every_key_that_says_what_is_learned_is_read(key):
    chat, learned = RowParser(RecordKind.CHAT), LEARNED_KEYS[key]
    row = {"messages": [*TURNS[:1], TURNS[1] | {key: not learned}, *TURNS[:1], TURNS[1] | {key: int(learned)}]}
    record = chat(row)
    assert record == ChatRecord((("user", "q"), ("assistant", "a")) * 2, unlearned=(1,))
    assert chat(record_row(record)) == record
    with pytest.raises(RowError, match="no answer that is to be learned"):
        chat({"messages": [TURNS[0], TURNS[1] | {key: not learned}]})
    with pytest.raises(RowError, match="expected true or false"):
        chat({"messages": [TURNS[0], TURNS[1] | {key: 0.5}]})


def test_an_answer_with_weight_0_is_read_and_not_learned():
    encoder = PromptEncoder(get_template("grit"), tiny_tokenizer())
    record = RowParser(RecordKind.CHAT)({"messages": [TURNS[0], TURNS[1] | {"weight": 0}, *TURNS]})
    (whole,) = encoder.chat([record.turns], 512)
    (part,) = encoder.chat([record.turns], 512, [record.unlearned])
    assert isinstance(whole, Encoded)
    assert isinstance(part, Encoded)
    assert part.ids.tolist() == whole.ids.tolist()
    assert part.spans == whole.spans[1:]


def test_a_system_text_beside_the_turns_is_the_first_turn():
    chat = RowParser(RecordKind.CHAT)
    assert chat(
        {"system": "s", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    ) == ChatRecord((("system", "s"), ("user", "q"), ("assistant", "a")))
    moved = chat({"system": "s", "messages": [*TURNS[:1], TURNS[1] | {"train": False}, *TURNS]})
    assert moved.unlearned == (2,)
    with pytest.raises(RowError, match="no system text beside a system turn"):
        chat({"system": "s", "messages": [{"role": "system", "content": "t"}, *TURNS]})


def test_the_prompt_of_flag_embedding_is_the_querys_instruction():
    pair = RowParser(RecordKind.PAIR)
    assert pair({"query": "q", "pos": ["p"], "prompt": "Find: "}) == PairRecord(Text("q", "Find"), (Text("p"),))
    assert pair({"query": ["Own", "q"], "pos": ["p"], "prompt": "Find"}).query.instruction == "Own"
    as_query = RowParser(RecordKind.PAIR, {"query": "prompt", "positive": "completion"})
    assert as_query({"prompt": "q", "completion": "p"}) == PairRecord(Text("q"), (Text("p"),))


@pytest.mark.parametrize(
    "name",
    ["negative", "neg", "negatives", "hard_negatives", "hard_negative", "hard_neg", "hard_negs", "negs", "negative_1", "neg1"],
)
def test_negatives_under_all_their_names(name):
    assert RowParser(RecordKind.PAIR)({"query": "q", "pos": "p", name: "n"}).negatives == (Text("n"),)


def misspelled(name: str) -> Iterator[str]:
    """A name in other cases, with other separators, and with every kind of edit at its beginning, middle and end."""
    yield from (name.capitalize(), name.upper(), f" {name}")
    if "_" in name:
        yield from (name.replace("_", "-"), name.replace("_", " "), name.title().replace("_", ""))
    if len(name) >= 5:
        for at in (0, len(name) // 2, len(name) - 1):
            yield from (name[:at] + name[at + 1 :], name[:at] + "x" + name[at:], name[:at] + "x" + name[at + 1 :])
        for at in (0, len(name) // 2):
            yield name[:at] + name[at : at + 2][::-1] + name[at + 2 :]


KNOWN = {*ORDINARY, *ROW_KEYS, *(name for fields in FIELDS.values() for names in fields.values() for name in names)}


@pytest.mark.parametrize("kind", RecordKind)
def test_every_near_miss_of_a_key_that_bears_meaning_is_refused(kind):
    parser, row = RowParser(kind), ROWS[kind]
    keys = [name for name, found in ROW_KEYS.items() if any(kind in key.kinds for key in found)]
    assert len(keys) >= 6
    for key in keys:
        for name in set(misspelled(key)) - KNOWN:
            for value in (0, "something"):
                with pytest.raises(MeaningfulKeyError, match=re.escape(f"field '{name}': got {value!r}")):
                    parser(row | {name: value})
            assert parser(row | {name: ""}) == parser(row | {name: None}) == parser(row)
            assert RowParser(kind, ignore=(name,))(row | {name: 0}) == parser(row)
            if any("1" in found.harmless for found in ROW_KEYS[key] if kind in found.kinds):
                assert parser(row | {name: 1}) == parser(row)


@pytest.mark.parametrize("kind", RecordKind)
def test_every_near_miss_of_a_field_is_refused_also_beside_the_field(kind):
    parser, row = RowParser(kind), ROWS[kind]
    alternatives = {"conversations", "text", "prompt", "completion"} if kind is RecordKind.CHAT else set()
    for field, names in FIELDS[kind].items():
        for name in {wrong for right in names for wrong in misspelled(right)} - KNOWN:
            if field in alternatives:  # of turns that are there: neither these fields nor their near misses are looked for
                assert parser(row | {name: "x"}) == parser(row | {field: "x"}) == parser(row)
                continue
            with pytest.raises(MeaningfulKeyError, match=re.escape(f"field '{name}': got 'x'")):
                parser(row | {name: "x"})


@pytest.mark.parametrize(
    "name",
    [
        "Neg_1",
        "negatve_2",
        "negatives_1",
        "negs_1",
        "hard_negs_2",
        "Negs",
        "hard-negative-1",
        "positives_2",
        "Pos2",
        "positive_2",
    ],
)
def test_near_misses_of_numbered_columns_are_refused(name):
    with pytest.raises(MeaningfulKeyError, match=f"field '{name}'"):
        RowParser(RecordKind.PAIR)(ROWS[RecordKind.PAIR] | {name: "x"})


def test_near_misses_of_keys_of_turns_are_refused():
    with pytest.raises(MeaningfulKeyError, match="'weight'"):
        RowParser(RecordKind.CHAT)({"messages": [TURNS[0], TURNS[1] | {"wieght": 0}]})


@pytest.mark.parametrize("kind", RecordKind)
def test_words_and_names_that_resemble_a_key_are_not_refused(kind):
    parser = RowParser(kind)
    ordinary = ("id", "_id", "idx", "index", "title", "source", "lang", "language", "url", "dataset", "type", "topic", "tags")
    for name in (*ordinary, *ORDINARY, "query_id", "prompt_id", "pos_scores", "token_count"):
        assert parser(ROWS[kind] | {name: 0}) == parser(ROWS[kind])
        assert parser.ignored[name] == 1


def test_a_column_beside_one_that_was_named_is_no_near_miss():
    named = RowParser(RecordKind.PAIR, {"query": "sentence1", "positive": "label"})
    assert named({"sentence1": "q", "label": "p", "sentence2": "x", "query": "y"}) == PairRecord(Text("q"), (Text("p"),))
    with pytest.raises(MeaningfulKeyError, match="'other_texts'"):
        RowParser(RecordKind.PAIR, {"negative": "other_texts"})({"query": "q", "pos": "p", "other_text": "x"})


def test_ordinary_keys_are_counted():
    pair = RowParser(RecordKind.PAIR)
    for number in range(3):
        pair({"query": "q", "pos": "p", "id": number, "pos_scores": [0.1], "query_id": None})
    assert pair.ignored == {"id": 3, "pos_scores": 3}
    chat = RowParser(RecordKind.CHAT)
    chat({"messages": [TURNS[0] | {"name": "x"}, TURNS[1]], "dataset": "d"})
    assert chat.ignored == {"messages[].name": 1, "dataset": 1}


def test_a_column_is_read_or_ignored_not_both():
    with pytest.raises(DataError, match="'label', which columns says is read"):
        RowParser(RecordKind.PAIR, {"query": "label"}, ignore=("label",))


def test_near_miss():
    known = ("negatives", "neg")
    assert [near_miss(n, known) for n in ("negatves", "Neg", "engatives", "negatives", "negs", "nagetives")] == [
        "negatives",
        "neg",
        "negatives",
        None,
        None,
        None,
    ]


def test_a_run_says_which_keys_it_does_not_read(tmp_path, capsys):
    """On the screen, whatever the level of logging; with a table and with text that is read along."""
    arguments = small_run(tmp_path, tmp_path / "run")
    rows = [json.loads(line) | {"id": i} for i, line in enumerate((tmp_path / "chats.jsonl").read_text().splitlines())]
    rows[3] |= {"note": "odd", "topic": None}
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": f"text {i}", "url": "u"}) + "\n" for i in range(40)))
    train(
        [
            *arguments,
            f"streams.text={{format: text, objective: {{name: next_token}}, sources: 'stream:{tmp_path}/text.jsonl'}}",
            "streams.text.batch_size=2",
            f"streams.text.sources=stream:{tmp_path}/text.jsonl",
            "streams.text.max_tokens=32",
            "max_steps=1",
        ]
    )
    told = capsys.readouterr().err
    assert "embedding: pairs.jsonl, 60 rows\n" in told
    assert "generation: chats.jsonl, 50 rows; not read: id (50), note (1)\n" in told
    assert re.search(r"text: text\.jsonl, rows are read along; not read: url \(\d+\)\n", told)
