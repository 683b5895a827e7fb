"""`torchrun train.py` with two processes under gloo takes the steps that one process takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine.small_run import tensors
from unified_lm.cli.script import train

ROOT = Path(__file__).resolve().parents[2]
COMMON = [
    "recipe=grit_smollm2",
    "model=tiny_random",
    "max_steps=2",
    "streams.embedding.batch_size=8",
    "validation.num_batches=1",
    "~validation.retrieval",
    "logging.progress=false",
]


def test_two_processes_train_and_export(tmp_path):
    alone = train([*COMMON, f"run_dir={tmp_path}/alone", "export.enabled=false"])
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=127.0.0.1:0",
        "train.py",
        *COMMON,
        f"run_dir={tmp_path}/together",
    ]
    result = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    together = tmp_path / "together"
    weights = [tensors(run / "checkpoints" / "step-00000002") for run in (alone, together)]
    assert weights[0].keys() == weights[1].keys()
    squared = sum((weights[0][n] - weights[1][n]).double().square().sum() for n in weights[0] if n.startswith("weight/"))
    norm = sum(weights[0][n].double().square().sum() for n in weights[0] if n.startswith("weight/"))
    assert float((squared / norm).sqrt()) < 1e-5
    measured = [json.loads((run / "metrics.jsonl").read_text().splitlines()[1]) for run in (alone, together)]
    for name in ("loss/embedding", "loss/generation", "gradient_norm"):
        assert measured[1][name] == pytest.approx(measured[0][name], rel=1e-5)
    assert measured[1]["tokens"] == measured[0]["tokens"]
    assert (together / "export" / "unified_lm.json").is_file()
