"""KTO runs from their recipe: reference scores that are computed once and kept, resume, and what the run reports."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from tests.engine.small_run import equal, metrics, tensors
from tests.processes import NEEDS_DEEPSPEED, Group
from unified_lm.assembly.checkpoints import export_checkpoint
from unified_lm.cli.script import train
from unified_lm.core.errors import ConfigError
from unified_lm.data.prompts.templates import get_template
from unified_lm.engine import reference_scores
from unified_lm.engine.reference_scores import ReferenceCache
from unified_lm.export.manifest import Manifest

ANOTHER = replace(get_template("grit"), name="another", bare_prompt="Another prompt\n")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rows = [
        {"prompt": f"say {i // 2}", "completion": f"{i} " * (1 + i % 5) if i % 2 else "no", "label": bool(i % 2)}
        for i in range(20)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def arguments(data: Path, run_dir: Path, *more: str) -> list[str]:
    return [
        "recipe=kto_smollm2",
        "model=tiny_random",
        "lora=none",
        "max_steps=4",
        "optim.learning_rate=0.01",
        "streams.preference.objective.desirable_weight=1.0",
        "checkpoint={every: 2, keep_last: 5}",
        f"streams.preference.sources=[{{path: {data}/rows.jsonl}}]",
        f"validation.sources.preference=[{{path: {data}/rows.jsonl}}]",
        "export.enabled=false",
        "logging.progress=false",
        f"run_dir={run_dir}",
        *more,
    ]


@pytest.fixture(autouse=True)
def cache(data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UNIFIED_LM_CACHE", str(data / "cache"))
    monkeypatch.setattr(reference_scores, "CHUNK_ROWS", 8)
    return data / "cache" / "references"


@pytest.fixture(scope="module")
def finished(data: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNIFIED_LM_CACHE", str(data / "cache"))
        patch.setattr(reference_scores, "CHUNK_ROWS", 8)
        return train(arguments(data, data / "run"))


def test_references_are_kept_and_used_again(finished: Path, data: Path, cache: Path, tmp_path: Path, monkeypatch):
    (folder,) = cache.iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["000000000.npy", "000000008.npy", "000000016.npy"]
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert all(np.isfinite(np.load(path)).all() and (np.load(path) < 0).all() for path in before)
    (folder / "000000008.npy").write_bytes(b"torn")
    scored: list[int] = []
    score = ReferenceCache._score
    monkeypatch.setattr(ReferenceCache, "_score", lambda self, samples: scored.append(len(samples)) or score(self, samples))
    with pytest.warns(UserWarning, match="is damaged"):
        again = train(arguments(data, tmp_path / "run"))
    assert scored == [16], "8 rows and their controls: the chunk that was damaged, and no other"
    assert {path: path.read_bytes() for path in before} == before
    assert metrics(again) == metrics(finished)


def test_the_first_step_starts_at_the_reference(finished: Path, data: Path, tmp_path: Path):
    """Before any update both references give a log-ratio of 0, and a loss of one half."""
    lora = train(arguments(data, tmp_path / "run", "lora=all_linear", "max_steps=1"))
    for run_dir in (finished, lora):
        lines = metrics(run_dir)
        held_out = next(line for line in lines if "heldout/preference" in line)
        step = next(line for line in lines if "loss" in line)
        assert step["loss"] == held_out["heldout/preference"] == pytest.approx(0.5, abs=1e-5)
        for name in ("kl", "log_ratio_desirable", "log_ratio_undesirable", "margin"):
            if f"preference/{name}" in step:  # four rows may be of one kind
                assert step[f"preference/{name}"] == pytest.approx(0.0, abs=1e-4)
            assert held_out[f"heldout/preference/{name}"] == pytest.approx(0.0, abs=1e-4)
        assert held_out["heldout/preference/log_probability_desirable"] < -1


def test_training_tells_the_two_kinds_apart(finished: Path):
    first, last = (line for line in metrics(finished) if "heldout/preference" in line)
    assert last["heldout/preference"] < first["heldout/preference"]
    assert last["heldout/preference/margin"] > 0.1


def test_the_export_of_a_checkpoint_scores_nothing(finished: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(ReferenceCache, "attach", lambda *_: pytest.fail("scored"))
    export_checkpoint(finished, tmp_path / "export", Console(quiet=True))
    assert Manifest.load(tmp_path / "export").recipe == "kto_smollm2"


@pytest.mark.slow
@NEEDS_DEEPSPEED
def test_another_backend_finds_the_same_references(finished: Path, data: Path, cache: Path, tmp_path: Path):
    before = set(cache.iterdir())
    group = Group(arguments(data, tmp_path / "run", "parallel=zero3"), 2, tmp_path / "log")
    assert group.wait() == [0, 0], group.output()
    assert set(cache.iterdir()) == before


def test_resume_is_bit_exact(finished: Path, data: Path, tmp_path: Path):
    """Law 5, with references that come from the cache, not from the weights at the time."""
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "step-00000004")
    train(arguments(data, run_dir, "resume=auto"))
    name = "checkpoints/step-00000004"
    assert equal(tensors(run_dir / name), tensors(finished / name))
    assert not equal(tensors(run_dir / name), tensors(finished / "checkpoints/step-00000002"))
    assert metrics(run_dir) == metrics(finished)


def test_kto_after_grit_keeps_the_embedding_mode(data: Path, tmp_path: Path, monkeypatch):
    common = ["model=tiny_random", "lora=none", "max_steps=1", "logging.progress=false"]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps({"query": f"q {i}", "pos": [f"d {i}"]}) + "\n" for i in range(8)))
    grit = train(
        [
            "recipe=embedding_only",
            *common,
            "model.family=llama",
            "streams.embedding.num_hard_negatives=0",
            f"streams.embedding.sources=[{{path: {tmp_path}/pairs.jsonl, instruction: Find it}}]",
            "~validation.sources",
            "~validation.retrieval",
            f"run_dir={tmp_path}/grit",
        ]
    )
    kto = train([*arguments(data, tmp_path / "kto", "export.enabled=true", "max_steps=1"), f"model.init_from={grit}"])
    before, after = Manifest.load(grit / "export"), Manifest.load(kto / "export")
    assert (before.modes, after.modes) == (("embed",), ("embed", "generate"))
    assert (after.instructions, after.pooling, after.max_tokens) == (before.instructions, before.pooling, before.max_tokens)
    assert [stage.recipe for stage in after.stages] == ["embedding_only", "kto_smollm2"]
    monkeypatch.setattr(ReferenceCache, "attach", lambda *_: pytest.fail("scored before the export was checked"))
    with pytest.raises(ConfigError, match=r"embeds with template 'grit', but the preferences have template '.*ANOTHER'"):
        train(
            [
                *arguments(data, tmp_path / "another", "export.enabled=true", "max_steps=1"),
                *(f"model.init_from={grit}", f"streams.preference.template={__name__}.ANOTHER"),
            ]
        )
    assert not (tmp_path / "another" / "config.yaml").exists(), "refused before anything is trained"
