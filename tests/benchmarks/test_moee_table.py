"""The table of vectors of a mixture of experts, over seeds."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.moee_table import main


def result(path: Path, value: float, pairs: int = 9) -> str:
    scores = {"spearman": {"hs": {"value": value}, "rw": {"value": value / 2}}, "accuracy": {"fused": {"value": 0.9}}}
    arm = {"scores": {"raw": scores, "standardized": {"spearman": {"hs": {"value": value + 0.1}}}}}
    path.write_text(json.dumps({"measured_on": {"sts": {"num_pairs": pairs}}, "arms": {"a": arm}}))
    return str(path)


def test_means_and_ranges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    files = [result(tmp_path / f"{i}.json", 0.5 + 0.1 * i) for i in range(3)]
    monkeypatch.setattr(sys, "argv", ["moee_table.py", f"one={files[0]}", f"two={files[1]},{files[2]}"])
    main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| model | vectors | method | STS | retrieval | AMI | accuracy |"
    assert lines[2:6] == [
        "| one | raw | `hs` | 50.0 |  |  |  |",
        "| one | raw | `rw` | 25.0 |  |  |  |",
        "| one | raw | `fused` |  |  |  | 90.0 |",
        "| one | standardized | `hs` | 60.0 |  |  |  |",
    ]
    assert "| two | raw | `hs` | 65.0 [60.0, 70.0] |  |  |  |" in lines
    other = result(tmp_path / "other.json", 0.5, pairs=8)
    monkeypatch.setattr(sys, "argv", ["moee_table.py", f"a={files[0]},{other}"])
    with pytest.raises(SystemExit, match="different data"):
        main()
