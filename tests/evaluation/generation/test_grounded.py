"""Answers from documents are measured in every mode: losses are stock ones after joined caches, scores SQuAD's."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.inference.conftest import make_export
from tests.retrieval.prompts import recorded_prompts
from unified_lm.cli.main import main
from unified_lm.data.prompts.layouts import LAYOUTS
from unified_lm.data.rows.records import GroundedRecord, PairRecord, Text
from unified_lm.evaluation.generation.grounded import as_dict, corpus, loss_beside, measure_mode, normalized, retrieve, token_f1
from unified_lm.inference import UnifiedLM
from unified_lm.retrieval.index import Index
from unified_lm.retrieval.rerank import Reranker
from unified_lm.retrieval.stored import STATES

ROWS = [
    GroundedRecord(
        PairRecord(Text(f"question {i}?", "Find it."), (Text(f"right {i}"),), (Text(f"wrong {i}"),)), (f"answer {i}", f"or {i}")
    )
    for i in range(4)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_export(tmp_path_factory.mktemp("rag") / "run" / "export")


@pytest.fixture(scope="module")
def index(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Index:
    where = tmp_path_factory.mktemp("index") / "i"
    made = Index.create(where, UnifiedLM.from_pretrained(folder), states=("bidirectional", "causal"), form="float32")
    made.add(corpus(ROWS))
    return made


@pytest.mark.parametrize(
    ("mode", "states", "recompute"),
    [(mode, states, 0) for mode in LAYOUTS for states in STATES]
    + [("document_cache", "causal", 1), ("document_query_cache", "bidirectional", 2), ("query_cache", "causal", 2)],
)
def test_losses_are_those_after_the_prompt_that_answers_have(mode: str, states: str, recompute: int, index: Index) -> None:
    passages, _ = retrieve(index, ROWS, 2)
    found = measure_mode(index, ROWS, passages, mode, states, num_generated=2, max_new_tokens=2, recompute=recompute)
    nats, count = 0.0, 0
    encoder = index.model.prompt_encoder
    for row, given in zip(ROWS, passages, strict=True):
        query = row.pair.query
        with recorded_prompts() as prompts:
            options = {"mode": mode, "states": states, "recompute": recompute}
            answer = index.answer(query.text, k=2, instruction=query.instruction, max_new_tokens=1, **options)
        assert answer.passages == (tuple(given) if LAYOUTS[mode].retrieves else ())
        right = encoder.tokenizer(row.answers[0], add_special_tokens=False)["input_ids"] + [encoder.tokenizer.eos_token_id]
        (prompt,) = prompts
        ids = torch.cat([prompt.ids, torch.tensor(right)])
        with index.model.borrow_backbone() as backbone, backbone.stock_attention() as stock, torch.no_grad():
            past = None if prompt.past is None else prompt.past.to_transformers(stock.config)
            first = 0 if prompt.past is None else len(prompt.past)
            logits = stock(input_ids=ids[first:][None], past_key_values=past).logits[0]
        loss = torch.nn.functional.cross_entropy(logits[-len(right) - 1 : -1].float(), torch.tensor(right), reduction="sum")
        nats, count = nats + float(loss), count + len(right)
    assert found.loss.value == pytest.approx(nats / count, abs=1e-4)
    assert found.states == (states if LAYOUTS[mode].blocks else "")
    assert answer.cached_tokens == (len(prompt.past) - prompt.recomputed if prompt.past else 0)
    assert (prompt.recomputed > 0) == (recompute > 0 and found.cached_tokens > 0 and mode != "query_cache")
    assert found.exact_match is not None
    assert found.first_token_seconds is not None


def test_losses_are_compared_question_by_question(index: Index) -> None:
    passages, _ = retrieve(index, ROWS, 2)
    one, other = (
        measure_mode(index, ROWS, passages, mode, "causal", num_generated=0) for mode in ("document_cache", "no_retrieval")
    )
    found = loss_beside(one, other)
    assert found.value == pytest.approx(one.loss.value - other.loss.value, abs=1e-6)
    assert found.low <= found.value <= found.high
    assert found.high - found.low < one.loss.high - one.loss.low + other.loss.high - other.loss.low
    assert loss_beside(one, one).high == 0
    assert as_dict(one, other)["beside"]["value"] == found.value
    assert as_dict(one, one)["beside"] is None


def test_recall_counts_right_documents(index: Index) -> None:
    passages, recall = retrieve(index, ROWS, 8)
    ranks = [[p.document.text for p in found].index(f"right {i}") + 1 for i, found in enumerate(passages)]
    assert recall == {limit: np.mean([rank <= limit for rank in ranks]) for limit in (1, 3, 5, 8)}
    assert recall[8] == 1.0


@pytest.mark.parametrize(
    ("answer", "right", "f1"),
    [
        ("The cat!", "cat", 1.0),
        ("a b c", "b d", 0.5),
        ("", "x", 0.0),
        ("the", "a", 1.0),
        ("x x y", "x", 0.5),
        ("no", "yes", 0.0),
    ],
)
def test_f1(answer: str, right: str, f1: float) -> None:
    # "a" is an article, so "a b c" has two words
    assert token_f1(answer, right) == pytest.approx(f1)


def test_normalization() -> None:
    assert normalized(" The  Quick, brown an fox. ") == "quick brown fox"


def test_the_command_writes_a_table(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNIFIED_LM_CACHE", str(tmp_path / "cache"))
    rows = tmp_path / "rows.jsonl"
    content = [
        {"query": ["Find it", f"q {i}"], "pos": [f"right {i}"], "neg": [f"wrong {i}"], "answers": [f"a {i}"]} for i in range(5)
    ]
    rows.write_text("".join(json.dumps(row) + "\n" for row in content))
    common = ["eval", "rag", str(folder.parent), "--data", str(rows), "--device", "cpu", "-k", "2"]
    assert main([*common, "--modes", "no_retrieval", "document_cache", "--generate", "2", "--max-new-tokens", "2"]) == 0
    result = json.loads((folder.parent / "rag.json").read_text())
    assert [(mode["mode"], mode["states"]) for mode in result["modes"]] == [
        ("no_retrieval", ""),
        ("document_cache", "bidirectional"),
        ("document_cache", "causal"),
    ]
    assert result["questions"] == 5
    assert set(result["recall"]) == {"1", "3", "5", "10"}
    assert (folder.parent / "evaluation" / "rag.json").is_file()
    rows.write_text("".join(json.dumps(row) + "\n" for row in content[:3]))
    calls = []
    order = Reranker.__call__
    monkeypatch.setattr(
        Reranker, "__call__", lambda self, question, found: calls.append(question) or order(self, question, found)
    )
    more = ["--generate", "1", "--max-new-tokens", "1", "--recompute", "2", "--rerank", "pointwise"]
    assert main([*common, "--modes", "document_cache", "no_retrieval", *more, "--states", "causal", "bidirectional"]) == 0
    assert calls == ["q 0", "q 1", "q 2"], "each question's passages once, whatever is answered from them"
    result = json.loads((folder.parent / "rag.json").read_text())
    assert [(mode["states"], mode["recompute"]) for mode in result["modes"]] == [("causal", 2), ("bidirectional", 2), ("", 0)]
    assert set(result["reranked_recall"]) == set(result["recall"])
    assert all(mode["beside"] is None for mode in result["modes"]), "document_then_query was not measured"
    table = (folder.parent / "evaluation" / "rag.json").read_text()
    assert "the first 2 tokens of later blocks read again" in table
    assert "reranked pointwise" in table
    capsys.readouterr()
    assert main([*common, "--modes", "cache"]) == 2
    assert "unknown mode 'cache'" in capsys.readouterr().err


def corrupted(manifest: Path) -> None:
    for path in manifest.parent.glob("vectors/**/_versions/*.manifest"):
        path.write_bytes(b"damaged" + path.read_bytes()[20:])


DAMAGE = {
    "emptied": lambda manifest: manifest.write_text(""),
    "no object": lambda manifest: manifest.write_text("[]"),
    "another number": lambda manifest: manifest.write_text(manifest.read_text().replace('"max_tokens": ', '"max_tokens": 1')),
    "removed": lambda manifest: manifest.unlink(),
    "vectors": corrupted,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_index_in_the_cache_is_made_again(
    damage: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNIFIED_LM_CACHE", str(tmp_path / "cache"))
    rows = [{"query": f"q {i}", "pos": [f"right {i}"], "answers": [f"a {i}"]} for i in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["eval", "rag", str(folder), "--data", str(tmp_path / "rows.jsonl"), "--device", "cpu", "--generate", "0"]
    command += ["--modes", "document_cache", "--states", "causal", "--out", str(tmp_path / "rag.json")]
    assert main(command) == 0
    before = json.loads((tmp_path / "rag.json").read_text())
    (manifest,) = (tmp_path / "cache" / "rag").glob("*/index.json")
    DAMAGE[damage](manifest)
    capsys.readouterr()
    assert main(command) == 0
    assert "the cached index cannot be opened, and is made again" in capsys.readouterr().err
    after = json.loads((tmp_path / "rag.json").read_text())
    assert (after["recall"], after["modes"][0]["loss"]) == (before["recall"], before["modes"][0]["loss"])
    assert main(command) == 0
    assert "made again" not in capsys.readouterr().err
