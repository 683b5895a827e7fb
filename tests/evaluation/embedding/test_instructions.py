"""Instruction tables: what each says, who gets it, and mistakes."""

import json
from pathlib import Path

import pytest

from unified_lm.core.errors import ConfigError, DataError
from unified_lm.evaluation.embedding.instructions import (
    ExportInstructions,
    Role,
    TaskKey,
    instructions_of,
    load_table,
    require_known,
    table_names,
)

RETRIEVAL = TaskKey("SciFact", "Retrieval")
RERANKING = TaskKey("SciDocsRR", "Reranking")
STS = TaskKey("STS12", "STS")


def test_e5() -> None:
    table = load_table("e5")
    claim = "Given a scientific claim, retrieve documents that support or refute the claim"
    assert table.find(RETRIEVAL, Role.QUERY) == claim
    assert table.find(RETRIEVAL, Role.DOCUMENT) == ""
    assert table.find(STS, Role.TEXT) == "Retrieve semantically similar text."
    assert table.find(RERANKING, Role.DOCUMENT) == table.find(RERANKING, Role.QUERY) != ""


def test_llm2vec_differs_in_documents_and_punctuation() -> None:
    table, e5 = load_table("llm2vec"), load_table("e5")
    assert table.find(RERANKING, Role.DOCUMENT) == ""
    assert table.find(RERANKING, Role.QUERY) == e5.find(RERANKING, Role.QUERY)
    assert table.find(STS, Role.TEXT) == "Retrieve semantically similar text"
    assert not any(str(text).endswith((".", ":")) for text in table.tasks.values())


def test_variants_and_types() -> None:
    table = load_table("e5")
    assert table.find(TaskKey("FEVERHardNegatives", "Retrieval"), Role.QUERY) == table.tasks["FEVER"]
    assert (
        table.find(TaskKey("TwentyNewsgroupsClustering.v2", "Clustering"), Role.TEXT)
        == table.tasks["TwentyNewsgroupsClustering"]
    )
    assert table.find(TaskKey("MySimilarity", "STS"), Role.TEXT) == table.types["STS"]
    unknown = TaskKey("MySearch", "Retrieval")
    assert table.find(unknown, Role.QUERY) is None
    assert table.find(TaskKey("MySearch", "Retrieval", {"query": "Find it."}), Role.QUERY) == "Find it."
    with pytest.raises(ConfigError, match="have none for MySearch"):
        require_known(table, [STS, unknown])
    require_known(table, [STS, RETRIEVAL, RERANKING])


def test_export_none_and_task() -> None:
    export = instructions_of("export", {"query": "Find.", "document": "Store."})
    assert isinstance(export, ExportInstructions)
    assert [export.find(STS, role) for role in Role] == ["Find.", "Store.", "Store."]
    assert instructions_of("none", {"query": "Find."}).find(STS, Role.QUERY) == ""
    task = instructions_of("task", {})
    assert task.find(STS, Role.TEXT) is None
    assert task.find(TaskKey("a", "Reranking", "Rank."), Role.QUERY) == "Rank."
    assert task.find(TaskKey("a", "Reranking", "Rank."), Role.DOCUMENT) == ""
    assert task.find(TaskKey("a", "Retrieval", {"query": "Q"}), Role.DOCUMENT) == ""


def test_ones_own_table(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"tasks": {"SciFact": {"query": "Q", "document": "D"}}}))
    table = load_table(str(path))
    assert [table.find(RETRIEVAL, role) for role in (Role.QUERY, Role.DOCUMENT)] == ["Q", "D"]
    label = table.label
    assert label.startswith("mine-")
    path.write_text(json.dumps({"tasks": {"SciFact": "Q"}}))
    assert load_table(str(path)).label != label, "results under another table must lie apart"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "not valid JSON"),
        ("[]", r'expected an object\. Expected "tasks"'),
        ('{"tasks": {}, "type": {}}', "unknown field 'type'. Did you mean 'types'"),
        ('{"tasks": {"A": 3}}', r"tasks\.A: got 3 \(int\), expected text or keys and values"),
        ('{"tasks": {"A": {"querry": "x"}}}', "tasks.A has the unknown role 'querry'. Did you mean 'query'"),
        ('{"tasks": {}, "documents_with_instruction": "Reranking"}', "expected a list of text"),
        ('{"tasks": null}', "tasks: got None"),
        ('{"tasks": {"A": "x", "B": "y", "A": "z"}}', "an object has the key 'A' more than once"),
        ('{"tasks": {"A": {"query": "x", "query": "y"}}}', "an object has the key 'query' more than once"),
    ],
)
def test_broken_tables(tmp_path: Path, content: str, expected: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(content)
    with pytest.raises(DataError, match=expected):
        load_table(str(path))


def test_unknown_names() -> None:
    assert table_names() == ["e5", "llm2vec"]
    with pytest.raises(ConfigError, match=r"unknown instructions 'llm2vce'. Did you mean 'llm2vec'"):
        instructions_of("llm2vce", {})
    with pytest.raises(DataError, match=r"cannot read gone\.json"):
        load_table("gone.json")
