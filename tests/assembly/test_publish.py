"""What an export takes over from its run, and what it does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.engine.small_run import small_run
from unified_lm.assembly import train
from unified_lm.config.schema import ModelConfig
from unified_lm.models.loading import load_model


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that trained with attention dropout 0.1."""
    folder = tmp_path_factory.mktemp("run")
    train(small_run(folder, folder / "run", "max_steps=1", "export.enabled=true"))
    return folder / "run"


def test_dropout_of_training_is_not_exported(run: Path) -> None:
    assert "attention_dropout: 0.1" in (run / "config.yaml").read_text()
    assert json.loads((run / "export" / "config.json").read_text())["attention_dropout"] == 0.0
    next_stage = load_model(ModelConfig(init_from=str(run), dtype="float32"))
    assert next_stage.causal_lm.config.attention_dropout == 0.0
