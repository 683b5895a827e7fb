"""`unified-lm eval mteb`: from arguments to a table, resumed; every mistake is one message."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mteb")

from tests.evaluation.embedding import task_folders
from tests.inference.conftest import make_export
from unified_lm.cli.evaluate import evaluate
from unified_lm.core.errors import CheckpointError, ConfigError, DataError, UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_export(tmp_path_factory.mktemp("my_run") / "export")


def test_folders_to_a_table_and_again(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task_folders.sts(tmp_path / "tasks")
    task_folders.retrieval(tmp_path / "tasks", name="mysearch")
    arguments = ["mteb", str(folder), "--tasks", str(tmp_path / "tasks"), "--device", "cpu"]
    evaluate(arguments)
    shown = capsys.readouterr()
    assert "1 of 11 queries have no relevant document" in shown.err
    assert "mean of 2" in shown.out
    results = list((folder.parent / "mteb" / "results").glob("*/*/*.json"))
    assert {path.name for path in results} == {"mysearch.json", "sts.json", "model_meta.json"}
    assert all(path.parent.parent.name == f"unified_lm__{folder.parent.name}" for path in results)
    evaluate(arguments)
    assert capsys.readouterr().err.count("finished before") == 2


def test_routing_is_measured_and_its_results_kept_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_export(tmp_path / "moe" / "export", "olmoe")
    task_folders.sts(tmp_path / "tasks")
    arguments = ["mteb", str(folder), "--tasks", str(tmp_path / "tasks"), "--device", "cpu"]
    shown = []
    for more in ([], ["--method", "rw"], ["--method", "moee_sum", "--alpha", "0.5"], ["--method", "moee_sum"]):
        evaluate([*arguments, *more])
        shown.append(capsys.readouterr().out.splitlines()[-1])
    assert len(set(shown)) == 4, "a folder of results for each way of embedding"


def test_prompts_are_written_for_plain_mteb(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompts.json"
    evaluate(["mteb", str(folder), "--tasks", "llm2vec15", "--instructions", "e5", "--prompts", str(path), "--device", "cpu"])
    prompts = json.loads(path.read_text())
    assert len(prompts) == 15 * 3
    assert prompts["ArguAna-document"] == "<|embed|>\n"


def test_a_run_stands_for_its_export(folder: Path, tmp_path: Path) -> None:
    prompts = [tmp_path / "export.json", tmp_path / "run.json"]
    for model, path in zip((folder, folder.parent), prompts, strict=True):
        evaluate(["mteb", str(model), "--tasks", "llm2vec15", "--prompts", str(path), "--device", "cpu"])
    assert prompts[0].read_text() == prompts[1].read_text()


def test_a_run_without_an_export_says_how_to_make_one(tmp_path: Path) -> None:
    task_folders.sts(tmp_path / "tasks")
    run = tmp_path / "chain" / "1-mntp"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text("")
    arguments = ["--tasks", str(tmp_path / "tasks"), "--device", "cpu"]
    with pytest.raises(CheckpointError, match=r"is a run without an export: .* train it again with export\.enabled=true"):
        evaluate(["mteb", str(run), *arguments])
    (run / "checkpoints" / "step-00000003").mkdir()
    with pytest.raises(CheckpointError, match=f"is a run without an export: .*`unified-lm export {run}` writes one"):
        evaluate(["mteb", str(run), *arguments])
    with pytest.raises(CheckpointError, match=f"holds several runs; name one of them: {run}"):
        evaluate(["mteb", str(run.parent), *arguments])


@pytest.mark.parametrize(
    ("arguments", "error", "expected"),
    [
        (["mteb", "MODEL", "--tasks", "STSBenchmrk"], DataError, "Did you mean 'STSBenchmark'"),
        (["mteb", "MODEL", "--tasks", "llm2vec51"], DataError, "Did you mean 'llm2vec15'"),
        (["mteb", "MODEL", "--tasks", "./gone"], DataError, "there is no folder gone"),
        (["mteb", "MODEL", "--tasks", "EMPTY"], DataError, "holds no offline task"),
        (["mteb", "MODEL", "--tasks", "STS", "STS"], ConfigError, "names sts more than once"),
        (["mteb", "MODEL", "--tasks", "STS", "--instructions", "e6"], ConfigError, "unknown instructions 'e6'"),
        (["mteb", "MODEL", "--tasks", "STS", "--instructions", "task"], ConfigError, "have none for sts"),
        (["mteb", "EMPTY", "--tasks", "STS"], CheckpointError, "not an export of unified_lm"),
        (["mteb", "./missing", "--tasks", "STS"], CheckpointError, "there is no folder"),
        (["mtbe"], UserError, "unknown command 'mtbe'. Did you mean 'mteb'"),
    ],
)
def test_mistakes(folder: Path, tmp_path: Path, arguments: list[str], error: type[UserError], expected: str) -> None:
    (tmp_path / "empty").mkdir()
    places = {"MODEL": folder, "EMPTY": tmp_path / "empty", "STS": task_folders.sts(tmp_path)}
    with pytest.raises(error, match=expected):
        evaluate([str(places.get(argument, argument)) for argument in arguments])


def test_without_mteb_the_message_says_what_to_install(folder: Path) -> None:
    code = (
        "import sys; sys.modules['mteb'] = None; from unified_lm.cli.main import main; "
        f"sys.exit(main(['eval', 'mteb', {str(folder)!r}, '--tasks', 'STS12']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "pip install 'unified_lm[eval]'" in done.stderr
    assert "Traceback" not in done.stderr
