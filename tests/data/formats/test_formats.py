"""Records become samples with the right slots, spans, labels and masks."""

from dataclasses import replace

import numpy as np
import pytest

from tests.data.fake_source import FakeSource, chats, pairs, stream_config, texts
from tests.data.prompts.tokenizers_for_tests import metaspace
from unified_lm.batch import IGNORE, MISSING, Sample
from unified_lm.config.objectives import EmbeddingObjectiveConfig
from unified_lm.config.parts import find_description
from unified_lm.config.streams import SourceConfig, StreamConfig
from unified_lm.core.errors import ConfigError, DataError
from unified_lm.data.formats import FORMATS, MaskingConfig
from unified_lm.data.formats.base import hash_text
from unified_lm.data.formats.embedded_config import PairsStream
from unified_lm.data.rows.records import ChatRecord, PairRecord, Record, Text, TextRecord
from unified_lm.data.streams import TableStream
from unified_lm.models.tiny import tiny_tokenizer
from unified_lm.objectives import ContrastiveConfig

TOKENIZER = tiny_tokenizer()


def make_stream(records: list[Record], format: str, tokenizer=TOKENIZER, **settings) -> TableStream:
    return TableStream("s", stream_config(format, **settings), [FakeSource(records)], tokenizer, seed=0)


def decode(sample: Sample, span: tuple[int, int] | None = None) -> str:
    start, stop = span or (0, len(sample))
    return TOKENIZER.decode(sample.input_ids[start:stop])


def test_pairs_have_slots_spans_and_one_text_per_role():
    stream = make_stream(pairs(5, negatives=3), "pairs", attention="bidirectional", num_hard_negatives=2)
    samples = stream.draw(5)
    assert [s.slot for s in samples] == [0, 1, 2, 3] * 5
    assert [s.group for s in samples] == [g for g in range(5) for _ in range(4)]
    for group in range(5):
        query, positive, *negatives = (decode(s, s.pool) for s in samples if s.group == group)
        number = query.removeprefix("query ")
        assert positive.startswith(f"document {number} ".strip())
        assert len(set(negatives)) == 2
        assert all(text.startswith(f"negative {number}.") for text in negatives)
    assert decode(samples[0]) == f"<s><|user|>\nFind it\n<|embed|>\n{decode(samples[0], samples[0].pool)}"
    assert decode(samples[1]).startswith("<s><|embed|>\ndocument")
    assert all(s.bidirectional == (0, len(s)) and s.labels is None for s in samples)
    assert [s.text_id for s in samples[:1]] == [hash_text(decode(samples[0], samples[0].pool))]


def test_causal_pairs_have_an_empty_span():
    assert {s.bidirectional for s in make_stream(pairs(2), "pairs", attention="causal").draw(2)} == {(0, 0)}


def test_positives_are_drawn_at_random():
    record = PairRecord(Text("q"), tuple(Text(f"p{i}") for i in range(4)))
    stream = make_stream([record], "pairs")
    assert {decode(s, s.pool) for _ in range(40) for s in stream.draw(1)[1:]} == {"p0", "p1", "p2", "p3"}


def test_too_few_negatives_name_source_and_row():
    rows = [*pairs(3, negatives=2), *pairs(1, negatives=1)]
    with pytest.raises(
        DataError, match=r"fake\.jsonl, row 4: 1 hard negatives, but streams\.s\.num_hard_negatives asks for 2 \(1 of 4"
    ):
        make_stream(rows, "pairs", num_hard_negatives=2)
    assert make_stream(rows, "pairs", num_hard_negatives=1).draw(1)


def test_an_instruction_without_room_names_the_source():
    with pytest.raises(DataError, match=r"fake\.jsonl: the instruction 'Find it' takes"):
        make_stream(pairs(1), "pairs", max_query_tokens=12)


def test_queries_and_documents_have_their_own_limits():
    row = PairRecord(Text("q" * 100), (Text("d" * 100),), (Text("n" * 100),))
    query, positive, negative = make_stream(
        [row], "pairs", num_hard_negatives=1, max_query_tokens=30, max_document_tokens=50
    ).draw(1)
    assert [len(query), len(positive), len(negative)] == [30, 50, 50]
    assert query.truncated
    assert negative.truncated
    stats = make_stream([row, *pairs(1, negatives=1)], "pairs", max_query_tokens=60, max_document_tokens=50).stats
    assert stats.truncated == {"fake.jsonl": 3}


def test_texts_that_cannot_be_used_are_counted_by_reason_and_only_they_are_lost():
    rows = [
        *pairs(2, negatives=1),
        PairRecord(Text("q"), (Text("p"), Text(" ")), (Text("\n"), Text("n"))),
        PairRecord(Text(""), (Text("p"),)),
        PairRecord(Text("q"), (Text(""),)),
    ]
    stream = make_stream(rows, "pairs")
    assert stream.num_rows == 3
    reason = "text empty after stripping"
    assert stream.stats.rejected == {f"query: {reason}": 1, f"positive: {reason}": 2, f"negative: {reason}": 1}


def test_chat_labels_cover_every_answer_and_nothing_else():
    turns = (("user", "hello"), ("assistant", "one"), ("user", "more"), ("assistant", "two"))
    (sample,) = make_stream([ChatRecord(turns)], "chat").draw(1)
    learned = np.flatnonzero(sample.labels != IGNORE)
    assert TOKENIZER.decode(sample.labels[learned]) == "one</s>two</s>"
    assert (sample.labels[learned] == sample.input_ids[learned]).all()
    assert sample.bidirectional == (0, 0)
    assert sample.pool is None


def test_bidirectional_prompt_ends_where_the_first_answer_starts():
    turns = (("system", "be kind"), ("user", "hello"), ("assistant", "one"), ("user", "more"), ("assistant", "two"))
    (sample,) = make_stream([ChatRecord(turns)], "chat", attention="bidirectional_prompt").draw(1)
    assert decode(sample, sample.bidirectional) == "<s><|system|>\nbe kind\n<|user|>\nhello\n<|assistant|>\n"
    assert (sample.labels[: sample.bidirectional[1]] == IGNORE).all()


def test_chats_that_do_not_fit_are_cut_or_counted():
    rows = [
        *chats(2),
        ChatRecord((("user", "q" * 100), ("assistant", "a"))),
        ChatRecord((("user", "q"), ("assistant", "a" * 100))),
    ]
    stream = make_stream(rows, "chat", max_tokens=70)
    assert stream.num_rows == 3
    assert stream.stats.rejected == {"the prompt leaves no room for an answer within the limit": 1}
    cut = [s for s in stream.draw(3) if s.truncated]
    assert [len(s) for s in cut] == [70]
    assert cut[0].labels[-1] == cut[0].input_ids[-1] != TOKENIZER.eos_token_id, "a cut answer does not teach to stop"


def test_text_is_learned_everywhere_but_at_the_start():
    (sample,) = make_stream([TextRecord(" hello world ")], "text", template="plain").draw(1)
    assert decode(sample) == "<s>hello world"
    assert sample.labels[0] == IGNORE
    assert sample.labels[1:].tolist() == sample.input_ids[1:].tolist()


@pytest.mark.parametrize("tokenizer", [TOKENIZER, metaspace()], ids=["byte level", "metaspace"])
def test_concatenated_text_is_the_rows_joined_by_line_ends(tokenizer):
    rows = texts(7)
    stream = make_stream(rows, "text", tokenizer, template="plain", chunking="concatenate", max_tokens=32)
    table = stream.tables[0]
    pieces = [table.encoded(row).ids.tolist() for row in range(len(table))]
    assert [len(piece) for piece in pieces[:-1]] == [32] * (len(pieces) - 1)
    assert all(piece[0] == tokenizer.bos_token_id for piece in pieces)
    joined = [index for piece in pieces for index in piece[1:]]
    assert tokenizer.decode(joined).strip() == "\n".join(row.text.strip() for row in rows)
    assert stream.stats.truncated == {"fake.jsonl": 0}


def test_concatenation_loses_and_repeats_nothing_across_chunks_of_records():
    rows = texts(1100)
    stream = make_stream(rows, "text", template="plain", chunking="concatenate", max_tokens=128)
    table = stream.tables[0]
    joined = np.concatenate([table.encoded(row).ids[1:] for row in range(len(table))])
    assert TOKENIZER.decode(joined) == "".join(row.text.strip() + "\n" for row in rows)
    assert (np.diff(table.records) >= 0).all()


def test_masked_text_hides_and_asks_for_the_truth():
    stream = make_stream(
        texts(20), "masked_text", template="plain", attention="bidirectional", masking=MaskingConfig(probability=0.5)
    )
    whole = {tuple(stream.tables[0].encoded(row).ids.tolist()) for row in range(20)}
    for sample in stream.draw(20):
        chosen = sample.labels != IGNORE
        assert chosen.any()
        assert tuple(np.where(chosen, sample.labels, sample.input_ids).tolist()) in whole
        assert sample.bidirectional == (0, len(sample))
    first = [s.input_ids.tolist() for s in sorted(stream.draw(20), key=len)]
    assert first != [s.input_ids.tolist() for s in sorted(stream.draw(20), key=len)], "another corruption in another epoch"


def test_text_without_anything_to_predict_is_counted():
    stream = make_stream([TextRecord("x"), TextRecord("yz")], "masked_text", template="plain")
    assert stream.num_rows == 2, "the begin of text stands before both"
    bare = make_stream([TextRecord("x"), TextRecord("yz")], "text", tiny_tokenizer(add_bos=False), template="plain")
    assert bare.num_rows == 1
    assert bare.stats.rejected == {"fewer than two tokens": 1}


def test_views_are_the_same_text_twice():
    one, two = make_stream([TextRecord("hello")], "views", template="plain", attention="bidirectional").draw(1)
    assert (one.slot, two.slot) == (0, 1)
    assert one.input_ids.tolist() == two.input_ids.tolist()
    assert one.text_id == two.text_id
    assert decode(one, one.pool) == "<s>hello", "without a prompt, stock tools pool the begin of text, too"


@pytest.mark.parametrize(
    ("format", "attention"),
    [("chat", "bidirectional"), ("text", "bidirectional"), ("text", "bidirectional_prompt"), ("pairs", "bidirectional_prompt")],
)
def test_masks_that_would_leak_or_mean_nothing_are_refused(format, attention):
    with pytest.raises(ConfigError, match=f"format '{format}' cannot use attention '{attention}'"):
        make_stream(texts(1), format, attention=attention)


def test_unknown_names_are_refused_with_a_proposal():
    with pytest.raises(ConfigError, match=r"unknown format 'pair'. Did you mean 'pairs'"):
        find_description("pair", FORMATS, StreamConfig)
    with pytest.raises(
        ConfigError, match=r"cannot use attention 'casual'.*Possible: causal, bidirectional, bidirectional_keep_first\."
    ):
        make_stream(pairs(1), "pairs", attention="casual")
    with pytest.raises(ConfigError, match=r"unknown chunking 'records'. Did you mean 'record'"):
        make_stream(texts(1), "text", chunking="records")


def test_rows_with_few_negatives_are_left_out_on_request():
    rows = [*pairs(3, negatives=2), *pairs(2, negatives=1, prefix="short "), *pairs(1, prefix="bare ")]
    with pytest.raises(DataError, match="on_few_negatives=skip"):
        make_stream(rows, "pairs", num_hard_negatives=2)
    stream = make_stream(rows, "pairs", num_hard_negatives=2, on_few_negatives="skip")
    assert stream.num_rows == 3
    assert stream.stats.rejected == {"fewer than 2 hard negatives": 3}
    assert make_stream(rows, "pairs", num_hard_negatives=1, on_few_negatives="skip").num_rows == 5


def test_rows_with_few_negatives_are_padded_on_request():
    rows = [*pairs(2, negatives=3), *pairs(1, negatives=1, prefix="short "), *pairs(1, prefix="bare ")]
    stream = make_stream(rows, "pairs", num_hard_negatives=2, on_few_negatives="pad")
    assert stream.num_rows == 4
    assert not stream.stats.rejected
    samples = stream.draw(4)
    assert [sample.slot for sample in samples] == [0, 1, 2, 3] * 4
    missing = {group: sum(s.text_id == MISSING for s in samples if s.group == group) for group in range(4)}
    assert sorted(missing.values()) == [0, 0, 1, 2]
    for sample in samples:
        if sample.text_id == MISSING:
            assert sample.slot >= 2
            assert len(sample) == 1
            assert sample.pool == (0, 1)
    # rows that have enough draw the same negatives as without the setting
    plain = make_stream(rows[:2], "pairs", num_hard_negatives=2).draw(2)
    padded = make_stream(rows[:2], "pairs", num_hard_negatives=2, on_few_negatives="pad").draw(2)
    assert [s.input_ids.tolist() for s in plain] == [s.input_ids.tolist() for s in padded]


def test_hard_negatives_that_no_row_has_are_an_error():
    with pytest.raises(DataError, match=r"num_hard_negatives is 2, and no row has a hard negative \(fake\.jsonl\)"):
        make_stream(pairs(3), "pairs", num_hard_negatives=2, on_few_negatives="pad")


def test_padding_needs_an_objective_that_leaves_empty_places_out():
    own, sources = EmbeddingObjectiveConfig(name="own"), (SourceConfig(path="x"),)
    stream = PairsStream(num_hard_negatives=1, on_few_negatives="pad", sources=sources, objective=own)
    assert any("does not say that it leaves them out" in problem for problem in stream.problems("streams.s"))
    assert not list(replace(stream, objective=ContrastiveConfig()).problems("streams.s"))
