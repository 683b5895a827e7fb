"""One process at a time writes to the folder of a run, and no run writes over what is not a run's."""

import json
import shutil
from pathlib import Path

import pytest

from tests.core.test_folder_lock import holder
from tests.engine.small_run import small_run
from unified_lm.assembly import stages
from unified_lm.assembly.ablation.folder import begin, mark_failed
from unified_lm.assembly.run_folder import leave, occupy, refuse_foreign
from unified_lm.checkpoint.store import list_checkpoints
from unified_lm.cli.script import train
from unified_lm.composition.compose import compose
from unified_lm.config.schema import RunConfig, SweepConfig
from unified_lm.core.errors import CheckpointError, DataError, OutputError
from unified_lm.core.folder_lock import LOCK_FILE


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


@pytest.mark.parametrize("name", ["config.yaml", "run.json", "metrics.jsonl", "checkpoints", "validation"])
def test_a_lock_alone_makes_no_folder_of_a_run(name: str, tmp_path: Path) -> None:
    """A start that was refused leaves a lock; what the user then puts there is the user's."""
    project = tmp_path / "proj"
    with pytest.raises(DataError):
        train([*small_run(tmp_path, project, "max_steps=1"), "streams.generation.sources=nowhere.jsonl"])
    assert [path.name for path in project.iterdir()] == [LOCK_FILE]
    if "." in name:
        (project / name).write_text('{"mine": 1}\n')
    else:
        (project / name).mkdir()
        (project / name / "mine").write_text("mine")
    before = files(project)
    for more in ("resume=none", "resume=auto"):
        with pytest.raises(OutputError, match="is not the folder of a run, and holds"):
            train(small_run(tmp_path, project, "max_steps=1", more))
    assert files(project) == before


@pytest.mark.parametrize(
    "content",
    ['{"mine": 1}\n', '{"step": 1}\n', '{"step": 1, "loss": 2.0, "step_seconds": 0.5}\n', "step", "\n", "[]\n", '"step"'],
)
def test_a_lock_and_metrics_of_the_users_make_no_folder_of_a_run(content: str, tmp_path: Path) -> None:
    """Whatever they look like: with resume=auto they would be cut."""
    project = tmp_path / "proj"
    project.mkdir()
    (project / LOCK_FILE).touch()
    (project / "metrics.jsonl").write_text(content)
    before = files(project)
    for more in ("resume=none", "resume=auto"):
        with pytest.raises(OutputError, match=r"is not the folder of a run, and holds metrics\.jsonl"):
            train(small_run(tmp_path, project, "max_steps=1", more))
    assert files(project) == before


def test_a_start_from_a_copy_that_was_killed_before_its_record_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its metrics are there by then: those of the copy."""
    arguments = small_run(tmp_path, tmp_path / "run", f"checkpoint.copy_to={tmp_path / 'copies'}", "checkpoint.every=1")
    train([*arguments, "max_steps=1"])
    shutil.rmtree(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(stages, "write_record", lambda run: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train([*arguments, "max_steps=2", "resume=auto"])
    found = tmp_path / "run" / "metrics.jsonl"
    assert found.read_bytes() == (tmp_path / "copies" / "step-00000001" / "metrics.jsonl").read_bytes() != b""
    with pytest.raises(OutputError, match=r"holds metrics\.jsonl"):
        refuse_foreign(tmp_path / "run")
    train([*arguments, "max_steps=2", "resume=auto"])
    assert [json.loads(line)["step"] for line in found.read_text().splitlines()] == [1, 2]


@pytest.mark.parametrize("after", ["assemble_run", "_report", "write_record", "write_text"])
def test_a_start_that_was_killed_before_its_first_step_goes_on(
    after: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it was: what it has left by then is known as a run's."""
    arguments = small_run(tmp_path, tmp_path / "run", "max_steps=1", "resume=auto")
    work = getattr(stages, after)

    def killed(*given: object) -> None:
        work(*given)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stages, after, killed)
        with pytest.raises(KeyboardInterrupt):
            train(arguments)
    train(arguments)


def test_two_runs_do_not_share_a_folder_of_copies(tmp_path: Path) -> None:
    arguments = small_run(tmp_path, tmp_path / "run", "max_steps=1", f"checkpoint.copy_to={tmp_path / 'copies'}")
    process = holder(tmp_path / "copies")
    try:
        with pytest.raises(CheckpointError, match="copies is in use by another process"):
            train(arguments)
    finally:
        process.kill()
        process.wait()
    train(arguments)
    assert (tmp_path / "copies" / "latest").read_text() == "step-00000001\n"
    train([a for a in arguments if not a.startswith("max_steps")] + ["max_steps=2", "resume=auto"])
    assert (tmp_path / "copies" / "latest").read_text() == "step-00000002\n"


def may_start(arguments: list[str]) -> None:
    """What a start checks of its folders, and nothing else of it."""
    config = compose(arguments)
    assert isinstance(config, RunConfig)
    run_dir = Path(config.run_dir)
    try:
        occupy(config, run_dir)
    finally:
        leave(config)


def test_copies_of_another_run_stay(tmp_path: Path) -> None:
    """However this run starts; and a run finds its own again, wherever it was when they were made."""
    a, b, copies = (tmp_path / name for name in ("a", "b", "copies"))

    def arguments(run_dir: Path, resume: object, *more: str) -> list[str]:
        return small_run(tmp_path, run_dir, "checkpoint.every=1", "checkpoint.keep_last=3", f"resume={resume}", *more)

    copied = f"checkpoint.copy_to={copies}"
    train(arguments(a, "none", "max_steps=2", copied))
    train(arguments(b, "none", "max_steps=1"))
    before = files(copies)
    assert len(list_checkpoints(copies)) == 2
    refused = [
        (b, "auto"),
        (b, b),
        (b, b / "checkpoints" / "step-00000001"),
        (tmp_path / "new", b),
        (tmp_path / "new", a),  # a branch of the run whose copies they are
        (tmp_path / "new", "none"),
    ]
    for run_dir, resume in refused:
        with pytest.raises(CheckpointError, match=r"copies already holds checkpoints of a.* nothing was changed\. "):
            may_start(arguments(run_dir, resume, "max_steps=3", copied))
        assert files(copies) == before, (run_dir, resume)
    for run_dir, resume in ((a, "auto"), (a, a), (tmp_path / "new", "auto"), (tmp_path / "new", copies)):
        may_start(arguments(run_dir, resume, "max_steps=3", copied))
    a.rename(tmp_path / "moved")
    may_start(arguments(tmp_path / "moved", "auto", "max_steps=3", copied))
    # On another machine, from the copies alone; killed after a checkpoint of its own and before that was copied.
    train(arguments(tmp_path / "there", "auto", "max_steps=3", copied))
    shutil.rmtree(copies / "step-00000003")
    may_start(arguments(tmp_path / "there", "auto", "max_steps=3", copied))
    # On a machine where a start was killed before its first checkpoint, and where lines stand behind the newest one.
    lost = tmp_path / "lost"
    train(arguments(lost, "none", "max_steps=1"))
    shutil.rmtree(lost / "checkpoints")
    may_start(arguments(lost, "auto", "max_steps=3", copied))
    (tmp_path / "there" / "metrics.jsonl").write_text((lost / "metrics.jsonl").read_text())
    own = tmp_path / "there" / "checkpoints" / "step-00000003" / "state.json"
    own.write_text(json.dumps({**json.loads(own.read_text()), "metrics_bytes": 0}))
    may_start(arguments(tmp_path / "there", "auto", "max_steps=3", copied))
    # Without metrics nothing is certain but the recipe.
    for copy in list_checkpoints(copies):
        (copy / "metrics.jsonl").write_text("")
    may_start(arguments(b, "auto", "max_steps=3", copied))
    for copy in list_checkpoints(copies):
        state = json.loads((copy / "state.json").read_text())
        state["settings"]["recipe"] = "another"
        (copy / "state.json").write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match="of another run"):
        may_start(arguments(b, "auto", "max_steps=3", copied))


@pytest.mark.parametrize("kind", ["file", "link", "folder"])
def test_a_pointer_of_the_users_among_copies_is_left_alone(kind: str, tmp_path: Path) -> None:
    latest = tmp_path / "copies" / "latest"
    latest.parent.mkdir()
    (tmp_path / "release").write_text("step-1")
    {
        "file": lambda: latest.write_text("v2.3"),
        "link": lambda: latest.symlink_to(tmp_path / "release"),
        "folder": latest.mkdir,
    }[kind]()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OutputError, match="latest is not of this package"):
        train(small_run(tmp_path, tmp_path / "run", "max_steps=1", f"checkpoint.copy_to={latest.parent}"))
    assert [path for path in sorted(tmp_path.rglob("*")) if path.suffix != ".jsonl"] == before


@pytest.mark.parametrize("name", ["finished.json", "failed.json"])
def test_an_ablation_leaves_a_file_in_an_arms_folder_alone(name: str, tmp_path: Path) -> None:
    config = compose(["recipe=ablation_loss", "model=tiny_random", f"run_dir={tmp_path}"])
    assert isinstance(config, SweepConfig)
    arm = Path(config.arms[1].run.run_dir)
    arm.mkdir()
    (arm / name).write_text('{"mine": 1}')
    before = files(tmp_path)
    with pytest.raises(OutputError, match=rf"{name} is not of an ablation"):
        begin(config)
    assert files(tmp_path) == before


def test_the_folder_of_an_arm_that_was_refused_is_left_alone(tmp_path: Path) -> None:
    config = compose(["recipe=ablation_loss", "model=tiny_random", f"run_dir={tmp_path}"])
    assert isinstance(config, SweepConfig)
    folder = Path(config.arms[0].run.run_dir)
    folder.mkdir()
    (folder / "config.yaml").write_text("mine: 1")
    mark_failed(config.arms[0], "it was refused")
    assert sorted(path.name for path in folder.iterdir()) == ["config.yaml"]
    mark_failed(config.arms[1], "it was not found")
    assert (Path(config.arms[1].run.run_dir) / "failed.json").is_file()


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
