"""`unified-lm eval words` and `eval perplexity`: from arguments to tables and files; every mistake is one message."""

import json
from pathlib import Path

import pytest

pytest.importorskip("seqeval")

from tests.evaluation.words.word_files import random_data, write
from tests.inference.conftest import make_export
from unified_lm.cli.evaluate import evaluate
from unified_lm.core.errors import ConfigError, DataError, UserError
from unified_lm.evaluation.words import probe as word_level_probe
from unified_lm.evaluation.words.probe import LogisticProbe


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_export(tmp_path_factory.mktemp("my_run") / "export")


@pytest.fixture
def conll(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UNIFIED_LM_CACHE", str(tmp_path / "cache"))
    data = random_data(60, 20)
    for split, sentences in (("train", data.train), ("test", data.test)):
        rows = ("".join(f"{w} {s.tags['pos'][i]} {s.tags['chunk'][i]}\n" for i, w in enumerate(s.words)) for s in sentences)
        write(tmp_path / "corpus" / f"{split}.txt", "\n".join(rows))
    return tmp_path / "corpus"


def test_words_to_a_table_and_a_file(folder: Path, conll: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["words", str(folder), "--data", f"conll:{conll}", "--attention", "causal", "bidirectional"]
    evaluate([*arguments, "--device", "cpu"])
    result = json.loads((folder.parent / "words" / "corpus-logistic.json").read_text())
    assert list(result["scores"]) == ["causal", "bidirectional"]
    assert result["scores"]["causal"]["pos"]["same_token"]["score"] > result["scores"]["causal"]["pos"]["next_token"]["score"]
    assert result["data"]["train"] == {"sentences": 60, "words": 480}
    assert "same_token" in capsys.readouterr().out
    table = json.loads((folder.parent / "evaluation" / "words-corpus-logistic.json").read_text())
    assert len(table["rows"]) == 2 * 2 * 2
    assert len(list((conll.parent / "cache" / "words").glob("*.npy"))) == 2 * 2 * 2  # attention, alignment, split


def test_a_probe_that_did_not_converge_is_told_beside_the_numbers(
    folder: Path, conll: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["words", str(folder), "--data", f"conll:{conll}", "--task", "pos", "--device", "cpu"]
    evaluate([*arguments, "--attention", "causal", "bidirectional"])
    assert "warning" not in capsys.readouterr().out
    monkeypatch.setattr(word_level_probe, "make_probe", lambda name, seed: LogisticProbe(max_iterations=1))
    evaluate([*arguments, "--attention", "causal", "--alignment", "next_token"])
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1
    assert warnings[0].startswith("warning: pos, causal, next_token: the probe had not converged after 1 iterations")
    table = json.loads((folder.parent / "evaluation" / "words-corpus-logistic.json").read_text())
    assert warnings[0].removeprefix("warning: ") in table["note"]


@pytest.mark.parametrize(
    ("arguments", "error", "expected"),
    [
        (["--data", "conl:x"], UserError, "unknown data 'conl:x'"),
        (["--data", "conll:gone"], DataError, "not a folder with a train and a test file"),
        (["--alignment", "next"], ConfigError, "unknown alignment"),
        (["--attention", "casual"], ConfigError, "Did you mean 'causal'"),
        (["--probe", "svm"], ConfigError, "unknown probe"),
        (["--data", "conll:a,b", "--columns", "word=x", "pos=1"], UserError, "word=x: expected a position"),
        (["--data", "conll:a,b", "--columns", "pos=1"], UserError, "must say where the words are"),
        (["--columns", "word=0", "pos=1"], UserError, "are for conll: and hub: data"),
        (["--data", "CONLL", "--task", "ner"], ConfigError, "has no tags for 'ner'"),
    ],
)
def test_mistakes_are_found_before_the_model_is_loaded(
    conll: Path, arguments: list[str], error: type[UserError], expected: str
) -> None:
    with pytest.raises(error, match=expected):
        evaluate(["words", "./no-model", *[argument.replace("CONLL", f"conll:{conll}") for argument in arguments]])


def test_perplexity_to_a_file_and_again(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = write(tmp_path / "a.jsonl", '{"text": "the sum of things"}\n{"text": "another thing"}\n')
    second = write(tmp_path / "b.txt", "one line\nanother line\n")
    evaluate(["perplexity", str(folder), "--data", f"prose={first}", "--device", "cpu"])
    evaluate(["perplexity", str(folder.parent), "--data", f"prose={first}", f"lines={second}", "--device", "cpu"])
    shown = capsys.readouterr()
    assert shown.err.count("finished before") == 1
    assert "bits per byte" in shown.out
    result = json.loads((folder.parent / "perplexity.json").read_text())
    assert set(result["domains"]) == {"prose", "lines"}
    first.write_text('{"text": "the sum of things"}\n{"text": "changed"}\n')
    evaluate(["perplexity", str(folder), "--data", f"prose={first}", "--device", "cpu"])
    assert "finished before" not in capsys.readouterr().err
    with pytest.raises(UserError, match="needs at least 2 documents"):
        evaluate(["perplexity", str(folder), "--data", f"a={first}", "--documents", "1"])
    with pytest.raises(UserError, match="more than once"):
        evaluate(["perplexity", str(folder), "--data", f"a={first}", f"a={second}"])
