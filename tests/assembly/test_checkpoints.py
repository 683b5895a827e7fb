"""`unified-lm export`: an export of any checkpoint of a run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from unified_lm.cli.main import main
from unified_lm.cli.script import train
from unified_lm.core.errors import CheckpointError
from unified_lm.export.manifest import Manifest
from unified_lm.inference import UnifiedLM

COMMON = [
    "recipe=llm2vec_simcse",
    "model=tiny_random",
    "optim.learning_rate=0.01",
    "checkpoint.every=1",
    "checkpoint.keep_last=9",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return train([*COMMON, "max_steps=2", "logging.progress=false", f"run_dir={tmp_path_factory.mktemp('checkpoints')}/run"])


def weights(folder: Path) -> dict:
    return load_file(folder / "model.safetensors")


def test_the_last_checkpoint_gives_the_runs_own_export(run, tmp_path):
    assert main(["export", str(run), "--out", str(tmp_path / "again")]) == 0
    expected, found = weights(run / "export"), weights(tmp_path / "again")
    assert expected.keys() == found.keys()
    assert all(expected[name].equal(found[name]) for name in expected)
    assert Manifest.load(tmp_path / "again").metrics == Manifest.load(run / "export").metrics


def test_an_earlier_step_gives_other_weights_and_says_so(run, tmp_path):
    before = sorted(path.name for path in run.iterdir())
    assert main(["export", str(run), "--step", "1", "--out", str(tmp_path / "first")]) == 0
    expected, found = weights(run / "export"), weights(tmp_path / "first")
    assert any(not expected[name].equal(found[name]) for name in expected)
    assert [stage.steps for stage in Manifest.load(tmp_path / "first").stages] == [1]
    assert sorted(path.name for path in run.iterdir()) == before


def test_a_run_without_an_export_loads_after_the_command_that_the_error_names(tmp_path):
    folder = train([*COMMON, "max_steps=1", "export.enabled=false", "logging.progress=false", f"run_dir={tmp_path}/run"])
    with pytest.raises(CheckpointError, match=f"`unified-lm export {folder}` writes one from its newest checkpoint"):
        UnifiedLM.from_pretrained(folder, device="cpu")
    assert main(["export", str(folder)]) == 0
    assert UnifiedLM.from_pretrained(folder, device="cpu").encode(["a text"]).shape[0] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--step", "7"], "has no checkpoint of step 7. It has: 1, 2."),
        ([], "is not the folder of a run: it has no config.yaml"),
    ],
)
def test_what_cannot_be_exported(run, tmp_path, capsys, arguments, message):
    folder = run if arguments else tmp_path
    assert main(["export", str(folder), *arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_torn_checkpoint_is_named(run, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    for path in (copy / "checkpoints").glob("*/*.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    assert main(["export", str(copy)]) == 2
    assert "has no complete checkpoint" in " ".join(capsys.readouterr().err.split())
    assert main(["export", str(copy), "--step", "1"]) == 2
    assert "step-00000001" in capsys.readouterr().err
