"""Questions with documents become blocks, as an index holds them, and a turn that sees them all."""

import re

import numpy as np
import pytest
import torch

from tests.data.fake_source import FakeSource, stream_config
from tests.data.formats.test_formats import TOKENIZER, decode
from tests.data.prompts.tokenizers_for_tests import metaspace
from unified_lm.batch import IGNORE, Block, Sample, attention_span, make_pack
from unified_lm.config.streams import ATTENTIONS
from unified_lm.core.errors import ConfigError
from unified_lm.data.formats import GroundedStream
from unified_lm.data.prompts.encoding import PromptEncoder
from unified_lm.data.prompts.layouts import LAYOUTS, get_layout
from unified_lm.data.prompts.templates import get_template
from unified_lm.data.rows.records import GroundedRecord, PairRecord, Text
from unified_lm.data.streams import TableStream
from unified_lm.models.backbone import Backbone
from unified_lm.models.key_values import KeyValueReader
from unified_lm.models.tiny import tiny_model
from unified_lm.objectives import NextTokenConfig

CACHED = [name for name, layout in LAYOUTS.items() if layout.blocks]


def records(count: int, distractors: int = 4) -> list[GroundedRecord]:
    return [
        GroundedRecord(
            PairRecord(
                Text(f"question {i}?", "Find it"),
                (Text(f"right {i}"),),
                tuple(Text(f"wrong {i}.{k}") for k in range(distractors)),
            ),
            (f"answer {i}", "another"),
        )
        for i in range(count)
    ]


def make_stream(rows: list[GroundedRecord], **settings: object) -> TableStream:
    return TableStream("s", stream_config("grounded", **settings), [FakeSource(rows)], TOKENIZER, seed=0)


def parts(sample: Sample) -> list[str]:
    """What each block says, and what follows them."""
    borders = [(block.start, block.stop) for block in sample.blocks]
    return [decode(sample, span) for span in (*borders, (borders[-1][1] if borders else 0, len(sample)))]


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_says_what_its_table_says(name: str) -> None:
    layout = LAYOUTS[name]
    (sample,) = make_stream(records(1), layouts=[name], num_documents=2).draw(1)
    *blocks, turn = parts(sample)
    found = iter(blocks)
    documents = []
    for part in layout.blocks:
        if part == "question":
            assert next(found) == "<s><|user|>\nFind it\n<|embed|>\nquestion 0?"
        else:
            documents += [next(found).removeprefix("<s><|embed|>\n") for _ in range(2)]
    assert next(found, None) is None
    if not documents:
        documents = re.findall(r"(?:right|wrong) [\d.]*\d", turn)
    assert len(documents) == 2 * layout.retrieves
    assert "right 0" in documents or not layout.retrieves
    said = layout.say("question 0?", documents)
    before = "\n" if blocks else "<s>"
    assert turn == f"{before}<|user|>\n{said}\n<|assistant|>\nanswer 0</s>"
    assert sample.labels is not None
    learned = sample.labels != IGNORE
    assert decode(sample, (int(learned.argmax()), len(sample))) == "answer 0</s>"
    assert learned[learned.argmax() :].all()


def test_blocks_are_the_tokens_of_embedded_texts() -> None:
    for tokenizer in (TOKENIZER, metaspace()):
        encoder = PromptEncoder(get_template("grit"), tokenizer)
        stream = TableStream("s", stream_config("grounded", num_documents=1), [FakeSource(records(3))], tokenizer, seed=0)
        for sample in stream.draw(3):
            (block,) = sample.blocks
            text = tokenizer.decode(sample.input_ids[: block.stop]).rpartition("\n")[2]
            (embedded,) = encoder.embed([(text, "")], 256)
            assert np.array_equal(embedded.ids, sample.input_ids[: block.stop])  # type: ignore[union-attr]


def test_documents_with_the_answer_come_first_and_in_any_place() -> None:
    stream = make_stream(records(1), num_documents=3)
    drawn = [parts(stream.draw(1)[0])[:-1] for _ in range(60)]
    places = {next(i for i, text in enumerate(texts) if text.endswith("right 0")) for texts in drawn}
    assert places == {0, 1, 2}
    assert {text[-1] for texts in drawn for text in texts if "wrong" in text} == set("0123")


def test_every_layout_is_drawn_and_the_attention_is_that_of_the_blocks() -> None:
    stream = make_stream(records(1), layouts=CACHED, num_documents=1, attention="causal")
    samples = [stream.draw(1)[0] for _ in range(40)]
    assert {len(sample.blocks) for sample in samples} == {1, 2}
    assert {block.bidirectional for sample in samples for block in sample.blocks} == {False}
    (sample,) = make_stream(records(1), num_documents=1).draw(1)
    assert sample.blocks == (Block(0, sample.blocks[0].stop, bidirectional=True),)
    assert sample.bidirectional == (0, 0)


def test_limits_cut_documents_questions_and_answers() -> None:
    long = GroundedRecord(PairRecord(Text("q " * 400), (Text("d " * 400),)), ("a " * 400,))
    settings = {"max_query_tokens": 20, "max_document_tokens": 30, "max_turn_tokens": 90}
    config = stream_config("grounded", layouts=["query_document_cache"], num_documents=1, **settings)
    (sample,) = TableStream("s", config, [FakeSource([long])], TOKENIZER, seed=0).draw(1)
    assert [block.stop - block.start for block in sample.blocks] == [20, 30]
    assert len(sample) == 140 == config.longest_sample
    assert sample.truncated


def test_rows_that_cannot_be_used_are_counted() -> None:
    rows = [*records(2), GroundedRecord(PairRecord(Text("long " * 60), (Text("d"),)), ("a",))]
    stream = make_stream(rows, layouts=["document_cache", "no_retrieval"], max_turn_tokens=90)
    assert [len(table) for table in stream.tables] == [2]
    assert dict(stream.tables[0].rejected) == {"the prompt leaves no room for an answer within the limit": 1}


def test_wrong_settings_are_named() -> None:
    with pytest.raises(ConfigError, match=r"no layout 'document_cash'\. Did you mean 'document_cache'"):
        get_layout("document_cash")
    config = GroundedStream(objective=NextTokenConfig(), layouts=("document_cash",), num_documents=0)
    found = list(config.problems("streams.g"))
    assert any(text.startswith("streams.g.layouts: unknown value 'document_cash'") for text in found)
    assert any(text.startswith("streams.g.num_documents") for text in found)
    assert set(GroundedStream.attentions) == set(ATTENTIONS) - {"bidirectional_prompt"}


@pytest.mark.parametrize("attention", GroundedStream.attentions)
@pytest.mark.parametrize("name", CACHED)
@torch.no_grad()
def test_a_trained_block_is_a_cached_block(name: str, attention: str) -> None:
    """The loss of one packed forward equals the loss that stock transformers has on joined caches, each read alone."""
    backbone = Backbone(tiny_model("llama", vocab_size=len(TOKENIZER)), "sdpa").eval()
    reader = KeyValueReader(backbone)
    for sample in make_stream(records(3), layouts=[name], attention=attention).draw(3):
        assert sample.labels is not None
        hidden = backbone(make_pack([sample]))
        targets = torch.from_numpy(sample.labels)[1:]
        packed = torch.nn.functional.cross_entropy(backbone.causal_lm.lm_head(hidden)[:-1].float(), targets)
        caches = []
        for block in sample.blocks:
            ids = sample.input_ids[block.start : block.stop]
            span = attention_span(attention, len(ids))
            caches += reader.read(make_pack([Sample(input_ids=ids, stream="s", bidirectional=span)]))[1]
        joined = reader.join(caches)
        with backbone.stock_attention() as model:
            tail = torch.from_numpy(sample.input_ids[len(joined) :])[None]
            logits = model(input_ids=tail, past_key_values=joined.to_transformers(model.config)).logits[0]
        cached = torch.nn.functional.cross_entropy(logits[:-1].float(), targets[len(joined) :])
        torch.testing.assert_close(cached, packed, rtol=1e-4, atol=1e-4)
