"""A row per answer, as in MS MARCO: what answers a query in one row is right for all its rows, wherever it is measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from unified_lm.config.schema import RetrievalConfig, SourceConfig
from unified_lm.config.streams import RecordKind
from unified_lm.data.formats import FORMATS
from unified_lm.data.retrieval import retrieval_set
from unified_lm.data.rows.records import GroundedRecord, PairRecord, Text, answers_of
from unified_lm.data.sources import open_source
from unified_lm.evaluation.analyses.texts import read_retrieval
from unified_lm.evaluation.generation.grounded import recall
from unified_lm.models.tiny import tiny_tokenizer
from unified_lm.objectives import ContrastiveConfig
from unified_lm.retrieval.documents import Document, Passage, text_id

ROWS = [("q", "a"), ("other", "b"), ("q ", "c"), ("q", "d")]
RIGHT = [{0, 2, 3}, {1}, {0, 2, 3}, {0, 2, 3}]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"query": query, "pos": [answer]}) + "\n" for query, answer in ROWS))
    return path


def test_held_out_retrieval_of_a_run(file: Path) -> None:
    source = SourceConfig(path=str(file))
    stream = FORMATS["pairs"](sources=(source,), objective=ContrastiveConfig(), template="plain")
    found = retrieval_set("emb", stream, RetrievalConfig(queries=source), tiny_tokenizer(), seed=0)
    assert list(found.relevant) == RIGHT
    few = retrieval_set("emb", stream, RetrievalConfig(queries=source, max_queries=1), tiny_tokenizer(), seed=0)
    assert list(few.relevant) == RIGHT[:1], "rows that do not ask have answers too"


def test_analyses(file: Path) -> None:
    assert list(read_retrieval(str(file), None).relevant) == RIGHT


def test_another_instruction_asks_something_else() -> None:
    pairs = [PairRecord(Text("q", task), (Text(answer),)) for task, answer in (("for", "a"), ("against", "b"), ("for", "c"))]
    assert [{text.text for text in answers} for answers in answers_of(pairs)] == [{"a", "c"}, {"b"}, {"a", "c"}]


def test_recall_of_passages(file: Path) -> None:
    pairs = [row for row in open_source(SourceConfig(path=str(file)), RecordKind.PAIR, 0) if isinstance(row, PairRecord)]
    rows = [GroundedRecord(pair, ("x",)) for pair in pairs]
    found = [Passage(Document(text_id("d"), "d"), 0.5)]
    assert recall(rows, [found] * 4, 1) == {1: 0.75}
    assert pairs[0].positives == (Text("a"),)
