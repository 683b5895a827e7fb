"""No key that bears meaning is ignored in silence: each is read, or refused; every other key is counted."""

import pytest

from unified_lm.core.errors import DataError
from unified_lm.data.prompts.encoding import Encoded, PromptEncoder
from unified_lm.data.prompts.templates import get_template
from unified_lm.data.rows.files import record_row
from unified_lm.data.rows.keys import LEARNED_KEYS, ROW_KEYS, TURN_KEYS, near_miss
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


@pytest.mark.parametrize("name", ["negative", "neg", "negatives", "hard_negatives", "hard_negative", "negative_1", "neg1"])
def test_negatives_under_all_their_names(name):
    assert RowParser(RecordKind.PAIR)({"query": "q", "pos": "p", name: "n"}).negatives == (Text("n"),)


@pytest.mark.parametrize("name", ["Negatives", "negativs", "hard-negatives", "positive_2", "instruciton"])
def test_near_misses_are_refused(name):
    with pytest.raises(MeaningfulKeyError, match=f"field '{name}'"):
        RowParser(RecordKind.PAIR)({"query": "q", "pos": "p", name: "x"})
    with pytest.raises(MeaningfulKeyError, match="'weight'"):
        RowParser(RecordKind.CHAT)({"messages": [TURNS[0], TURNS[1] | {"wieght": 0}]})


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
