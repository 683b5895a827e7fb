"""A damaged cache of parsed rows is made again, and gives the rows of the file."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from unified_lm.config.schema import SourceConfig
from unified_lm.data.rows.records import RecordKind
from unified_lm.data.sources import open_source


def rows_of(path: Path) -> list[str]:
    return [record.text for record in open_source(SourceConfig(path=str(path)), RecordKind.TEXT, 0)]  # type: ignore[union-attr]


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(bytes(content))


def edited(shard: Path, **values: object) -> None:
    """A description of the right form that says something else."""
    path = shard / "meta.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "flipped byte of a row": lambda shard: flip(
        shard / "records.arrow", (shard / "records.arrow").read_bytes().index(b"the text 7")
    ),
    "flipped byte of the end": lambda shard: flip(shard / "records.arrow", -3),
    "cut rows": lambda shard: (shard / "records.arrow").write_bytes((shard / "records.arrow").read_bytes()[:100]),
    "no rows": lambda shard: (shard / "records.arrow").unlink(),
    "empty description": lambda shard: (shard / "meta.json").write_text(""),
    "other description": lambda shard: (shard / "meta.json").write_text("[]"),
    "fewer rows": lambda shard: edited(shard, rows=10),
    "more rows": lambda shard: edited(shard, rows=60),
    "another hash": lambda shard: edited(shard, content="0" * 32),
    "another count": lambda shard: edited(shard, rejected={"empty": 3}),
    "description of rows alone": lambda shard: (shard / "meta.json").write_text('{"rows": 20}'),
    "no description": lambda shard: (shard / "meta.json").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found_and_mended(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNIFIED_LM_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"the text {index}"}) + "\n" for index in range(20)))
    before = rows_of(path)
    (shard,) = (folder for folder in (tmp_path / "cache" / "records").iterdir() if folder.is_dir())
    DAMAGE[damage](shard)
    with pytest.warns(UserWarning, match="the cache of parsed rows of .*rows.jsonl, .* is damaged"):
        assert rows_of(path) == before
    assert rows_of(path) == before, "and without a warning from then on"
