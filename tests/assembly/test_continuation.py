"""What a resume refuses, prints and lets pass: every setting of the schema, each with another value."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tests.engine.small_run import small_run
from unified_lm.assembly.continuation import check_continuation
from unified_lm.cli.script import train
from unified_lm.composition.compose import compose_run
from unified_lm.composition.convert import schema_keys
from unified_lm.config.continuation import CHANGES, Change, change_of
from unified_lm.config.schema import RetrievalConfig, RunConfig, SourceConfig
from unified_lm.core.errors import CheckpointError
from unified_lm.data.formats import FORMATS
from unified_lm.data.formats.running_text_config import MaskingConfig
from unified_lm.objectives import OBJECTIVES


def whole_run() -> RunConfig:
    """A run in which every key of the schema has a place: each format and each objective, adapters, retrieval."""
    run = compose_run(["recipe=grit_smollm2", "lora=all_linear", "run_dir=runs/a"])
    source = SourceConfig(path="rows.jsonl")
    objectives = {name: kind(name=name) for name, kind in OBJECTIVES.items()}
    streams: dict[str, Any] = {}
    for name, kind in FORMATS.items():
        streams[name] = kind(format=name, sources=(source,), objective=objectives["contrastive"])
        if hasattr(streams[name], "masking"):
            streams[name] = replace(streams[name], masking=MaskingConfig())
    for name, objective in objectives.items():
        streams[f"with_{name}"] = replace(streams["pairs"], objective=objective)
    validation = replace(run.validation, sources={"pairs": (source,)}, retrieval=RetrievalConfig(queries=source))
    return replace(run, streams=streams, validation=validation)


def other(value: Any) -> Any:
    """Another value of the same kind, or at least another value."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    if isinstance(value, str):
        return f"{value}x"
    if isinstance(value, dict):
        return {**value, "added": "x"}
    return (*value, "x") if isinstance(value, tuple) else "x"


def variants(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(key of the schema, the same tree with that one setting changed), for every setting below a node."""
    if is_dataclass(node):
        for field in fields(node):  # type: ignore[arg-type]
            for path, value in variants(getattr(node, field.name), f"{key}.{field.name}" if key else field.name):
                yield path, replace(node, **{field.name: value})  # type: ignore[type-var]
    elif isinstance(node, dict) and node and any(is_dataclass(v) or isinstance(v, tuple) for v in node.values()):
        for name, value in node.items():
            for path, changed in variants(value, f"{key}.*"):
                yield path, {**node, name: changed}
    elif isinstance(node, tuple) and node and is_dataclass(node[0]):
        for path, changed in variants(node[0], f"{key}.*"):
            yield path, (changed, *node[1:])
    else:
        yield key, other(node)


VARIANTS = list(variants(whole_run()))


def test_every_setting_of_the_schema_is_tried() -> None:
    tried = {key for key, _ in VARIANTS}
    missing = [key for key in schema_keys() if key not in tried and not any(t.startswith(f"{key}.") for t in tried)]
    assert missing == []


def test_every_setting_of_the_schema_has_an_answer_and_every_answer_a_setting() -> None:
    assert all(isinstance(change_of(key), Change) for key in schema_keys() if key != "model")  # its keys differ
    assert set(CHANGES) <= set(schema_keys())


def test_a_changed_setting_is_refused_printed_or_free() -> None:
    earlier = whole_run()
    for key, changed in VARIANTS:
        shown = re.compile(key.replace(".*", r"(\.\w+)?") if "sources" not in key else key.partition(".*.")[0])
        if change_of(key) is Change.REFUSED:
            with pytest.raises(CheckpointError, match="belongs to another run") as refusal:
                check_continuation(earlier, changed)
            assert shown.search(str(refusal.value)), key
        elif change_of(key) is Change.REPORTED:
            assert shown.search(check_continuation(earlier, changed)[0]), key
        else:
            assert check_continuation(earlier, changed) == [], key
    assert {change_of(key) for key, _ in VARIANTS} == set(Change)


@pytest.mark.parametrize(
    "key",
    [
        *("seed", "lora.alpha", "lora.r", "model.pooling", "model.projection_dim"),
        *(f"optim.{name}" for name in ("learning_rate", "betas", "schedule", "weight_decay")),
        *(f"streams.embedding.{name}" for name in ("objective.temperature", "objective.weight", "batch_size", "attention")),
    ],
)
def test_what_is_trained_and_how_makes_another_run(key: str) -> None:
    assert change_of(key) is Change.REFUSED
    assert change_of("max_steps") is Change.REPORTED


def test_what_the_same_run_goes_on_with_is_not_mentioned() -> None:
    assert check_continuation(whole_run(), whole_run()) == []


def contents(folder: Path) -> dict[Path, bytes]:
    """What a run has written; its lock, which says who writes, is left out."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"}


@pytest.mark.parametrize(
    "change",
    ["model.pooling=last_token", "streams.embedding.objective.temperature=0.1", "optim.betas=[0.8,0.999]", "lora=all_linear"],
)
def test_another_run_is_refused_before_anything_is_built(tmp_path, monkeypatch, change) -> None:
    arguments = small_run(tmp_path, tmp_path / "run", "max_steps=1", "checkpoint.every=1")
    train(arguments)
    before = contents(tmp_path / "run")
    monkeypatch.setattr("unified_lm.assembly.stages.assemble_run", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(CheckpointError, match=f"{change.partition('=')[0]}.*: the checkpoint has"):
        train([*arguments, "resume=auto", change])
    assert contents(tmp_path / "run") == before


def test_more_steps_are_possible_and_said(tmp_path, capsys) -> None:
    arguments = small_run(tmp_path, tmp_path / "run", "logging.every=2")
    train([*arguments, "max_steps=3"])
    train([*arguments, "max_steps=4", "resume=auto", "packing.token_budget=512"])
    told = capsys.readouterr().err
    assert "max_steps: the checkpoint has 3, this run 4" in told
    assert "packing.token_budget: the checkpoint has 1024, this run 512" in told
    assert "the learning rate decays otherwise: at step 3 it is" in told


def test_checkpoints_from_before_settings_were_kept_are_compared_with_the_run_beside_them(tmp_path) -> None:
    arguments = small_run(tmp_path, tmp_path / "run", "max_steps=1")
    train(arguments)
    state = tmp_path / "run" / "checkpoints" / "step-00000001" / "state.json"
    content = json.loads(state.read_text())
    del content["settings"]
    state.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"optim\.learning_rate: the checkpoint has 3e-05, this run 0\.1"):
        train([*arguments, "resume=auto", "optim.learning_rate=0.1"])
