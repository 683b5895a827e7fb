"""The table of answers before and after training."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.rag_table import main


def result(path: Path, loss: float, f1: float | None, questions: int = 9) -> str:
    interval = lambda value: None if value is None else {"value": value, "low": value - 1, "high": value + 1}  # noqa: E731
    own = {"loss": interval(loss), "beside": interval(loss - 1), "f1": interval(f1)}
    plain = {"loss": interval(1.0), "beside": None, "f1": interval(f1)}
    modes = [{"mode": "query_cache", "states": "causal", **own}, {"mode": "document_then_query", "states": "", **plain}]
    path.write_text(json.dumps({"questions": questions, "k": 3, "recall": {"1": loss / 10}, "modes": modes}))
    return str(path)


def test_ranges_over_seeds_and_intervals_over_questions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [result(tmp_path / f"{i}.json", 2.0 + i, 0.25 if i else None) for i in range(3)]
    monkeypatch.setattr(sys, "argv", ["rag_table.py", f"before={files[2]}", f"after={files[0]},{files[1]}"])
    main()
    lines = capsys.readouterr().out.split("\n")
    heads = "| before: answer loss | after: answer loss | before: beside plain | after: beside plain | before: F1 | after: F1 |"
    assert lines[0].endswith(heads)
    cells = "4.00 [3.00, 5.00] | 2.50 [2.00, 3.00] | 3.00 [2.00, 4.00] | 1.50 [1.00, 2.00] | 0.25 [-0.75, 1.25] | "
    assert lines[2] == f"| `query_cache` | causal | {cells} |"
    assert lines[3].startswith("| `document_then_query` |  | 1.00 [0.00, 2.00] | 1.00 [1.00, 1.00] |  |  |")
    assert "after: recall@1 0.25" in lines
    other = result(tmp_path / "other.json", 1.0, 1.0, questions=8)
    monkeypatch.setattr(sys, "argv", ["rag_table.py", f"a={files[0]}", f"b={other}"])
    with pytest.raises(SystemExit, match="asked differently"):
        main()
