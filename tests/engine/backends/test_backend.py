"""Backends that cannot work are refused before weights are loaded; those that can are chosen by name."""

from __future__ import annotations

import sys

import pytest
import torch

from tests.engine.tiny import make_trainable
from unified_lm.cli.script import train
from unified_lm.composition.compose import compose_run
from unified_lm.config.schema import OptimConfig, ParallelConfig
from unified_lm.core.errors import ConfigError
from unified_lm.engine.backends.backend import check_backend, make_backend

RUN = ["recipe=grit_smollm2", "model=tiny_random", "max_steps=1", "logging.progress=false"]


@pytest.mark.parametrize("name", ["zero0", "zero1", "zero2", "zero3", "zero3_offload"])
def test_a_missing_deepspeed_is_named_before_weights_are_loaded(monkeypatch, tmp_path, name):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    monkeypatch.setattr("unified_lm.assembly.build.load_model", lambda *_: pytest.fail("weights were loaded"))
    monkeypatch.setattr("unified_lm.assembly.build.load_sharded", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(ConfigError, match=r"pip install 'unified_lm\[deepspeed\]'"):
        train([*RUN, f"parallel={name}", f"run_dir={tmp_path}/run"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without CUDA")
def test_offloading_needs_cuda():
    pytest.importorskip("deepspeed")
    with pytest.raises(ConfigError, match=r"there is no CUDA device\. Use parallel=zero3"):
        check_backend(ParallelConfig(backend="zero3_offload"))


def test_offloading_needs_the_compiled_optimizer(monkeypatch):
    deepspeed = pytest.importorskip("deepspeed")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(deepspeed.ops.op_builder.CPUAdamBuilder, "is_compatible", lambda self, verbose=False: False)
    with pytest.raises(ConfigError, match="CPU optimizer cannot be compiled here"):
        check_backend(ParallelConfig(backend="zero3_offload"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["parallel=zero0", "model.dtype=bfloat16"], "zero0 adds bfloat16 gradients up in bfloat16"),
        (["parallel=zero3", "model.dtype=float32", "model.autocast=true"], "keeps a bfloat16 copy of every weight"),
        (["parallel=zero2", "lora=qlora"], "4-bit weights cannot be partitioned or flattened"),
        (["parallel=zero3", "lora=qlora"], "4-bit weights cannot be partitioned or flattened"),
        (["parallel.backend=zero4"], "unknown value 'zero4'"),
        (["parallel=zero2", "parallel.bucket_elements=0"], "parallel.bucket_elements: got 0"),
    ],
)
def test_contradictions_are_named(arguments, message):
    with pytest.raises(ConfigError, match=message):
        compose_run(["recipe=grit_mistral7b", *arguments])


def test_the_number_of_processes_must_fit():
    with pytest.raises(ConfigError, match="'ddp' but there is one process"):
        check_backend(ParallelConfig(backend="ddp"))


def test_auto_is_single_in_one_process():
    backend = make_backend(make_trainable(), OptimConfig(), ParallelConfig())
    assert (backend.name, backend.equal_forwards) == ("single", False)
