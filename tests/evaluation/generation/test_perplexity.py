"""Perplexity equals transformers' own loss on the same tokens, in packs, in windows, by domain."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.evaluation.words.word_files import write
from unified_lm.core.errors import ConfigError, DataError
from unified_lm.data.rows.records import ChatRecord, TextRecord
from unified_lm.evaluation.generation.perplexity import Domain, num_windows, perplexity, read_domain
from unified_lm.inference import UnifiedLM
from unified_lm.models.tiny import tiny_model, tiny_tokenizer

TEXTS = ("The sum of the thing, and more.", "naïve – 12", "the", "A longer text about the sum of things and of others. " * 3)


@pytest.fixture(scope="module")
def model() -> UnifiedLM:
    return UnifiedLM(tiny_model("llama"), tiny_tokenizer(), template="grit")


def stock_loss(model: UnifiedLM, ids: list[int], labels: list[int] | None = None) -> float:
    """Mean cross-entropy of transformers' own model on one sequence."""
    with model.borrow_backbone() as backbone, backbone.stock_attention() as stock, torch.no_grad():
        return float(stock(torch.tensor([ids]), labels=torch.tensor([labels or ids])).loss)


def test_texts_equal_transformers_own_loss(model: UnifiedLM) -> None:
    found = perplexity(model, Domain("x", tuple(map(TextRecord, TEXTS))), num_resamples=100)
    tokenizer = tiny_tokenizer()
    nats, tokens, num_bytes = 0.0, 0, 0
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        nats += stock_loss(model, ids) * (len(ids) - 1)
        tokens += len(ids) - 1
        num_bytes += len(text.encode())
    assert (found["tokens"], found["bytes"], found["documents"]) == (tokens, num_bytes, len(TEXTS))
    assert found["nats"] == pytest.approx(nats, rel=1e-5)
    assert found["token_perplexity"]["value"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    assert found["bits_per_byte"]["value"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)
    assert found["byte_perplexity"]["value"] == pytest.approx(2 ** found["bits_per_byte"]["value"])
    assert found["token_perplexity"]["low"] < found["token_perplexity"]["value"] < found["token_perplexity"]["high"]
    mean_of_documents = np.mean([math.exp(stock_loss(model, tokenizer(text)["input_ids"])) for text in TEXTS])
    assert abs(found["token_perplexity"]["value"] - mean_of_documents) > 1e-2  # weighted by token, not by document


def test_windows_score_every_token_once_with_enough_context(model: UnifiedLM) -> None:
    domain = Domain("x", (TextRecord(TEXTS[3]), TextRecord(TEXTS[0])))
    found = perplexity(model, domain, context=16, stride=6, num_resamples=100)
    expected, windows = 0.0, 0
    for document in domain.documents:
        ids = tiny_tokenizer()(document.text)["input_ids"]
        first, stop = 1, min(16, len(ids))
        while True:
            start = max(0, stop - 16)
            labels = [-100] * (first - start) + ids[first:stop]
            expected += stock_loss(model, ids[start:stop], labels) * (stop - first)
            windows += 1
            if stop == len(ids):
                break
            first, stop = stop, min(stop + 6, len(ids))
    assert found["nats"] == pytest.approx(expected, rel=1e-5)
    assert found["windows"] == num_windows(model, domain, 16, 6) == windows > 2
    assert found["tokens"] == perplexity(model, domain, num_resamples=100)["tokens"]
    assert abs(found["nats"] - perplexity(model, domain, num_resamples=100)["nats"]) > 1e-3


def test_conversations_score_answers_only(model: UnifiedLM) -> None:
    turns = (("user", "What is it?"), ("assistant", "The sum."), ("user", "And?"), ("assistant", "More of it"))
    found = perplexity(model, Domain("x", (ChatRecord(turns), ChatRecord(turns[:2]))), num_resamples=100)
    nats, tokens = 0.0, 0
    for encoded in model.prompt_encoder.chat([turns, turns[:2]], 10_000):
        labels = [-100] * len(encoded.ids)
        for start, stop in encoded.spans:
            labels[start:stop] = encoded.ids[start:stop].tolist()
        count = sum(label != -100 for label in labels)
        nats += stock_loss(model, encoded.ids.tolist(), labels) * count
        tokens += count
    assert found["nats"] == pytest.approx(nats, rel=1e-5)
    assert (found["tokens"], found["bytes"]) == (tokens, len("The sum.More of itThe sum."))


def test_reading_domains(tmp_path: Path) -> None:
    texts = write(tmp_path / "a.jsonl", '{"text": "one"}\n{"text": "two"}\n')
    chats = write(
        tmp_path / "b.jsonl",
        '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}\n' * 2,
    )
    assert [document.text for document in read_domain("a", texts).documents] == ["one", "two"]
    assert all(isinstance(document, ChatRecord) for document in read_domain("b", chats).documents)
    assert len(read_domain("a", texts).limited(1).documents) == 1
    with pytest.raises(DataError, match=r"a\.jsonl, line 2, field 'text'"):
        read_domain("x", write(tmp_path / "c" / "a.jsonl", '{"text": "one"}\n{"text": 2}\n'))
    with pytest.raises(DataError, match="Did you mean 'pydocs/text'"):
        read_domain("pydocs/texts", None)
    with pytest.raises(DataError, match="has 1 documents"):
        read_domain("x", write(tmp_path / "d.txt", "one\n"))


def test_impossible_windows(model: UnifiedLM) -> None:
    with pytest.raises(ConfigError, match="1 <= stride < context"):
        perplexity(model, Domain("x", (TextRecord("a"), TextRecord("b"))), context=8, stride=8)
