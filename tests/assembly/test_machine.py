"""What the machine decides: said in a notice, saved with the run, and kept by a resume on another machine."""

from __future__ import annotations

import json
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console

from tests.engine.small_run import equal, metrics, small_run, tensors
from tests.processes import NEEDS_DEEPSPEED, Group
from unified_lm.assembly import build_run, fit_run
from unified_lm.assembly import machine as machine_module
from unified_lm.assembly.machine import (
    choose_backend,
    choose_retained,
    device_memory,
    free_memory,
    settle_backend,
    settle_dtype,
    settle_retained,
)
from unified_lm.cli.script import train
from unified_lm.composition.compose import compose_run
from unified_lm.config.schema import RunConfig
from unified_lm.core.errors import ConfigError
from unified_lm.engine.accounting.estimate import estimate, packs_twice
from unified_lm.inference import UnifiedLM


def little_memory(rank: int) -> None:
    """A device that none of the tiny model's states fits."""
    machine_module.device_memory = lambda device: 1000  # type: ignore[assignment]


def machine(monkeypatch: pytest.MonkeyPatch, unit: str | None) -> None:
    monkeypatch.setattr("unified_lm.models.precision.bfloat16_unit", lambda device: unit)


def started(config: RunConfig) -> str:
    """Train; returns what was said."""
    console = Console(file=StringIO(), width=200)
    run = build_run(config, console)
    fit_run(run)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(("unit", "dtype"), [(None, "float32"), ("AMX", "bfloat16")])
def test_a_resume_elsewhere_keeps_what_the_first_machine_chose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unit: str | None, dtype: str
) -> None:
    machine(monkeypatch, unit)
    arguments = small_run(tmp_path, tmp_path / "run", "max_steps=1", "model.dtype=auto")
    said = started(compose_run(arguments))
    assert f"note: model.dtype=auto is {dtype}: this machine" in said
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["model"]["dtype"] == dtype
    machine(monkeypatch, "AMX" if unit is None else None)
    arguments = [*(a for a in arguments if not a.startswith("max_steps")), "max_steps=2", "resume=auto"]
    (tmp_path / "run" / "config.yaml").unlink()  # the checkpoint alone says it
    assert f"note: model.dtype=auto is {dtype}: as this run began." in started(compose_run(arguments))
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["model"]["dtype"] == dtype


def test_an_ablation_goes_on_with_arms_of_another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quiet = [
        "model=tiny_random",
        "model.dtype=auto",
        "max_steps=1",
        "logging.progress=false",
        "validation.num_batches=1",
        "~validation.retrieval",
    ]
    machine(monkeypatch, "AMX")
    train(["recipe=ablation_precision", "arms=[float32]", *quiet, f"run_dir={tmp_path}"])
    machine(monkeypatch, None)
    train(["recipe=ablation_precision", "arms=[float32,bfloat16]", *quiet, f"run_dir={tmp_path}"])
    dtypes = [
        yaml.safe_load((tmp_path / f"{arm}-seed42" / "config.yaml").read_text())["model"]["dtype"]
        for arm in ("float32", "bfloat16")
    ]
    assert dtypes == ["bfloat16", "float32"]


def test_what_the_choice_contradicts_is_refused_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose_run(["recipe=grit_smollm2", "parallel=zero0"])
    machine(monkeypatch, "AMX")
    with pytest.raises(ConfigError, match=r"zero0 adds bfloat16 gradients .*model\.dtype=auto is bfloat16"):
        settle_dtype(config)
    machine(monkeypatch, None)
    assert settle_dtype(config)[0].model.dtype == "float32"


def test_only_the_embedded_model_leaves_its_type_to_the_machine() -> None:
    """A dry run of a 7B recipe on a laptop is about the GPUs it is meant for."""
    assert compose_run(["recipe=grit_smollm2"]).model.dtype == "auto"
    assert compose_run(["recipe=grit_mistral7b"]).model.dtype == "bfloat16"
    assert compose_run(["recipe=grit_smollm2"]).export.dtype == "bfloat16"


def test_an_estimate_counts_the_bytes_of_the_type_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose_run(["recipe=grit_smollm2"])
    for unit, dtype in ((None, "float32"), ("AMX", "bfloat16")):
        machine(monkeypatch, unit)
        fixed = replace(config, model=replace(config.model, dtype=dtype))
        assert estimate(config).bytes_by_part == estimate(fixed).bytes_by_part


def test_inference_widens_what_would_be_emulated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = small_run(tmp_path, tmp_path / "run", "max_steps=1", "export.enabled=true")
    folder = train([a for a in arguments if a != "export.enabled=false"]) / "export"
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    monkeypatch.setattr("unified_lm.models.precision.bfloat16_unit", lambda device: None)

    def dtype_of(model: UnifiedLM) -> torch.dtype:
        return next(model._backbone.parameters()).dtype

    assert dtype_of(UnifiedLM.from_pretrained(folder, device="cpu")) is torch.float32
    assert dtype_of(UnifiedLM.from_pretrained(folder, device="cpu", dtype=None)) is torch.bfloat16
    machine(monkeypatch, "AMX")
    assert dtype_of(UnifiedLM.from_pretrained(folder, device="cpu")) is torch.bfloat16


GIB = 2**30


@pytest.mark.parametrize(("memory", "expected"), [(192, "ddp"), (80, "zero1"), (40, "zero2"), (32, "zero3"), (8, "zero3")])
def test_the_first_backend_that_fits_is_chosen(memory: int, expected: str) -> None:
    """GritLM-7B in full fine-tuning on 8 GPUs."""
    config = compose_run(["recipe=grit_mistral7b"])
    backend, reason = choose_backend(config, 8, memory * GIB)
    assert backend == expected
    assert ("NO BACKEND'S ESTIMATE FITS" in reason) == (memory == 8)
    assert "ddp" in reason or expected == "ddp"


def test_a_backend_that_other_settings_forbid_is_not_chosen() -> None:
    config = compose_run(["recipe=grit_mistral7b", "model.dtype=float32", "model.autocast=true"])
    assert choose_backend(config, 8, 8 * GIB)[0] == "zero2"


def test_what_cannot_be_estimated_is_trained_as_ddp() -> None:
    config = compose_run(["recipe=grit_mistral7b", "model.name=no/such-model"])
    backend, reason = choose_backend(config, 8, 8 * GIB)
    assert backend == "ddp"
    assert "cannot estimate: no configuration of the model 'no/such-model'" in reason
    assert reason.endswith("Set parallel to choose another")


def test_one_process_needs_no_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unified_lm.assembly.machine.estimate", lambda *_: pytest.fail("estimated"))
    config = compose_run(["recipe=grit_mistral7b"])
    assert settle_backend(config) == (config, [])


def test_ranks_of_one_node_share_the_memory_of_their_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = device_memory(torch.device("cpu"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert device_memory(torch.device("cpu")) == whole // 4


def test_as_many_graphs_are_kept_as_the_free_memory_takes() -> None:
    """What is free beside the whole run, in packs' activations; on a CPU half of it."""
    config = compose_run(["recipe=grit_mistral7b", "parallel=zero2"])
    found = estimate(config, 8)
    each, twice = found.bytes_by_part["activations"], packs_twice(config, 8)
    assert twice > 4
    for graphs, expected in ((-5, 1), (0.9, 1), (1, 2), (3.5, 4), (10**6, twice)):
        retained, reason = choose_retained(config, 8, 2 * int(found.total_bytes + graphs * each) + 2)
        assert retained == expected
        assert f"{expected} keep their graphs" in reason
    kept = replace(config, packing=replace(config.packing, num_retained=3))
    assert estimate(kept, 8).bytes_by_part["activations"] == 3 * each


def test_graphs_with_gathered_weights_are_not_kept() -> None:
    """ZeRO-3 without checkpointing: each graph would hold the whole model."""
    config = compose_run(["recipe=grit_mistral7b", "parallel=zero3", "model.gradient_checkpointing=false"])
    assert choose_retained(config, 8, 10**15) == (1, "")
    checkpointed = replace(config, model=replace(config.model, gradient_checkpointing=True))
    assert choose_retained(checkpointed, 8, 10**15)[0] > 1


def test_nothing_is_chosen_where_nothing_is_forwarded_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unified_lm.assembly.machine.estimate", lambda *_: pytest.fail("estimated"))
    for recipe in ("grit_smollm2", "llm2vec_mntp"):  # one pack a step; no contrastive stream
        assert settle_retained(compose_run([f"recipe={recipe}"]))[1] == []


def test_free_memory_is_what_ranks_can_share(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = free_memory(torch.device("cpu"))
    assert 0 < whole <= device_memory(torch.device("cpu"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert abs(free_memory(torch.device("cpu")) - whole // 4) < 0.2 * whole


def test_kept_graphs_change_no_bit(tmp_path: Path) -> None:
    """A run that keeps one graph, one that keeps what fits, and one that goes on with another number than it began with."""
    ended = {}
    for name, chosen in (("one", "1"), ("all", "null")):
        small = ["packing.token_budget=64", "max_steps=3", f"packing.num_retained={chosen}"]
        said = started(compose_run(small_run(tmp_path, tmp_path / name, *small)))
        assert ("note: packing.num_retained is" in said) == (chosen == "null"), said
        ended[name] = tensors(tmp_path / name / "checkpoints" / "step-00000003"), metrics(tmp_path / name)
        saved = yaml.safe_load((tmp_path / name / "config.yaml").read_text())
        assert saved["packing"]["num_retained"] == (None if chosen == "null" else 1)
    assert ended["one"][0]
    assert equal(ended["one"][0], ended["all"][0])
    assert ended["one"][1] == ended["all"][1]


@NEEDS_DEEPSPEED
def test_two_ranks_without_room_take_zero(tmp_path: Path) -> None:
    arguments = small_run(tmp_path, tmp_path / "run", "max_steps=1")
    group = Group(arguments, 2, tmp_path / "log", prepare=little_memory)
    assert group.wait() == [0, 0], group.output()
    assert "note: parallel=auto is zero" in group.output()
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["starts"][0]["backend"].startswith("zero")
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["parallel"]["backend"] == "auto"
