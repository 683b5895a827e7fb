"""`torchrun train.py parallel=zero2|zero3`: train, checkpoint, export; the export is that of one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from unified_lm.cli.script import train

ROOT = Path(__file__).resolve().parents[3]
COMMON = [
    "recipe=grit_smollm2",
    "model=tiny_random",
    "max_steps=3",
    "packing.token_budget=1024",
    "parallel.persistence_threshold=0",
    "validation.num_batches=1",
    "~validation.retrieval",
    "logging.progress=false",
]


@pytest.fixture(scope="module", params=[[], ["lora=all_linear"]], ids=["full", "lora"])
def variant(request) -> list[str]:
    return request.param


@pytest.fixture(scope="module")
def alone(variant, tmp_path_factory) -> Path:
    return train([*COMMON, *variant, f"run_dir={tmp_path_factory.mktemp('alone')}/run"])


@pytest.mark.parametrize("backend", ["zero2", "zero3"])
def test_two_processes_train_save_and_export_what_one_does(variant, alone, tmp_path, backend):
    pytest.importorskip("deepspeed")
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"]
    result = subprocess.run(
        [sys.executable, *launcher, "train.py", *COMMON, *variant, f"parallel={backend}", f"run_dir={tmp_path}/run"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))
    found, expected = (load_file(run / "export" / "model.safetensors") for run in (tmp_path / "run", alone))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype == torch.bfloat16
        torch.testing.assert_close(found[name], value, rtol=2**-7, atol=1e-5, msg=f"{name}: more than one bfloat16 step apart")
