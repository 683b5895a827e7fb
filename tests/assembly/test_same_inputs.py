"""Ranks whose files differ do not train together."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path

import pytest

from tests.engine.small_run import small_run
from tests.processes import Group
from unified_lm.assembly.same_inputs import require_same
from unified_lm.core import distributed
from unified_lm.core.errors import DataError


def on_its_own_node(folder: str, rank: int) -> None:
    os.chdir(Path(folder) / f"node{rank}")


def write_nodes(tmp_path: Path, stale: str) -> list[str]:
    """A folder of rows for each rank, of which rank 1's lacks the last row; returns the run's arguments."""
    small_run(tmp_path, tmp_path / "run")
    for rank in range(2):
        (tmp_path / f"node{rank}").mkdir()
        for name in ("pairs", "chats"):
            lines = (tmp_path / f"{name}.jsonl").read_text().splitlines(keepends=True)
            kept = lines[:-1] if (rank, name) == (1, stale) else lines
            (tmp_path / f"node{rank}" / f"{name}.jsonl").write_text("".join(kept))
    arguments = [a for a in small_run(tmp_path, tmp_path / "run", "max_steps=1") if "sources" not in a]
    sources = {"embedding": "pairs", "generation": "chats"}
    arguments += [f"streams.{stream}.sources=[{{path: {name}.jsonl}}]" for stream, name in sources.items()]
    return [*arguments, "~validation.sources.embedding", "validation.sources.generation=[{path: chats.jsonl}]"]


@pytest.mark.parametrize("stale", ["pairs", "nothing"])
def test_a_stale_copy_on_one_node_ends_the_run_before_its_first_step(tmp_path: Path, stale: str) -> None:
    arguments = write_nodes(tmp_path, stale)
    group = Group(arguments, 2, tmp_path / "log", prepare=partial(on_its_own_node, str(tmp_path)))
    codes = group.wait()
    if stale == "nothing":
        assert codes == [0, 0], group.output()
        return
    assert codes == [2, 2], group.output()
    assert "streams.embedding: pairs.jsonl: rank 0 has 60 rows" in group.output()
    assert "rank 1 has 59 rows" in group.output()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    "fact", ["optim.learning_rate", "weights of org/model", "tokenizer", "validation.sources.generation: chats.jsonl"]
)
def test_every_fact_is_compared(monkeypatch: pytest.MonkeyPatch, fact: str) -> None:
    ours = {fact: "a", "seed": "42"}
    for others in ([ours, {**ours, fact: "b"}, ours], [ours, {"seed": "42"}, ours]):
        monkeypatch.setattr(distributed, "all_gather_objects", lambda value, others=others: json.loads(json.dumps(others)))
        with pytest.raises(DataError, match=f"{fact}: ranks 0, 2 have a; rank 1 has (b|nothing)") as refusal:
            require_same(ours)
        assert "seed" not in str(refusal.value)
