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
from unified_lm.models.tiny import tiny_model, tiny_tokenizer

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


def test_neither_data_nor_an_optimizer_is_needed(tmp_path, monkeypatch):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"text": "sentence number {i} of the file"}}\n' for i in range(40)))
    arguments = [*COMMON, "max_steps=1", "logging.progress=false", f"streams.simcse.sources=[{{path: {rows}}}]"]
    run = train([*arguments, f"run_dir={tmp_path}/run"])
    rows.unlink()

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("not for an export")

    monkeypatch.setattr("unified_lm.data.streams.build_streams", refuse)
    monkeypatch.setattr("torch.optim.AdamW.__init__", refuse)
    assert main(["export", str(run), "--out", str(tmp_path / "again"), "--verify", "sampled"]) == 0
    names = sorted(path.relative_to(run / "export") for path in (run / "export").rglob("*") if path.is_file())
    assert Path("unified_lm.json") in names
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (run / "export" / name).read_bytes(), name


def test_another_start_than_the_runs_is_refused(tmp_path, capsys):
    base = tmp_path / "base"
    tiny_model("llama").save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    start = ["model.source=hub", f"model.name={base}", "model.family=llama", "model.dtype=float32", "lora=all_linear"]
    arguments = [item for item in COMMON if item != "model=tiny_random"]
    (tmp_path / "rows.jsonl").write_text('{"text": "a sentence"}\n{"text": "another one"}\n')
    arguments.append(f"streams.simcse.sources=[{{path: {tmp_path}/rows.jsonl}}]")
    run = train(
        [*arguments, *start, "streams.simcse.batch_size=2", "max_steps=1", "logging.progress=false", f"run_dir={tmp_path}/run"]
    )
    tiny_model("llama", seed=1).save_pretrained(base)
    assert main(["export", str(run), "--out", str(tmp_path / "again")]) == 2
    assert "belongs to another run. model: the checkpoint has" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "again").exists()


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
