"""lm-eval on a tiny export, offline, with a task file: scores equal a direct computation."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval")

from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.evaluation.words.word_files import write
from tests.inference.conftest import make_export
from unified_lm.cli.evaluate import evaluate
from unified_lm.core.errors import DataError, UserError
from unified_lm.evaluation.generation.lm_eval_adapter import HarnessSettings, run_harness

QUESTIONS = [
    {"question": "Two and two", "choices": [" is four", " is the thing"], "gold": 0},
    {"question": "The sum of", "choices": [" the others", " x"], "gold": 1},
    {"question": "More", "choices": [" and more", " of in"], "gold": 0},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_export(tmp_path_factory.mktemp("lm_run") / "export")


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    data = write(tmp_path / "questions.jsonl", "".join(json.dumps(row) + "\n" for row in QUESTIONS))
    lines = (
        "task: my_choices",
        "dataset_path: json",
        f"dataset_kwargs: {{data_files: {{test: {data}}}}}",
        "test_split: test",
        "output_type: multiple_choice",
        "doc_to_text: '{{question}}'",
        "doc_to_choice: '{{choices}}'",
        "doc_to_target: gold",
        "target_delimiter: ''",
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]",
    )
    write(tmp_path / "tasks" / "my_choices.yaml", "\n".join(lines) + "\n")
    return tmp_path / "tasks"


def direct_accuracy(folder: Path) -> float:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    right = 0
    for row in QUESTIONS:
        scores = []
        for choice in row["choices"]:
            prompt = len(tokenizer(row["question"])["input_ids"])
            ids = torch.tensor([tokenizer(row["question"] + choice)["input_ids"]])
            with torch.no_grad():
                log_probabilities = model(ids).logits[0, :-1].log_softmax(-1)
            scores.append(float(log_probabilities.gather(1, ids[0, 1:, None])[prompt - 1 :].sum()))
        right += max(range(2), key=scores.__getitem__) == row["gold"]
    return right / len(QUESTIONS)


@pytest.mark.slow  # lm-eval reads its thousands of task files first
def test_a_file_task_offline(
    folder: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("UNIFIED_LM_CACHE", str(tmp_path / "cache"))
    evaluate(["lm", str(folder), "--tasks", "my_choices", "--include-path", str(tasks), "--device", "cpu"])
    result = json.loads((folder.parent / "lm_eval" / "my_choices.json").read_text())
    assert result["result"]["results"]["my_choices"]["acc,none"] == pytest.approx(direct_accuracy(folder))
    assert "my_choices" in capsys.readouterr().out
    assert list((tmp_path / "cache" / "lm_eval").iterdir())  # answers are kept, so that a killed run goes on
    table = json.loads((folder.parent / "evaluation" / "lm-my_choices.json").read_text())
    assert table["rows"][0][:2] == ["my_choices", "acc"]


@pytest.mark.slow
def test_mistakes_come_before_the_model(folder: Path, tasks: Path) -> None:
    with pytest.raises(DataError, match=r"unknown task 'my_choice'\. Did you mean 'my_choices'"):
        run_harness(Path("there is none"), HarnessSettings(tasks=["my_choice"], include_path=tasks))
    broken = write(tasks / "broken.yaml", "task: broken\ndataset_path: json\ndataset_kwargs: {data_files: gone.jsonl}\n")
    with pytest.raises(DataError, match="lm-eval cannot load"):
        run_harness(Path("there is none"), HarnessSettings(tasks=[str(broken)]))
    with pytest.raises(UserError, match="is no folder"):
        evaluate(["lm", str(folder), "--tasks", "my_choices", "--include-path", str(tasks / "gone")])
