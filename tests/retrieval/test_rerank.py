"""Reranking: pointwise scores are those of stock logits on whole prompts, listwise orders are read as they are written."""

import numpy as np
import pytest
import torch

from unified_lm.core.errors import ConfigError
from unified_lm.inference import UnifiedLM
from unified_lm.retrieval import rerank
from unified_lm.retrieval.documents import Document, Passage
from unified_lm.retrieval.rerank import Reranker, read_order

PASSAGES = [Passage(Document(f"d{i}", f"Text {i} " + "word " * i), 1.0 - i / 10) for i in range(6)]


def test_pointwise_scores_are_stock_log_odds_in_falling_order(model: UnifiedLM) -> None:
    reranker = Reranker(model, "pointwise", token_budget=128)
    scores = reranker.scores("What?", [passage.document.text for passage in PASSAGES])
    encoder = model.prompt_encoder
    yes, no = (encoder.tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in ("yes", "no"))
    for passage, score in zip(PASSAGES, scores, strict=True):
        said = rerank._POINTWISE.format(document=passage.document.text.strip(), question="What?")
        ids = torch.from_numpy(encoder.generation_prompt([("user", said)]).astype(np.int64))[None]
        with model.borrow_backbone() as backbone, backbone.stock_attention() as stock, torch.no_grad():
            logits = stock(input_ids=ids).logits[0, -1]
        assert score == pytest.approx(float(logits[yes] - logits[no]), abs=1e-4)
    assert len(set(scores.tolist())) > 1
    ranked = reranker("What?", PASSAGES)
    assert [p.score for p in ranked] == pytest.approx(sorted(scores.tolist(), reverse=True), abs=1e-5)
    assert {p.document for p in ranked} == {p.document for p in PASSAGES}


def test_listwise_keeps_every_passage(model: UnifiedLM, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(UnifiedLM, "generate", lambda self, text, **options: asked.append(text) or "[3] > [1], then [9]")
    ranked = Reranker(model, "listwise")("What?", PASSAGES)
    assert [p.document.id for p in ranked] == ["d2", "d0", "d1", "d3", "d4", "d5"]
    assert asked[0].startswith("[1] Text 0\n\n[2] Text 1 word")
    monkeypatch.undo()
    assert len(Reranker(model, "listwise")("What?", PASSAGES)) == 6


@pytest.mark.parametrize(
    ("answer", "order"), [("[2] > [1]", [1, 0, 2]), ("", [0, 1, 2]), ("[0] [7] [3] [3]", [2, 0, 1]), ("2 > 1", [0, 1, 2])]
)
def test_orders(answer: str, order: list[int]) -> None:
    assert read_order(answer, 3) == order


def test_long_passages_are_cut_and_mistakes_named(model: UnifiedLM) -> None:
    reranker = Reranker(model, max_tokens=8)
    assert reranker._cut("word " * 50).startswith("wo")
    assert len(model.prompt_encoder.tokenizer(reranker._cut("word " * 50), add_special_tokens=False)["input_ids"]) <= 8
    assert reranker("What?", PASSAGES[:1]) == PASSAGES[:1]
    with pytest.raises(ConfigError, match=r"unknown way to rerank 'pairwise'\. Did you mean 'pointwise'|'listwise'"):
        Reranker(model, "pairwise")
