"""Time from the start of `train.py` to its first step on the embedded model, with warm caches, and the part of a step for data.

The recipe is grit_smollm2 without the validation that precedes its first step.

Usage: python benchmarks/startup.py
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STEPS = 2


def start(run_dir: Path) -> tuple[float, list[dict]]:
    """Run a few steps; returns the seconds from the start to the end of the first one, and the lines of metrics.jsonl."""
    overrides = ["~validation.retrieval", "~validation.sources", "export.enabled=false", "logging.progress=false"]
    command = [sys.executable, str(ROOT / "train.py"), "recipe=grit_smollm2", f"max_steps={STEPS}", f"run_dir={run_dir}"]
    metrics = run_dir / "metrics.jsonl"
    started = time.perf_counter()
    process = subprocess.Popen([*command, *overrides], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    first = None
    while process.poll() is None:
        if first is None and metrics.exists() and metrics.stat().st_size:
            first = time.perf_counter() - started
        time.sleep(0.02)
    if process.returncode or first is None:
        raise SystemExit(f"train.py ended with {process.returncode}")
    return first, [json.loads(line) for line in metrics.read_text().splitlines()]


def main() -> None:
    """Fill the caches, then measure."""
    with tempfile.TemporaryDirectory() as folder:
        start(Path(folder) / "warm")
        first, lines = start(Path(folder) / "measured")
    steps = [line for line in lines if "step_seconds" in line]
    print(f"start to first step: {first - steps[0]['step_seconds']:.1f} s")
    fraction = sum(line["data_seconds"] for line in steps) / sum(line["step_seconds"] for line in steps)
    print(f"data: {fraction:.2%} of the steps' time ({steps[-1]['data_seconds'] * 1000:.1f} ms a step)")


if __name__ == "__main__":
    main()
