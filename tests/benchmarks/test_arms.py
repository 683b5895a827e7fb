"""`benchmarks/arms.py`: saved scores are taken for what they were measured on, and nothing else."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("seqeval")

from tests.evaluation.words.word_files import random_data
from tests.inference.conftest import make_export
from unified_lm.core.errors import DataError

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
    monkeypatch.setattr(module, "word_scores", lambda model: {name: _words(module) for name in module.ALIGNMENTS})
    monkeypatch.setattr(module, "sts_cosines", lambda model, tasks, limit: [0.5])
    return module


def _words(arms: ModuleType) -> dict[str, float]:
    gold = [sentence.tags["pos"] for sentence in DATA.test]
    baseline = arms.tag_scores("pos", gold, arms.most_frequent_tags(DATA.train, DATA.test, "pos"), num_resamples=100)["score"]
    return {"score": 0.5, "low": 0.4, "high": 0.6, "baseline": baseline}


def _measure(arms: ModuleType, folder: Path, key: str = "hash", former: str | None = None) -> dict:
    entry = arms.Entry("uni", None, key, lambda: None, former_key=former)
    return arms.measure(entry, arms.Tasks([], [], "data"), ("sts", "words"), folder, 0.0)


def test_words_of_another_python_are_refused(arms: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = _measure(arms, tmp_path)
    assert scores["words_data"] == {"name": "random", "key": DATA.key}
    assert _measure(arms, tmp_path) == scores
    monkeypatch.setattr(arms, "code_words", lambda: random_data(20, 10, seed=1))
    with pytest.raises(DataError, match=r"other words \(random; this is random\); take the same Python"):
        _measure(arms, tmp_path)


def test_scores_without_the_hash_of_their_words_are_kept_where_they_can_be_told(
    arms: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "uni.json"
    scores = _measure(arms, tmp_path)
    old = {key: value for key, value in scores.items() if key != "words_data"}
    file.write_text(json.dumps(old))
    assert _measure(arms, tmp_path) == scores == json.loads(file.read_text())
    file.write_text(json.dumps(old))
    monkeypatch.setattr(arms, "code_words", lambda: random_data(20, 11, seed=1))
    monkeypatch.setattr(arms, "most_frequent_tags", lambda *data: [("EARLY",) * 8] * 11)
    with pytest.raises(DataError, match="of an unknown version of Python"):
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
    assert [entry.max_tokens == arms.ECHO_TOKENS for entry in entries] == [False, True, False, False, False]
    scores = tmp_path / "scores"
    _measure(arms, scores, "embedded smollm2-135m")
    assert _measure(arms, scores, "new hash", former="embedded smollm2-135m")["model"] == "new hash"
    with pytest.raises(DataError, match="is of another model"):
        _measure(arms, scores, "newer hash")
