"""Keys and values on disk come back as they were stored, within a budget, and whatever happens to the files."""

import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from unified_lm.batch import Block
from unified_lm.core.errors import ConfigError, UserError
from unified_lm.models.key_values import KeyValueCache
from unified_lm.retrieval.stored import FORMS, STATES, KeyValueStore

STRANGE = ["it's", 'a "quote"', "naïve 日本", "two\nlines", "", "../../etc", "x" * 3000]


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
    assert sum(file.stat().st_size for file in files) == KeyValueStore(tmp_path).num_bytes


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
        file = next(path for path in (tmp_path / "entries").rglob("*.safetensors") if b'"a\\"' in path.read_bytes()[:4000])
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


@pytest.mark.parametrize("damage", [b"", b"no database" * 500, None])
def test_a_lost_ledger_is_built_again(damage: bytes | None, tmp_path: Path) -> None:
    with KeyValueStore(tmp_path, "float32") as store:
        for number in range(4):
            store.put(f"d{number}", "causal", cache(seed=number))
        size = store.num_bytes
    for file in tmp_path.glob("ledger.sqlite*"):
        file.unlink()
    if damage is not None:
        (tmp_path / "ledger.sqlite").write_bytes(damage)
    with pytest.warns(UserWarning, match="ledger"):
        rebuilt = KeyValueStore(tmp_path, "float32")
    with rebuilt as store:
        assert (len(store), store.num_bytes) == (4, size)
        assert same(store.get("d3", "causal"), cache(seed=3))


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
