"""`benchmarks/arms.py`: saved scores are taken for what they were measured on, and nothing else."""

import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("seqeval")

from tests.evaluation.words.word_files import random_data
from tests.inference.conftest import make_export
from unified_lm.composition.compose import compose
from unified_lm.composition.convert import to_yaml
from unified_lm.core.errors import DataError
from unified_lm.core.files import write_text

DATA = random_data(20, 10)


@pytest.fixture
def arms(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "arms.py"
    monkeypatch.syspath_prepend(str(path.parent))  # as for a script: it imports its neighbor arms_table
    spec = importlib.util.spec_from_file_location("benchmark_arms", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "code_words", lambda: DATA)
    monkeypatch.setattr(module, "word_scores", lambda model: {"same_token": {"score": 0.5}})
    monkeypatch.setattr(module, "sts_cosines", lambda model, tasks, limit: [0.5])
    return module


def _measure(arms: ModuleType, folder: Path, key: str = "hash") -> dict:
    entry = arms.Entry("uni", None, key, lambda: None)
    return arms.measure(entry, arms.Tasks([], [], None, "data"), ("sts", "words"), folder, 0.0)


def test_words_of_another_python_are_refused(arms: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = _measure(arms, tmp_path)
    assert scores["words_data"] == {"name": "random", "key": DATA.key}
    assert _measure(arms, tmp_path) == scores
    monkeypatch.setattr(arms, "code_words", lambda: random_data(20, 10, seed=1))
    with pytest.raises(DataError, match=r"other words \(random; this is random\); take the same Python"):
        _measure(arms, tmp_path)


def test_a_base_is_known_by_its_weights(arms: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_export(tmp_path / "base")
    before = {entry.key for entry in arms.untrained(str(folder))}
    assert len(before) == 1
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"abcd")
    assert {entry.key for entry in arms.untrained(str(folder))}.isdisjoint(before)
    monkeypatch.setattr(arms, "embedded_directory", lambda: folder)
    entries = arms.untrained(None)
    assert {entry.key for entry in entries} == {arms.hash_weights(folder)}
    assert [entry.arm for entry in entries if entry.max_tokens == arms.ECHO_TOKENS] == ["echo"]
    _measure(arms, tmp_path / "scores")
    with pytest.raises(DataError, match="is of another model"):
        _measure(arms, tmp_path / "scores", "new hash")


def test_an_arm_is_named_by_its_attention_and_all_its_stages(arms: ModuleType, tmp_path: Path) -> None:
    """Read from what the runs saved, and the same arm and seed twice is refused."""

    def run(name: str, *arguments: str) -> Path:
        folder = tmp_path / name
        write_text(folder / "config.yaml", to_yaml(compose([f"run_dir={folder}", *arguments])))
        shutil.copytree(export, folder / "export")
        return folder

    export = make_export(tmp_path / "export-of-all")
    text = tmp_path / "text.txt"
    text.write_text("One line.\n")
    data = ["model=smollm2_135m", "data=files", f"data.text_path={text}", f"data.sentences_path={text}", "seed=7"]
    first = run("a/1", "recipe=llm2vec_mntp", *data, "streams.mntp.attention=bidirectional_keep_first")
    keep = "streams.simcse.attention=bidirectional_keep_first"
    run("a/2", "recipe=llm2vec_simcse", *data, f"model.init_from={first}", keep)
    run("a/3", "recipe=llm2vec_simcse", *data, "streams.simcse.attention=causal")
    run("a/4", "recipe=llm2vec_simcse", *data, f"model.init_from={first}", "streams.simcse.attention=causal")
    run("a/5", "recipe=llm2vec_simcse", *data, f"model.init_from={tmp_path}", keep)  # a folder of weights, no run
    run("b", "recipe=grit_smollm2")
    generative = run("c", "recipe=generative_only", "data=pydocs", "model=smollm2_135m")
    arms_found = [(entry.arm, entry.seed) for entry in arms.trained([tmp_path / "a", tmp_path / "b"])]
    assert arms_found == [
        ("bi + GRIT", 42),
        ("first alone + MNTP", 7),
        ("first alone + SimCSE", 7),
        ("first alone + MNTP + SimCSE", 7),
        ("first alone + MNTP + SimCSE (then uni)", 7),
        ("uni + SimCSE", 7),
    ]
    with pytest.raises(DataError, match="the second run of 'bi \\+ GRIT' with seed 42"):
        arms.trained([tmp_path / "b", tmp_path / "b"])
    with pytest.raises(DataError, match=f"{generative} trains no stream that embeds"):
        arms.trained([generative])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no run with an export"):
        arms.trained([tmp_path / "empty"])


def test_labels_need_their_file(arms: ModuleType) -> None:
    with pytest.raises(DataError, match="needs --labels FILE"):
        arms.labels_scores(None, arms.Tasks([], [], None, "data"), 128)
