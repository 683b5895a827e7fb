"""Hard negatives of the built-in pairs: neighbors by name, never the answer."""

from __future__ import annotations

from unified_lm.data.pydocs.negatives import object_name, with_negatives


def row(name: str) -> dict:
    return {"query": ["", f"what {name} does"], "pos": [["", f"{name}(x)\nbody of {name}"]]}


def test_the_nearest_names_come_first() -> None:
    rows = [row(name) for name in ("a.b.C.one", "a.b.C.two", "a.b.other", "a.c.far", "z.far.away")]
    first = with_negatives(rows, count=3)[0]
    names = [object_name({"pos": [negative]}) for negative in first["neg"]]
    assert names == ["a.b.C.two", "a.b.other", "a.c.far"]
    assert first["query"] == rows[0]["query"]


def test_every_row_gets_as_many_and_never_its_own_answer() -> None:
    rows = [row(f"pkg.m{i % 3}.f{i}") for i in range(20)]
    result = with_negatives(rows)
    assert [len(r["neg"]) for r in result] == [7] * 20
    assert all(r["pos"][0] not in r["neg"] for r in result)
    assert result == with_negatives(rows), "the same on every machine"
