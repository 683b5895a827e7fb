"""The way from `train.py` to the loop: short, in four calls, the same from every door, and hard to walk in the wrong order."""

from __future__ import annotations

import ast
import os
import re
import shutil
import signal
import subprocess
import sys
import traceback
import weakref
from pathlib import Path
from typing import Any

import pytest

from tests.engine.small_run import metrics, small_run
from unified_lm.assembly import Job, build_run, export_run, fit_run, stages, training_session
from unified_lm.assembly.ablation.folder import FAILED, FINISHED
from unified_lm.cli.script import train
from unified_lm.composition.compose import compose, compose_run
from unified_lm.core.errors import CheckpointError, ConfigError, UserError

ROOT = Path(__file__).resolve().parents[2]


def test_train_py_reads_compose_build_fit_export() -> None:
    tree = ast.parse((ROOT / "train.py").read_text())
    main = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    called = [
        (node.lineno, node.func.id) for node in ast.walk(main) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    ]
    assert [name for _, name in sorted(called)] == ["compose", "training_session", "build_run", "fit_run", "export_run"]
    assert len((ROOT / "train.py").read_text().splitlines()) <= 45


def test_only_the_command_loads_train_py() -> None:
    """It imports the command line, so a layer below that loaded it by its path would import upward, unseen by lint-imports."""
    loaders = [path for path in (ROOT / "unified_lm").rglob("*.py") if "spec_from_file_location" in path.read_text()]
    assert [str(path.relative_to(ROOT)) for path in loaders] == ["unified_lm/cli/script.py"]


def test_one_frame_lies_between_main_and_the_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames: list[traceback.FrameSummary] = []
    real = stages.fit

    def fit(*arguments: Any) -> bool:
        frames.extend(traceback.extract_stack())
        return real(*arguments)

    monkeypatch.setattr(stages, "fit", fit)
    train(small_run(tmp_path, tmp_path / "run", "max_steps=1"))
    start = next(index for index, frame in enumerate(frames) if Path(frame.filename) == ROOT / "train.py")
    assert [frame.name for frame in frames[start:]] == ["main", "fit_run", "fit"]


def test_without_a_session_a_run_cannot_be_walked_in_the_wrong_order(tmp_path: Path) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    run = build_run(compose_run(small_run(tmp_path, tmp_path / "run", "max_steps=1")))
    with pytest.raises(CheckpointError, match="Call fit_run first"):
        export_run(run)
    assert fit_run(run)
    with pytest.raises(CheckpointError, match="Build it again"):
        fit_run(run)
    assert export_run(run) is None, "export.enabled=false"
    assert signal.getsignal(signal.SIGTERM) is handler
    assert not (tmp_path / "run" / "export").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["recipe=llm2vec"], "recipe 'llm2vec' is of several runs"),
        (["recipe=ablation_attention"], "recipe 'ablation_attention' is of several runs"),
        (["recipe=grit_smollm2", "dry_run=true"], "dry_run=true asks not to build anything"),
    ],
)
def test_what_is_not_one_run_is_not_built(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_run(compose([*arguments, "model=tiny_random"]))  # type: ignore[arg-type]


def test_a_job_must_be_gone_through(tmp_path: Path) -> None:
    config = compose_run(small_run(tmp_path, tmp_path / "run"))
    with training_session(config) as session, pytest.raises(RuntimeError, match="passed over"):
        for _ in session.jobs():
            pass
    job = Job(config)
    with pytest.raises(RuntimeError, match="ended without a result"), job:
        pass
    with pytest.raises(RuntimeError, match="has no run"):
        fit_run(job.run)


def test_an_error_of_a_chain_says_in_which_stage(tmp_path: Path) -> None:
    arguments = ["recipe=llm2vec", "model=tiny_random", "max_steps=1", "logging.progress=false", f"run_dir={tmp_path}"]
    (tmp_path / "2-llm2vec_simcse").write_text("a file of the user")
    with pytest.raises(UserError, match=r"^stage 2 of 2 \(llm2vec_simcse\): .*2-llm2vec_simcse"):
        train(arguments)


def test_a_signal_between_fit_and_export_waits_for_the_end_of_the_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = stages.export_run

    def signal_first(run: Any) -> Path | None:
        os.kill(os.getpid(), signal.SIGTERM)
        return real(run)

    monkeypatch.setattr(stages, "export_run", signal_first)
    last = train(["recipe=llm2vec", "model=tiny_random", "max_steps=1", "logging.progress=false", f"run_dir={tmp_path}"])
    assert (last / "export" / "modules.json").is_file()
    assert [path.name for path in tmp_path.glob("[!.]*")] == ["1-llm2vec_mntp"]


def test_an_arm_is_out_of_memory_before_the_next_one_comes_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that has failed."""
    held: list[weakref.ref[Any]] = []
    alive: list[int] = []
    real = stages.assemble_run

    def assemble_run(*arguments: Any) -> Any:
        alive.append(sum(model() is not None for model in held))
        run = real(*arguments)
        held.append(weakref.ref(run.training.trainable))
        return run

    monkeypatch.setattr(stages, "assemble_run", assemble_run)
    arguments = ["recipe=ablation_head", "arms=[none,projection_64,matryoshka]", "none.optim.learning_rate=1e30"]
    quiet = ["model=tiny_random", "max_steps=2", "logging.progress=false", "validation.num_batches=1", "~validation.retrieval"]
    with pytest.raises(UserError, match="1 of 3 runs of the ablation failed"):
        train([*arguments, "none.optim.max_skipped_steps=1", *quiet, f"run_dir={tmp_path}"])
    assert [path.parent.name for path in tmp_path.glob(f"*/{FAILED}")] == ["none-seed42"]
    assert len(list(tmp_path.glob(f"*/{FINISHED}"))) == 2
    assert alive == [0, 0, 0]


OWN_LINES = re.compile(r"note: |embedding: |generation: |step \d+: |training |exporting to |\d+ of \d+ texts were cut ")


def test_the_command_trains_and_embeds_from_an_installed_wheel(tmp_path: Path) -> None:
    """As pyproject.toml lays it out: neither train.py nor recipes lie beside the package. And libraries keep quiet."""
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    site = tmp_path / "site"
    shutil.copytree(ROOT / "unified_lm", site / "unified_lm", ignore=shutil.ignore_patterns("__pycache__"))
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    for source, target in wheel["force-include"].items():
        copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copyfile
        copy(ROOT / source, site / target)
    arguments = small_run(tmp_path, tmp_path / "run", "max_steps=1")
    (tmp_path / "texts.txt").write_text("hello\n")
    commands = [["train", *arguments, "export.enabled=true"], ["encode", "run", "texts.txt", "--out", "vectors.npy"]]
    code = f"import sys; from unified_lm.cli.main import main; sys.exit(any([main(command) for command in {commands!r}]))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(site)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == "vectors.npy: 1 vectors of 64 dimensions\n"
    foreign = [line for line in done.stderr.splitlines() if line.strip() and not OWN_LINES.match(line)]
    assert not foreign, "a library printed something that says nothing to a user"
    here = train(small_run(tmp_path, tmp_path / "here", "max_steps=1"))
    assert metrics(tmp_path / "run") == metrics(here)
