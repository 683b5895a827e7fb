"""One process at a time writes to the folder of a run, and no run writes over what is not a run's."""

import shutil
from pathlib import Path

import pytest

from tests.core.test_folder_lock import holder
from tests.engine.small_run import small_run
from unified_lm.assembly.ablation.folder import begin
from unified_lm.cli.script import train
from unified_lm.composition.compose import compose
from unified_lm.config.schema import SweepConfig
from unified_lm.core.errors import CheckpointError, OutputError


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = small_run(tmp_path, run, "max_steps=1", "checkpoint.every=1")
    train(arguments)
    process = holder(run)
    try:
        before = files(run)
        with pytest.raises(CheckpointError, match="in use by another process"):
            train([*arguments, "resume=auto", "max_steps=2"])
        assert files(run) == before
    finally:
        process.kill()
        process.wait()
    train([argument for argument in arguments if not argument.startswith("max_steps")] + ["resume=auto", "max_steps=2"])


def test_two_chains_do_not_share_a_folder(tmp_path: Path) -> None:
    process = holder(tmp_path / "chain")
    try:
        with pytest.raises(CheckpointError, match="in use by another process"):
            train(["recipe=llm2vec", "model=tiny_random", "max_steps=1", f"run_dir={tmp_path / 'chain'}"])
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("name", ["config.yaml", "run.json", "metrics.jsonl", "checkpoints", "export"])
def test_a_folder_of_the_users_is_left_alone(name: str, tmp_path: Path) -> None:
    project = tmp_path / "proj"
    project.mkdir()
    if "." in name:
        (project / name).write_text("{}")
    else:
        (project / name).mkdir()
        (project / name / "mine").write_text("mine")
    before = files(project)
    for more in ("resume=none", "resume=auto"):
        with pytest.raises(OutputError, match="is not the folder of a run, and holds"):
            train(small_run(tmp_path, project, "max_steps=1", more))
    assert files(project) == before


def test_files_beside_those_of_a_run_do_not_matter(tmp_path: Path) -> None:
    (tmp_path / "proj").mkdir()
    (tmp_path / "proj" / "notes.md").write_text("mine")
    train(small_run(tmp_path, tmp_path / "proj", "max_steps=1"))
    assert (tmp_path / "proj" / "notes.md").read_text() == "mine"


def test_an_ablation_leaves_the_users_file_alone(tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text('{"mine": 1}')
    config = compose(["recipe=ablation_loss", "model=tiny_random", f"run_dir={tmp_path}"])
    assert isinstance(config, SweepConfig)
    with pytest.raises(OutputError, match=r"sweep\.json is not of an ablation"):
        begin(config)
    assert (tmp_path / "sweep.json").read_text() == '{"mine": 1}'
    shutil.rmtree(tmp_path)
