"""What a run leaves for its report: the scores behind its held-out numbers, and a record of data, model and machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.engine.small_run import small_run
from unified_lm.cli.script import train
from unified_lm.engine.metrics import held_out_lines
from unified_lm.engine.validation_items import ItemScores, items_path, read_items


def arguments(folder: Path, *more: str) -> list[str]:
    run_dir = folder / "run"
    kept = [argument for argument in small_run(folder, run_dir) if not argument.startswith("~validation")]
    sources = f"{{embedding: [{{path: {folder}/pairs.jsonl}}], generation: [{{path: {folder}/chats.jsonl}}]}}"
    return [
        *kept,
        f"validation.sources={sources}",
        f"validation.retrieval={{queries: {{path: {folder}/pairs.jsonl}}, max_queries: 12}}",
        "validation.num_batches=3",
        "streams.embedding.batch_size=4",
        "streams.generation.batch_size=4",
        *more,
    ]


def test_the_kept_scores_make_up_the_held_out_numbers(tmp_path: Path) -> None:
    with open(tmp_path / "bad.jsonl", "w") as handle:
        handle.write('{"query": "what is x?", "pos": ["x is x"]}\n{"query": "", "pos": ["nothing asked"]}\n' * 4)
    sources = f"streams.embedding.sources=[{{path: {tmp_path}/bad.jsonl, on_empty: skip}}]"
    run_dir = train(arguments(tmp_path, sources, "max_steps=2"))
    lines = held_out_lines(run_dir)
    assert [line["step"] for line in lines] == [0, 2]
    for line in lines:
        items = read_items(run_dir, line["step"])
        assert {name: scores.mean for name, scores in items.items()} == {k: v for k, v in line.items() if k != "step"}
        assert len(items["retrieval/ndcg@10"].scores) == 12
        assert (items["heldout/generation"].unit, len(items["heldout/generation"].scores)) == ("batch", 3)
        assert len(set(items["heldout/generation"].weights or ())) > 1  # supervised tokens differ between batches
    record = json.loads((run_dir / "run.json").read_text())
    embedding = next(item for item in record["data"] if item["stream"] == "embedding")
    assert embedding["rows"] == 4
    assert sum(embedding["rejected"].values()) == 4
    assert record["model"]["trained_parameters"] == record["model"]["parameters"] > 0
    assert [(start["from_step"], start["num_ranks"]) for start in record["starts"]] == [(0, 1)]

    train(arguments(tmp_path, sources, "max_steps=3", "resume=auto"))
    starts = json.loads((run_dir / "run.json").read_text())["starts"]
    assert [start["from_step"] for start in starts] == [0, 2]
    assert items_path(run_dir, 3).is_file()


def test_the_mean_is_weighted() -> None:
    assert ItemScores("batch", [1.0, 4.0], [2.0, 1.0]).mean == pytest.approx(2.0)
    assert ItemScores("query", [0.25, 0.75]).mean == 0.5
