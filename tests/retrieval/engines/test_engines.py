"""One suite for every vector engine: what is added is found, exactly, replaced, removed, and there after a restart."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest

from tests.processes import Child
from unified_lm.core.errors import CheckpointError, ConfigError, DataError
from unified_lm.retrieval.documents import Document
from unified_lm.retrieval.engines import ENGINES, open_engine
from unified_lm.retrieval.engines.base import VectorEngine

DIM = 8
STRANGE = [
    "it's",
    'a "quote"',
    "naïve 日本",
    "two\nlines",
    "",
    "%_'; DROP TABLE documents; --",
    "x" * 3000,
    "nul \x00",
    "back\\slash",
]


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


def test_equal_scores_at_the_end_of_the_k_are_decided_by_id(engine: VectorEngine) -> None:
    stored = np.repeat(vectors(1), 60, axis=0)
    stored[30] = 2 * stored[30]
    for start in range(0, 60, 20):
        engine.upsert(documents(60)[::-1][start : start + 20], stored[::-1][start : start + 20])
    ids = sorted(f"d{i}" for i in range(60) if i != 30)
    two = np.concatenate([vectors(1), -vectors(1)])
    for k in (1, 2, 5, 59, 60, 61):
        towards, away = engine.search(two, k)
        assert [passage.document.id for passage in towards] == ["d30", *ids][:k]
        assert [passage.document.id for passage in away] == [*ids, "d30"][:k]


def test_vectors_and_texts_that_no_engine_can_hold_are_refused_and_nothing_is_added(engine: VectorEngine) -> None:
    for value in (np.nan, np.inf):
        stored = vectors(3)
        stored[1, 2] = value
        with pytest.raises(DataError, match=r"document 'd1'.* NaN or infinity.*Nothing was added"):
            engine.upsert(documents(3), stored)
        with pytest.raises(DataError, match="the question a vector with NaN or infinity"):
            engine.search(stored, 1)
    with pytest.raises(DataError, match=r"document 'd0': character 3 of .*no Unicode text"):
        engine.upsert([Document("d0", "ab\ud800c")], vectors(1))
    assert len(engine) == 0


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


def add_missing(engine: VectorEngine, prefix: str = "d", documents_in_all: int | str = 400) -> None:
    """Add documents in batches of 20, but for batches that are there; says so before and after each."""
    for start in range(0, int(documents_in_all), 20):
        part = documents(400, prefix)[start : start + 20]
        if len(engine.find([document.id for document in part])) < 20:
            print("adding", flush=True)
            engine.upsert(part, vectors(400)[start : start + 20])
            print("added", flush=True)


def open_and_add(name: str, folder: str, *arguments: str) -> None:
    add_missing(open_engine(name, folder, DIM), *arguments)


def kill_while_it_adds(name: str, folder: Path, rng: np.random.Generator, most_batches: int) -> int:
    """SIGKILL an adder at a random moment after a random batch; returns how many batches it had said were added."""
    process = Child(open_and_add, name, str(folder))
    batches = int(rng.integers(1, most_batches + 1))
    lines = [process.stdout.readline() for _ in range(2 * batches - 1)]
    time.sleep(float(rng.uniform(0, 0.02)))
    process.kill()
    lines += process.stdout.readlines()
    return lines.count("added\n")


def check_kills(name: str, folder: Path, kills: int, most_batches: int) -> None:
    rng = np.random.default_rng(5)
    said = 0
    for _ in range(kills):
        said += kill_while_it_adds(name, folder, rng, most_batches)
        torn = open_engine(name, str(folder), DIM)
        assert 20 * said <= len(torn) < 400, "what was said to be added is there, and the kill came before the end"
        if name == "lance":
            assert len(torn) % 20 == 0, "a batch is there wholly or not at all"
        said = len(torn) // 20
        torn.close()
    whole = open_engine(name, str(folder), DIM)
    add_missing(whole)
    assert whole.get([document.id for document in documents(400)]) == documents(400)
    assert len(list(whole.ids())) == len(whole) == 400
    queries = vectors(5, seed=9)
    scores = queries @ vectors(400).T
    for passages, row in zip(whole.search(queries, 400), scores, strict=True):
        by_id = {passage.document.id: passage.score for passage in passages}
        np.testing.assert_allclose([by_id[f"d{i}"] for i in range(400)], row, atol=1e-5)
    whole.close()


def test_killed_while_it_adds_and_started_again_it_holds_the_same(name: str, tmp_path: Path) -> None:
    check_kills(name, tmp_path / "v", kills=1, most_batches=10)


@pytest.mark.slow
def test_killed_twenty_times_it_holds_the_same(name: str, tmp_path: Path) -> None:
    check_kills(name, tmp_path / "v", kills=20, most_batches=1)


def test_two_writers_lose_nothing(name: str, tmp_path: Path) -> None:
    """LanceDB takes both; Qdrant's embedded form refuses the second."""
    mine = open_engine(name, str(tmp_path / "v"), DIM)
    other = Child(open_and_add, name, str(tmp_path / "v"), "other", "100")
    try:
        if name == "lance":
            other.stdout.readline()
            add_missing(mine, "mine", 100)
            other.stdout.read()
            assert other.wait() == 0
            expected = {document.id for prefix in ("mine", "other") for document in documents(100, prefix)}
            assert set(mine.ids()) == expected
            assert len(mine) == 200
        else:
            with pytest.raises(CheckpointError, match="already accessed by another instance"):
                open_engine(name, str(tmp_path / "v"), DIM)
            assert other.wait() == 1
            mine.upsert(documents(1), vectors(1))
            assert len(mine) == 1
    finally:
        other.kill()
        mine.close()


def test_a_process_that_was_killed_while_it_made_the_folder_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / "lance" / "documents.lance" / "_transactions").mkdir(parents=True)
    (tmp_path / "qdrant").mkdir()
    (tmp_path / "qdrant" / "meta.json").touch()
    for name in ("lance", "qdrant"):
        engine = open_engine(name, str(tmp_path / name), DIM)
        engine.upsert(documents(3), vectors(3))
        assert len(engine) == 3
        engine.close()


@pytest.mark.parametrize(
    ("name", "pattern"), [("lance", "**/_versions/*.manifest"), ("qdrant", "meta.json"), ("qdrant", "**/storage.sqlite")]
)
def test_a_damaged_folder_is_named(name: str, pattern: str, tmp_path: Path) -> None:
    engine = open_engine(name, str(tmp_path / "v"), DIM)
    engine.upsert(documents(3), vectors(3))
    engine.close()
    for path in (tmp_path / "v").glob(pattern):
        path.write_bytes(b"damaged" + path.read_bytes()[20:])
    with pytest.raises(CheckpointError, match=f"the vectors in {tmp_path / 'v'} cannot be read.*build the index again"):
        open_engine(name, str(tmp_path / "v"), DIM)


def test_compacting_while_adding_keeps_the_number_of_files_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lance = pytest.importorskip("unified_lm.retrieval.engines.lance")
    monkeypatch.setattr(lance, "_FEWEST_TO_MERGE", 10)
    engine = open_engine("lance", str(tmp_path / "v"), DIM)
    for document, vector in zip(documents(40), vectors(40), strict=True):
        engine.upsert([document], vector[None])
    assert engine._table.stats()["fragment_stats"]["num_fragments"] < 10  # type: ignore[attr-defined]
    assert set(engine.ids()) == {document.id for document in documents(40)}


def test_mistakes() -> None:
    with pytest.raises(ConfigError, match=r"unknown vector engine 'lancedb'\. Did you mean 'lance'"):
        open_engine("lancedb", "x", DIM)


def test_a_server_that_does_not_answer_or_refuses_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match=r"no Qdrant server answers at http://127\.0\.0\.1:9/things"):
        open_engine("qdrant", "http://127.0.0.1:9/things", DIM)
    with pytest.raises(ConfigError, match=r"without user, password or query.*QDRANT_API_KEY") as refused:
        open_engine("qdrant", "https://me:secret@127.0.0.1:9/things", DIM)
    assert "secret" not in str(refused.value)
    monkeypatch.setenv("QDRANT_API_KEY", "the key")
    refusal = r"refuses: .*401(?s:.*)QDRANT_API_KEY, which is set"
    with refusing_server() as (address, keys), pytest.raises(CheckpointError, match=refusal) as error:
        open_engine("qdrant", address, DIM)
    assert "the key" in keys
    assert "the key" not in str(error.value)


@contextmanager
def refusing_server() -> Iterator[tuple[str, list[str | None]]]:
    """A server that answers every request with 401; gives its address and the keys that it was sent."""
    keys: list[str | None] = []

    class Refuses(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            keys.append(self.headers.get("api-key"))
            self.send_error(401)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Refuses)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/things", keys
    server.shutdown()
    server.server_close()


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delitem(sys.modules, "unified_lm.retrieval.engines.lance", raising=False)
    monkeypatch.setitem(sys.modules, "lancedb", None)
    with pytest.raises(ConfigError, match=r"needs lancedb: pip install 'unified_lm\[rag\]'"):
        open_engine("lance", str(tmp_path), DIM)
