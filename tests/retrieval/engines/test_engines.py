"""One suite for every vector engine: what is added is found, exactly, replaced, removed, and there after a restart."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from unified_lm.core.errors import CheckpointError, ConfigError, DataError
from unified_lm.retrieval.documents import Document
from unified_lm.retrieval.engines import ENGINES, open_engine
from unified_lm.retrieval.engines.base import VectorEngine

DIM = 8
STRANGE = ["it's", 'a "quote"', "naïve 日本", "two\nlines", "", "%_'; DROP TABLE documents; --", "x" * 3000]


def documents(count: int, prefix: str = "d") -> list[Document]:
    return [Document(f"{prefix}{i}", f"text {i}", f"file, line {i}") for i in range(count)]


def vectors(count: int, seed: int = 0) -> np.ndarray:
    drawn = np.random.default_rng(seed).normal(size=(count, DIM)).astype(np.float32)
    unit: np.ndarray = drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
    return unit


@pytest.fixture(params=sorted(ENGINES))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def engine(name: str, tmp_path: Path) -> Iterator[VectorEngine]:
    opened = open_engine(name, str(tmp_path / "vectors"), DIM)
    yield opened
    opened.close()


def test_search_is_exact_and_best_first(engine: VectorEngine) -> None:
    stored, queries = vectors(300), vectors(5, seed=1)
    for start in range(0, 300, 64):
        engine.upsert(documents(300)[start : start + 64], stored[start : start + 64])
    assert len(engine) == 300
    scores = queries @ stored.T
    for passages, row in zip(engine.search(queries, 7), scores, strict=True):
        best = np.argsort(-row)[:7]
        assert [passage.document for passage in passages] == [documents(300)[i] for i in best]
        np.testing.assert_allclose([passage.score for passage in passages], row[best], atol=1e-5)


def test_equal_scores_are_in_the_order_of_ids_and_k_may_be_larger_than_the_index(engine: VectorEngine) -> None:
    assert engine.search(vectors(1), 3) == [[]]
    engine.upsert(documents(4)[::-1], np.repeat(vectors(1), 4, axis=0))
    (found,) = engine.search(vectors(1), 10)
    assert [passage.document.id for passage in found] == ["d0", "d1", "d2", "d3"]
    assert engine.search(vectors(1), 0) == [[]]


def test_what_is_added_again_replaces_and_what_is_removed_is_gone(engine: VectorEngine) -> None:
    engine.upsert(documents(6), vectors(6))
    engine.upsert([Document("d2", "another text")], -vectors(6)[2:3])
    assert len(engine) == 6
    assert engine.get(["d2", "d0"]) == [Document("d2", "another text"), documents(1)[0]]
    assert engine.search(-vectors(6)[2:3], 1)[0][0].document.text == "another text"
    assert engine.delete(["d0", "d5", "missing"]) == 2
    assert sorted(engine.ids()) == ["d1", "d2", "d3", "d4"]
    with pytest.raises(DataError, match="no document 'd0', 'nothing' among the 4"):
        engine.get(["d1", "d0", "nothing"])
    assert engine.find([]) == {}


def test_ids_and_texts_may_be_anything(engine: VectorEngine) -> None:
    strange = [Document(text, text, text) for text in STRANGE]
    engine.upsert(strange, vectors(len(strange)))
    assert engine.get(STRANGE) == strange
    assert engine.delete(STRANGE[:3]) == 3
    assert set(engine.ids()) == set(STRANGE[3:])


def test_it_is_there_after_a_restart_and_compacting_changes_nothing(name: str, tmp_path: Path) -> None:
    first = open_engine(name, str(tmp_path / "v"), DIM)
    for number, (document, vector) in enumerate(zip(documents(20), vectors(20), strict=True)):
        first.upsert([document], vector[None])
        assert len(first) == number + 1
    before = first.search(vectors(3, seed=2), 5)
    first.compact()
    assert first.search(vectors(3, seed=2), 5) == before
    first.close()
    again = open_engine(name, str(tmp_path / "v"), DIM)
    assert again.search(vectors(3, seed=2), 5) == before
    again.close()
    with pytest.raises(CheckpointError, match=f"vectors of {DIM} dimensions, and 4 are expected"):
        open_engine(name, str(tmp_path / "v"), 4)


_ADDER = """
import sys
from tests.retrieval.engines.test_engines import DIM, add_missing
from unified_lm.retrieval.engines import open_engine
engine = open_engine(sys.argv[1], sys.argv[2], DIM)
print("ready", flush=True)
add_missing(engine)
"""


def add_missing(engine: VectorEngine) -> None:
    """Add 400 documents in batches of 20, but for batches that are there."""
    for start in range(0, 400, 20):
        part = documents(400)[start : start + 20]
        if len(engine.find([document.id for document in part])) < 20:
            engine.upsert(part, vectors(400)[start : start + 20])


def test_killed_while_it_adds_and_started_again_it_holds_the_same(name: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    command = [sys.executable, "-c", _ADDER, name, str(tmp_path / "v")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": os.getcwd()})
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(float(rng.uniform(0.02, 0.15)))
    process.send_signal(signal.SIGKILL)
    process.wait()
    whole = open_engine(name, str(tmp_path / "v"), DIM)
    add_missing(whole)
    assert sorted(whole.ids()) == sorted(document.id for document in documents(400))
    assert whole.search(vectors(1), 1)[0][0].document == documents(1)[0]
    whole.close()


def test_mistakes() -> None:
    with pytest.raises(ConfigError, match=r"unknown vector engine 'lancedb'\. Did you mean 'lance'"):
        open_engine("lancedb", "x", DIM)
    with pytest.raises(CheckpointError, match=r"no Qdrant server answers at http://127\.0\.0\.1:9/things"):
        open_engine("qdrant", "http://127.0.0.1:9/things", DIM)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delitem(sys.modules, "unified_lm.retrieval.engines.lance", raising=False)
    monkeypatch.setitem(sys.modules, "lancedb", None)
    with pytest.raises(ConfigError, match=r"needs lancedb: pip install 'unified_lm\[rag\]'"):
        open_engine("lance", str(tmp_path), DIM)
