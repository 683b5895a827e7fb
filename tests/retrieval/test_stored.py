"""Keys and values on disk come back as they were stored, within a budget, and whatever happens to the files."""

import multiprocessing
import random
import sqlite3
import time
import warnings
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.full_disk import full_disk
from unified_lm.batch import Block
from unified_lm.core.errors import ConfigError, OutputError, UserError
from unified_lm.models.key_values import KeyValueCache
from unified_lm.retrieval.stored import FORMS, STATES, KeyValueStore

STRANGE = ["it's", 'a "quote"', "naïve 日本", "two\nlines", "", "../../etc", "x" * 3000, "a\0b", "a\0c", "lone \ud800"]


def cache(tokens: int = 12, seed: int = 0, start: int = 0) -> KeyValueCache:
    generator = torch.Generator().manual_seed(seed)
    layers = tuple(
        (torch.randn(2, tokens, 8, generator=generator) * 3, torch.randn(2, tokens, 6, generator=generator)) for _ in range(3)
    )
    ids = torch.randint(0, 99, (tokens,), generator=generator)
    return KeyValueCache(ids, torch.arange(start, start + tokens), layers, (Block(2, tokens, bidirectional=True),))


def same(a: KeyValueCache | None, b: KeyValueCache, tolerance: float = 0.0) -> bool:
    assert a is not None
    assert torch.equal(a.token_ids, b.token_ids)
    assert torch.equal(a.position_ids, b.position_ids)
    assert a.blocks == b.blocks
    pairs = [(x.float(), y.float()) for one, two in zip(a.layers, b.layers, strict=True) for x, y in zip(one, two, strict=True)]
    return all(float((x - y).abs().max()) <= tolerance * float(y.abs().max()) for x, y in pairs)


@pytest.mark.parametrize(("form", "error"), [("float32", 0.0), ("bfloat16", 2**-8), ("float16", 2**-11), ("int8", 0.01)])
def test_every_form_comes_back(form: str, error: float, tmp_path: Path) -> None:
    with KeyValueStore(tmp_path, form) as store:
        store.put("a", "bidirectional", cache(start=5))
        assert store.get("a", "causal") is None
        assert same(store.get("a", "bidirectional"), cache(start=5), error)
        if error:
            assert not same(store.get("a", "bidirectional"), cache(start=5), error / 50)
        exact = cache().to(dtype=FORMS[form]) if form != "int8" else None
        if exact is not None:
            store.put("b", "causal", exact)
            assert same(store.get("b", "causal"), exact), "what is in the form already is not changed"
        assert store.get("a", "bidirectional", dtype=torch.float64).layers[0][0].dtype is torch.float64  # type: ignore[union-attr]


def test_it_is_there_after_a_restart_under_any_id(tmp_path: Path) -> None:
    with KeyValueStore(tmp_path, "float32") as store:
        for number, id in enumerate(STRANGE):
            store.put(id, STATES[number % 2], cache(seed=number))
        size = store.num_bytes
    with KeyValueStore(tmp_path, "float32") as store:
        assert (len(store), store.num_bytes) == (len(STRANGE), size)
        for number, id in enumerate(STRANGE):
            assert same(store.get(id, STATES[number % 2]), cache(seed=number))
        assert {row.id for row in store.entries()} == set(STRANGE)
        assert store.delete([*STRANGE[:2], "missing"]) == 2
        assert not store.has(STRANGE[0], STATES[0])
    files = list((tmp_path / "entries").rglob("*.safetensors"))
    assert len(files) == len(STRANGE) - 2
    with KeyValueStore(tmp_path) as store:
        assert sum(file.stat().st_size for file in files) == store.num_bytes


def test_equal_entries_are_equal_files(tmp_path: Path) -> None:
    """Whatever interrupted the writer, the same documents leave the same files."""
    for name in ("one", "two"):
        with KeyValueStore(tmp_path / name) as store:
            store.put("a", "causal", cache())
            store.put("a", "causal", cache())
    one, two = (
        {p.relative_to(tmp_path / n): p.read_bytes() for p in (tmp_path / n).rglob("*.safetensors")} for n in ("one", "two")
    )
    assert one == two
    assert len(one) == 1


def test_layers_may_differ_and_share_memory(tmp_path: Path) -> None:
    keys = torch.randn(2, 12, 8)
    wide = torch.randn(4, 12, 16)
    mixed = replace(cache(), layers=((keys, keys), (keys, wide[:, :, ::2]), (wide, keys[:1]), (keys[1:], keys)))
    for form, error in (("float32", 0.0), ("int8", 0.02)):
        with KeyValueStore(tmp_path / form, form) as store:
            store.put("a", "causal", mixed)
            assert same(store.get("a", "causal"), mixed, error)


def test_the_least_recently_used_ones_make_room(tmp_path: Path) -> None:
    with KeyValueStore(tmp_path / "one", "float32") as store:
        store.put("a", "causal", cache())
        one = store.num_bytes
    with KeyValueStore(tmp_path / "some", "float32", budget_bytes=3 * one + 100) as store:
        for id in "abc":
            store.put(id, "causal", cache())
        assert same(store.get("a", "causal"), cache())
        store.put("d", "causal", cache())
        assert [store.has(id, "causal") for id in "abcd"] == [True, False, True, True]
        store.put("c", "causal", cache(seed=9))
        assert same(store.get("c", "causal"), cache(seed=9))
        assert store.num_bytes <= 3 * one + 100
        with pytest.raises(UserError, match=r"more than the disk budget of [\d,]+ bytes\. Raise budget_bytes"):
            store.put("long", "causal", cache(tokens=200))
        assert len(store) == 3, "nothing was evicted for what cannot be stored"


@pytest.mark.parametrize("damage", ["truncated", "altered", "missing"])
def test_damaged_files_are_found_and_forgotten(damage: str, tmp_path: Path) -> None:
    with KeyValueStore(tmp_path, "float32") as store:
        store.put("a", "causal", cache())
        store.put("b", "causal", cache(seed=1))
        file = next(path for path in (tmp_path / "entries").rglob("*.safetensors") if b'\\"a\\"' in path.read_bytes()[:4000])
        content = bytearray(file.read_bytes())
        content[-9] ^= 1
        {
            "truncated": lambda: file.write_bytes(content[:-20]),
            "altered": lambda: file.write_bytes(content),
            "missing": file.unlink,
        }[damage]()
        with pytest.warns(UserWarning, match=f"is {damage}.*document 'a' is read again"):
            assert store.get("a", "causal") is None
        assert not store.has("a", "causal")
        assert same(store.get("b", "causal"), cache(seed=1))
        store.put("a", "causal", cache())
        assert same(store.get("a", "causal"), cache())


@pytest.mark.parametrize("damage", ["empty", "no database", "half", "missing"])
def test_a_lost_ledger_is_built_again(damage: str, tmp_path: Path) -> None:
    with KeyValueStore(tmp_path, "float32") as store:
        for number in range(5):
            store.put(f"d{number}", "causal", cache(seed=number))
        size = store.num_bytes * 4 // 5
    cut = next(path for path in (tmp_path / "entries").rglob("*.safetensors") if b"d4" in path.read_bytes()[:2000])
    cut.write_bytes(cut.read_bytes()[:-1])
    ledger = tmp_path / "ledger.sqlite"
    content = ledger.read_bytes()
    assert not list(tmp_path.glob("ledger.sqlite-*")), "a store that was closed is complete in one file"
    ledger.unlink()
    left = {"empty": b"", "no database": b"no database" * 500, "half": content[: len(content) // 2]}.get(damage)
    if left is not None:
        ledger.write_bytes(left)
    with pytest.warns(UserWarning, match=f"was {'missing' if left is None else 'torn'}; it is built again.*of 4 entries"):
        rebuilt = KeyValueStore(tmp_path, "float32", budget_bytes=size + 100)
    with rebuilt as store:
        assert (len(store), store.num_bytes) == (4, size)
        assert same(store.get("d3", "causal"), cache(seed=3))
        store.put("new", "causal", cache())
        assert not cut.exists()
        assert [store.has(f"d{number}", "causal") for number in range(5)] == [False, True, True, True, False], (
            "oldest file first"
        )


def test_files_without_a_row_are_swept_and_others_may_read(tmp_path: Path) -> None:
    with KeyValueStore(tmp_path, "float32") as store:
        store.put("a", "causal", cache())
        store.put("b", "causal", cache())
    with sqlite3.connect(tmp_path / "ledger.sqlite") as ledger:
        ledger.execute("DELETE FROM entries WHERE id = ?", ('"b"',))
    with KeyValueStore(tmp_path, "float32") as writer, KeyValueStore(tmp_path, "float32") as reader:
        assert len(list((tmp_path / "entries").rglob("*.safetensors"))) == 2
        writer.put("c", "causal", cache(seed=2))
        assert len(list((tmp_path / "entries").rglob("*.safetensors"))) == 2
        assert same(reader.get("c", "causal"), cache(seed=2)), "one writes, others read"


def test_a_reader_waits_for_no_writer(tmp_path: Path) -> None:
    """A use that cannot be recorded at once is recorded later, and counts."""
    with KeyValueStore(tmp_path, "float32") as store:
        for id in "abc":
            store.put(id, "causal", cache())
        store.budget_bytes = store.num_bytes
        with closing(sqlite3.connect(tmp_path / "ledger.sqlite", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            begin = time.monotonic()
            assert same(store.get("a", "causal"), cache())
            assert time.monotonic() - begin < 5
            other.execute("ROLLBACK")
        store.put("d", "causal", cache())
        assert [store.has(id, "causal") for id in "abcd"] == [True, False, True, True]


def test_a_store_that_cannot_be_written_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with KeyValueStore(tmp_path, "float32") as store:
        store.put("a", "causal", cache())
        store.put("b", "causal", cache(seed=1))
    monkeypatch.setattr("unified_lm.retrieval.ledger.os.access", lambda *_: False)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    file = next((tmp_path / "entries").rglob("*.safetensors"))
    with KeyValueStore(tmp_path, "float32") as store:
        assert same(store.get("a", "causal"), cache())
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
        file.write_bytes(b"")
        damaged = [id for id in "ab" if _reads_with_a_warning(store, id)]
        assert len(damaged) == 1
        assert store.has(damaged[0], "causal"), "nothing is forgotten that cannot be"
    (tmp_path / "ledger.sqlite").unlink()
    with pytest.raises(OutputError, match="without the right to write"):
        KeyValueStore(tmp_path, "float32")


def _reads_with_a_warning(store: KeyValueStore, id: str) -> bool:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert (store.get(id, "causal") is None) == bool(caught)
    return bool(caught)


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    with KeyValueStore(tmp_path, "float32") as store:
        store.put("a", "causal", cache())
        with full_disk(200_000), pytest.raises(OutputError, match=r"could not write .*untouched\. Make room on the disk"):
            store.put("a", "causal", cache(tokens=2000))
        assert same(store.get("a", "causal"), cache())
        assert len([path for path in (tmp_path / "entries").rglob("*") if path.is_file()]) == 1


IDS = [f"d{number}" for number in range(6)]


def version_of(id: str, number: int) -> KeyValueCache:
    """Entries of several sizes whose whole content follows from their first token."""
    made = cache(tokens=20 + number % 7, seed=1000 * IDS.index(id) + number)
    made.token_ids[0] = number
    return made


def whole(store: KeyValueStore, id: str) -> bool:
    found = store.get(id, "causal")
    return found is None or same(found, version_of(id, int(found.token_ids[0])))


def _write_without_end(folder: Path, started: Any, first: int, budget: int) -> None:
    torch.set_num_threads(1)
    store = KeyValueStore(folder, "float32", budget)
    for number in range(first, 1 << 30):
        store.put(IDS[number % len(IDS)], "causal", version_of(IDS[number % len(IDS)], number))
        started.set()
        if number % 11 == 0:
            store.delete([IDS[number % 5]])
        if number % 17 == 0:
            store.flush()


def _read_until(folder: Path, finished: Any) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    with KeyValueStore(folder, "float32") as store:
        count = 0
        while not finished.is_set():
            assert all(whole(store, id) for id in IDS)
            count += 1
    assert count > 1


FORK = multiprocessing.get_context("fork")
"""A fork needs no imports; the stores are opened in the children."""


def test_sigkill_at_any_moment_leaves_whole_entries(tmp_path: Path) -> None:
    dice, budget = random.Random(7), 5 * 9000
    for turn in range(12):
        started = FORK.Event()
        writer = FORK.Process(target=_write_without_end, args=(tmp_path, started, 1000 * turn, budget))
        writer.start()
        assert started.wait(30)
        time.sleep(dice.uniform(0, 0.05))
        writer.kill()
        writer.join()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with KeyValueStore(tmp_path, "float32", budget) as store:
                assert all(whole(store, id) for id in IDS)
                assert store.num_bytes == sum(row.num_bytes for row in store.entries()) <= budget
                assert len(store) == len(list(store.entries()))
                store.put(IDS[0], "causal", version_of(IDS[0], 999_999))
                files = [path for path in (tmp_path / "entries").rglob("*") if path.is_file()]
                assert sum(path.stat().st_size for path in files) == store.num_bytes, "what the killed one left is gone"


def test_two_read_while_one_writes(tmp_path: Path) -> None:
    """Entries are replaced, evicted and deleted under the readers' hands: each reads a whole one or none, and no warning."""
    finished = FORK.Event()
    started = FORK.Event()
    writer = FORK.Process(target=_write_without_end, args=(tmp_path, started, 0, 4 * 9000))
    writer.start()
    assert started.wait(30)
    readers = [FORK.Process(target=_read_until, args=(tmp_path, finished)) for _ in range(2)]
    for reader in readers:
        reader.start()
    time.sleep(1)
    alive = writer.is_alive()
    finished.set()
    for reader in readers:
        reader.join(30)
    writer.kill()
    writer.join()
    assert alive
    assert [reader.exitcode for reader in readers] == [0, 0]


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown form of key-values 'int4'"):
        KeyValueStore(tmp_path, "int4")
    with pytest.raises(ConfigError, match="stores nothing"):
        KeyValueStore(tmp_path, budget_bytes=0)
    with KeyValueStore(tmp_path, "float16") as store:
        with pytest.raises(ConfigError, match="unknown states 'whole'"):
            store.has("a", "whole")
        large = replace(cache(), layers=tuple((k * 1e6, v) for k, v in cache().layers))
        with pytest.raises(ConfigError, match="beyond the range of float16"):
            store.put("a", "causal", large)
        assert len(store) == 0
