"""Two processes of `train.py parallel=zero2|zero3`: train, checkpoint, export; the export is that of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.processes import Group
from unified_lm.cli.script import train

COMMON = [
    "recipe=grit_smollm2",
    "model=tiny_random",
    "max_steps=3",
    "packing.token_budget=1024",
    "streams.embedding.batch_size=8",
    "streams.generation.batch_size=4",
    "parallel.persistence_threshold=0",
    "validation.num_batches=1",
    "~validation.retrieval",
    "logging.progress=false",
]


VARIANTS = {"full": [], "lora": ["lora=all_linear"]}


@pytest.fixture(scope="module")
def variant(request) -> list[str]:
    return VARIANTS[request.param]


@pytest.fixture(scope="module")
def alone(variant, tmp_path_factory) -> Path:
    return train([*COMMON, *variant, f"run_dir={tmp_path_factory.mktemp('alone')}/run"])


@pytest.mark.parametrize(
    ("variant", "backend"),
    [
        ("full", "zero3"),
        pytest.param("lora", "zero2", marks=pytest.mark.slow),
        pytest.param("full", "zero2", marks=pytest.mark.slow),
        pytest.param("lora", "zero3", marks=pytest.mark.slow),
    ],
    indirect=["variant"],
)
def test_two_processes_train_save_and_export_what_one_does(variant, alone, tmp_path, backend):
    pytest.importorskip("deepspeed")
    group = Group([*COMMON, *variant, f"parallel={backend}", f"run_dir={tmp_path}/run"], 2, tmp_path / "log")
    assert group.wait(400) == [0, 0], group.output()
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))
    found, expected = (load_file(run / "export" / "model.safetensors") for run in (tmp_path / "run", alone))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype == torch.bfloat16
        torch.testing.assert_close(found[name], value, rtol=2**-7, atol=1e-5, msg=f"{name}: more than one bfloat16 step apart")
