"""The demo, from its first step to its last line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.assembly.test_spine import OWN_LINES


def test_the_demo_runs_to_its_last_line(tmp_path: Path) -> None:
    """On a tiny random model: the table, the searches, an answer, the paths of plot and export; and libraries keep quiet."""
    arguments = ["demo", "model=tiny_random", "max_steps=2", f"run_dir={tmp_path}/run", "logging.progress=false"]
    code = f"import sys; from unified_lm.cli.main import main; sys.exit(main({arguments!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    out = done.stdout
    assert "retrieval nDCG@10, bidirectional" in out
    assert "answer loss, causal" in out
    assert out.count("search among") == 1
    assert (tmp_path / "run" / "curves.png").stat().st_size > 10_000
    assert (tmp_path / "run" / "export" / "modules.json").is_file()
    assert "document_then_query: first token after" in out
    assert "document_cache: first token after" in out
    assert (tmp_path / "run" / "index" / "index.json").is_file()
    foreign = [line for line in done.stderr.splitlines() if line.strip() and not OWN_LINES.match(line)]
    assert not foreign, "a library printed something that says nothing to a user"
