"""A folder of vectors comes out the same whoever fills it: one process, several, or one that is killed and started again."""

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.full_disk import full_disk
from tests.processes import Child
from unified_lm.cli.main import main
from unified_lm.core.errors import CheckpointError, ConfigError, DataError, OutputError
from unified_lm.inference import EmbedBatch, UnifiedLM
from unified_lm.retrieval import vector_folder, vector_work
from unified_lm.retrieval.documents import Document
from unified_lm.retrieval.vector_folder import embed_documents
from unified_lm.retrieval.vector_work import LOCK, alone_in

COUNT = 41


def documents(count: int = COUNT) -> list[Document]:
    return [Document(f"d{i}", f"Text {i} " + "word " * (i * 7 % 11), f"f, line {i}") for i in range(count)]


def fill(folder: Path, model: UnifiedLM, count: int = COUNT, **options: object) -> vector_folder.Embedded:
    return embed_documents(folder, model, lambda: documents(count), shard_rows=8, **options)  # type: ignore[arg-type]


def vectors(folder: Path) -> np.ndarray:
    return np.load(folder / "vectors.npy", mmap_mode="r")


def test_vectors_are_those_of_encode_in_order(tmp_path: Path, model: UnifiedLM) -> None:
    seen: list[tuple[int, int]] = []
    done = fill(tmp_path / "v", model, progress=lambda finished, total: seen.append((finished, total)), instruction="Find it.")
    expected = model.encode([document.text for document in documents()], "Find it.")
    np.testing.assert_allclose(vectors(tmp_path / "v"), expected, atol=2e-6)
    assert (done.rows, done.own_rows, done.truncated) == (COUNT, COUNT, 0)
    assert seen == [(8, 41), (16, 41), (24, 41), (32, 41), (40, 41), (41, 41)]
    table = pq.read_table(tmp_path / "v" / "documents.parquet").to_pydict()
    assert table == {"id": [d.id for d in documents()], "origin": [d.origin for d in documents()]}
    assert {path.name for path in (tmp_path / "v").iterdir()} == {
        *("vectors.npy", "documents.parquet", "embeddings.json", ".embeddings.lock")
    }
    before = (tmp_path / "v" / "vectors.npy").stat().st_mtime_ns
    assert fill(tmp_path / "v", model, instruction="Find it.").own_rows == 0
    assert (tmp_path / "v" / "vectors.npy").stat().st_mtime_ns == before


def test_half_precision_and_cut_texts(tmp_path: Path, model: UnifiedLM) -> None:
    long = [Document("long", "word " * 500), Document("short", "word")]
    for form in ("float16", "float32"):
        done = embed_documents(tmp_path / form, model, lambda: long, form=form)
        assert done.truncated == 1
        assert vectors(tmp_path / form).dtype == form
    np.testing.assert_array_equal(vectors(tmp_path / "float16"), vectors(tmp_path / "float32").astype(np.float16))


class StoppedError(Exception):
    """What ends a process in the middle here."""


def stopping(after: int) -> Iterator[None]:
    for _ in range(after):
        yield
    raise StoppedError


@pytest.mark.parametrize("after", range(6))
def test_it_goes_on_behind_every_shard(after: int, tmp_path: Path, model: UnifiedLM, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "whole", model)
    steps = stopping(after)
    with monkeypatch.context() as patch:
        embed = model.embedder.embed
        patch.setattr(model.embedder, "embed", lambda *a, **k: (next(steps), embed(*a, **k))[1])
        with pytest.raises(StoppedError) as stopped:
            fill(tmp_path / "v", model)
    assert stopped.traceback  # held on to, so that claims are given up by the code and not by the garbage collector
    assert not (tmp_path / "v" / "vectors.npy").exists(), "what is not complete must not look so"
    assert fill(tmp_path / "v", model).own_rows == COUNT - 8 * after
    assert vectors(tmp_path / "v").tobytes() == vectors(tmp_path / "whole").tobytes()


def fill_slowly(folder: str, export: str, seconds: float) -> None:
    """A process that can be killed in the middle of a shard, and on either side of its mark."""
    model = UnifiedLM.from_pretrained(export)
    embed = model.embedder.embed
    model.embedder.embed = lambda *a, **k: (time.sleep(seconds), embed(*a, **k))[1]  # type: ignore[method-assign]
    print("ready", flush=True)
    fill(Path(folder), model)


def killed_and_resumed(times: int, tmp_path: Path, export: Path, model: UnifiedLM) -> None:
    fill(tmp_path / "whole", model)
    rng = np.random.default_rng(5)
    for _ in range(times):
        process = Child(fill_slowly, str(tmp_path / "v"), str(export), 0.02)
        assert process.stdout.readline() == "ready\n"
        time.sleep(float(rng.uniform(0.0, 0.15)))
        process.kill()
    fill(tmp_path / "v", model)
    assert vectors(tmp_path / "v").tobytes() == vectors(tmp_path / "whole").tobytes()
    assert fill(tmp_path / "v", model).own_rows == 0


def test_killed_and_started_again_it_is_the_same_file(tmp_path: Path, export: Path, model: UnifiedLM) -> None:
    killed_and_resumed(2, tmp_path, export, model)


@pytest.mark.slow
def test_killed_forty_times_it_is_the_same_file(tmp_path: Path, export: Path, model: UnifiedLM) -> None:
    killed_and_resumed(40, tmp_path, export, model)


def test_processes_share_the_work_and_take_over_from_a_killed_one(tmp_path: Path, export: Path, model: UnifiedLM) -> None:
    fill(tmp_path / "whole", model)
    workers = [Child(fill_slowly, str(tmp_path / "v"), str(export), seconds) for seconds in (30.0, 0.01)]
    for worker in workers:
        assert worker.stdout.readline() == "ready\n"
    while len(list((tmp_path / "v" / "shards").glob("*.json"))) < 3:  # the second one works around the first one's shards
        time.sleep(0.02)
    workers[0].kill()
    assert workers[1].wait() == 0
    assert vectors(tmp_path / "v").tobytes() == vectors(tmp_path / "whole").tobytes()


def test_other_settings_texts_or_models_are_refused(tmp_path: Path, model: UnifiedLM, other_model: object) -> None:
    fill(tmp_path / "v", model)
    expected = vectors(tmp_path / "v").tobytes()
    with pytest.raises(CheckpointError, match=r"instruction is '', now 'Find it\.'"):
        fill(tmp_path / "v", model, instruction="Find it.")
    with pytest.raises(CheckpointError, match="form is 'float32', now 'float16'"):
        fill(tmp_path / "v", model, form="float16")
    for count, row in ((COUNT - 1, 41), (COUNT - 3, 33), (COUNT + 1, 41), (COUNT + 8, 41), (16, 17)):
        with pytest.raises(DataError, match=f"from row {row} on are not those"):
            fill(tmp_path / "v", model, count=count)
    with pytest.raises(CheckpointError, match="model_key is"):
        fill(tmp_path / "v", other_model(family="mistral"))  # type: ignore[operator]
    assert vectors(tmp_path / "v").tobytes() == expected


def test_what_cannot_be_embedded_is_refused_before_any_work(tmp_path: Path, model: UnifiedLM) -> None:
    def texts(*given: str) -> list[Document]:
        return [Document(f"{i}", text, f"f.txt, line {i + 1}") for i, text in enumerate(given)]

    with pytest.raises(DataError, match=r"f\.txt, line 2 is empty"):
        embed_documents(tmp_path / "v", model, lambda: texts("a", "  ", "b"))
    assert embed_documents(tmp_path / "v", model, lambda: texts("a", "b")).rows == 2, "a failed first pass leaves nothing"
    with pytest.raises(DataError, match="no rows"):
        embed_documents(tmp_path / "none", model, list)
    with pytest.raises(ConfigError, match="form: got 'int8'"):
        embed_documents(tmp_path / "form", model, documents, form="int8")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"notes\.txt"):
        fill(tmp_path / "mine", model)


@pytest.mark.parametrize("there", [None, (), (LOCK,)], ids=["no folder", "an empty folder", "a lock"])
@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "no such file or folder"),
        ("", "no rows"),
        ('{"text": "a"}\n{"text": " "}\n', "line 2 is empty"),
        ('{"a": "b"}', "no text"),
    ],
    ids=["missing", "no rows", "an empty text", "no column"],
)
def test_what_cannot_be_read_leaves_no_folder(
    content: str | None,
    told: str,
    there: tuple[str, ...] | None,
    tmp_path: Path,
    export: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows, out = tmp_path / "rows.jsonl", tmp_path / "v"
    if content is not None:
        rows.write_text(content)
    if there is not None:
        out.mkdir()
        for name in there:
            (out / name).touch()
    assert main(["embed", str(rows), "--model", str(export), "--out", str(out), "--device", "cpu"]) == 2
    assert told in capsys.readouterr().err
    assert out.exists() == (there is not None)
    assert there is None or not any(out.iterdir())


def test_who_waits_for_a_folder_that_is_removed_makes_it_anew(tmp_path: Path) -> None:
    """As the processes of torchrun do: the first one finds that its texts cannot be read, and the next one tries."""
    folder, order = tmp_path / "v", []

    def begin(name: str, waiting: threading.Event, error: Exception | None) -> None:
        waiting.set()
        with suppress(StoppedError), alone_in(folder):
            order.append(name)
            assert (folder / LOCK).is_file(), "what others would wait for"
            if error is not None:
                raise error
            (folder / "embeddings.json").touch()

    began = [threading.Event() for _ in range(3)]
    errors = [StoppedError(), StoppedError(), None]
    threads = [
        threading.Thread(target=begin, args=(f"{number}", event, error))
        for number, (event, error) in enumerate(zip(began, errors, strict=True))
    ]
    with suppress(StoppedError), alone_in(folder):
        for thread, event in zip(threads, began, strict=True):
            thread.start()
            assert event.wait(10)
        time.sleep(0.1)  # all of them stand at the lock
        raise StoppedError
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert sorted(order) == ["0", "1", "2"]
    assert sorted(path.name for path in folder.iterdir()) == [LOCK, "embeddings.json"]


def test_files_of_the_users_among_the_marks_stay(tmp_path: Path, model: UnifiedLM) -> None:
    fill(tmp_path / "v", model)
    shards = tmp_path / "v" / "shards"
    names = ("mine.txt", "1.json", "00000000.json.bak", "a00000000.json", ".00000000.json", "00000001.npy")
    shards.mkdir()
    for name in names:
        (shards / name).write_text("mine")
    for name in ("00000000.json", "00000005.lock", ".00000003.json.host-1.building.json"):
        (shards / name).write_text("ours, of a process that was killed before it could remove it")
    assert fill(tmp_path / "v", model).own_rows == 0
    assert sorted(path.name for path in shards.iterdir()) == sorted(names)
    # the same in a folder whose first pass did not end
    (tmp_path / "w" / "shards").mkdir(parents=True)
    (tmp_path / "w" / LOCK).touch()
    (tmp_path / "w" / "shards" / "mine.txt").write_text("mine")
    (tmp_path / "w" / "shards" / "00000000.json").write_text("{}")
    assert fill(tmp_path / "w", model).own_rows == COUNT
    assert vectors(tmp_path / "w").tobytes() == vectors(tmp_path / "v").tobytes()
    assert [path.name for path in (tmp_path / "w" / "shards").iterdir()] == ["mine.txt"]


def test_damage_is_found_before_the_file_gets_its_name(
    tmp_path: Path, model: UnifiedLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "whole", model)
    with monkeypatch.context() as patch:
        patch.setattr(vector_work.Work, "complete", lambda self: 0)
        fill(tmp_path / "v", model)
    partial = tmp_path / "v" / "vectors.npy.partial"
    content = bytearray(partial.read_bytes())
    content[-5] ^= 1
    partial.write_bytes(content)
    with pytest.raises(CheckpointError, match="1 of 6 shards"):
        fill(tmp_path / "v", model)
    assert fill(tmp_path / "v", model).own_rows == 1
    assert vectors(tmp_path / "v").tobytes() == vectors(tmp_path / "whole").tobytes()
    manifest = tmp_path / "v" / "embeddings.json"
    whole = json.loads(manifest.read_text())
    for told, broken in (
        ("not valid JSON", "{"),
        ("got \\[\\]", "[]"),
        ("nested too deeply", "[" * 100_000),
        ("missing field 'model_key'", json.dumps({"format": 1})),
        ("has format 9", json.dumps({"format": 9})),
        ("rows: got inf", json.dumps({**whole, "rows": float("inf")})),
        ("6 hashes for 48000 texts", json.dumps({**whole, "rows": 48000})),
        ("digests: got 5", json.dumps({**whole, "digests": 5})),
    ):
        manifest.write_text(broken)
        with pytest.raises(CheckpointError, match=rf"embeddings\.json.*{told}.*embed again"):
            fill(tmp_path / "v", model)


def test_a_full_disk_is_one_error_with_the_path(tmp_path: Path, model: UnifiedLM, monkeypatch: pytest.MonkeyPatch) -> None:
    partial = str(tmp_path / "v" / "vectors.npy.partial")
    with full_disk(8000), pytest.raises(OSError, match="File too large") as caught:  # no room for all vectors
        fill(tmp_path / "v", model)
    assert caught.value.filename == partial
    store = vector_work.Work.store

    def refused(work: vector_work.Work, number: int, *rest: object) -> None:
        with full_disk(8000):
            store(work, number, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(vector_work.Work, "store", refused)
        with pytest.raises(OSError, match="File too large") as caught:  # nor for those of a later shard
            fill(tmp_path / "v", model)
    assert caught.value.filename == partial
    assert fill(tmp_path / "v", model).own_rows < COUNT, "it goes on with what was not written"


def test_the_command(tmp_path: Path, export: Path, model: UnifiedLM, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"id": i, "body": f"text {i}"}) + "\n" for i in range(5)))
    arguments = ["embed", str(rows), "--model", str(export), "--out", str(tmp_path / "v"), "--device", "cpu"]
    assert main([*arguments, "--column", "body"]) == 0
    assert "5 vectors of 64 dimensions" in capsys.readouterr().out
    np.testing.assert_allclose(vectors(tmp_path / "v"), model.encode([f"text {i}" for i in range(5)]), atol=2e-6)
    assert main(arguments) == 2
    assert "no text under 'text' among [id, body]" in capsys.readouterr().err


def test_a_batch_gets_a_column_of_vectors(export: Path, model: UnifiedLM) -> None:
    embed = EmbedBatch(str(export), device="cpu", instruction="Find it.")
    batch = {"id": np.arange(3), "text": np.array(["a", "b c", "d"], dtype=object)}
    found = embed(batch)
    assert list(found) == ["id", "text", "embedding"]
    np.testing.assert_array_equal(found["embedding"], model.encode(["a", "b c", "d"], "Find it."))
    with pytest.raises(DataError, match=r"no column 'text' among \[txt\]"):
        embed({"txt": batch["text"]})
    with pytest.raises(DataError, match="'embedding' already"):
        embed(found)
    with pytest.raises(DataError, match=r"texts\[1\]: character 0 is half of a surrogate pair"):
        embed({"text": np.array(["a", "\ud800"], dtype=object)})


@pytest.mark.slow
def test_torchrun_fills_one_folder(tmp_path: Path, export: Path, model: UnifiedLM) -> None:
    rows = tmp_path / "rows.txt"
    rows.write_text("".join(f"{document.text}\n" for document in documents()))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "unified_lm", "embed"]
    options = ["--model", str(export), "--out", str(tmp_path / "v"), "--shard-rows", "4", "--device", "cpu"]
    done = subprocess.run([*command, str(rows), *options], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("41 vectors") == 2
    np.testing.assert_allclose(vectors(tmp_path / "v"), model.encode([document.text for document in documents()]), atol=2e-6)


def many_texts(folder: str, export: str, count: int) -> None:
    """Prints the most memory that this process had, in MB, after `count` texts."""
    model = UnifiedLM.from_pretrained(export, device="cpu")
    embed_documents(Path(folder), model, lambda: (Document(f"{i}", f"text number {i}") for i in range(count)))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, flush=True)


@pytest.mark.slow
def test_memory_is_flat_over_50000_texts(tmp_path: Path, export: Path) -> None:
    used = []
    for count in (5_000, 50_000):
        child = Child(many_texts, str(tmp_path / f"v{count}"), str(export), count)
        used.append(int(child.stdout.readline()))
        assert child.wait() == 0
    assert vectors(tmp_path / "v50000").shape == (50_000, 64)
    # the file itself has 13 MB, all texts as Python objects some 10; noise of the allocator is some 20
    assert used[1] < used[0] + 40, used


@pytest.mark.slow
def test_ray_loses_nothing_with_a_killed_worker(tmp_path: Path, export: Path, model: UnifiedLM) -> None:
    ray = pytest.importorskip("ray", reason="needs the extra ray")
    data = pytest.importorskip("ray.data", reason="needs the extra ray")

    class Telling(EmbedBatch):
        """Leaves its process id, and is slow enough to be killed at work."""

        def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:  # type: ignore[override]
            (tmp_path / f"{os.getpid()}.pid").touch()
            time.sleep(0.2)
            return super().__call__(batch)

    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, object_store_memory=100_000_000)
    try:
        rows = data.from_items([{"id": i, "text": f"text {i}"} for i in range(200)], override_num_blocks=20)
        pool = data.ActorPoolStrategy(size=2)
        made = rows.map_batches(
            Telling, fn_constructor_kwargs={"model": str(export), "device": "cpu"}, batch_size=10, compute=pool
        )
        found: list[dict[str, object]] = []
        for row in made.iter_rows():
            found.append(row)
            if not (tmp_path / "killed").exists():
                os.kill(int(next(tmp_path.glob("*.pid")).stem), signal.SIGKILL)
                (tmp_path / "killed").touch()
    finally:
        ray.shutdown()
    assert (tmp_path / "killed").exists()
    found.sort(key=lambda row: int(str(row["id"])))
    assert [row["id"] for row in found] == list(range(200))
    expected = model.encode([f"text {i}" for i in range(200)])
    np.testing.assert_allclose(np.stack([np.asarray(row["embedding"]) for row in found]), expected, atol=2e-6)
