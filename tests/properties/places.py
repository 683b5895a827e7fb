"""The folder in which a property calls a command: texts, models, runs and indexes to name; a file of one may be damaged."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from tests.checkpoint.test_state import save
from tests.inference.conftest import make_export
from tests.properties.cases import VALUES, Case, mutated, to_json
from tests.reporting.test_report import write_run
from unified_lm.cli.main import main


@cache
def originals() -> Path:
    """A folder with one of each, made once per process."""
    root = Path(tempfile.mkdtemp(prefix="unified_lm_properties_"))
    make_export(root / "export")
    write_run(root / "run")
    (root / "sweep").mkdir()
    for name in ("a-seed1", "b-seed1"):
        write_run(root / "sweep" / name)
    (root / "sweep" / "sweep.json").write_text(json.dumps({"recipe": "r", "base": "b", "arms": ["a", "b"]}))
    table = {"title": "t", "columns": ["a"], "rows": [[1]], "note": "n"}
    (root / "run" / "evaluation").mkdir()
    (root / "run" / "evaluation" / "t.json").write_text(json.dumps(table))
    result = {"task_name": "STS", "scores": {"test": [{"hf_subset": "default", "main_score": 0.5}]}}
    (root / "run" / "mteb" / "results" / "m" / "r").mkdir(parents=True)
    (root / "run" / "mteb" / "results" / "m" / "r" / "STS.json").write_text(json.dumps(result))
    (root / "adapter").mkdir()
    adapter = {"peft_type": "LORA", "base_model_name_or_path": str(root / "export"), "revision": None, "r": 4}
    adapter |= {"lora_alpha": 8, "lora_dropout": 0.0, "target_modules": ["q_proj"]}
    (root / "adapter" / "adapter_config.json").write_text(json.dumps(adapter))
    save(root / "checkpoints", 1)
    (root / "texts.txt").write_text(_TEXTS)
    model = ["--model", str(root / "export"), "--device", "cpu", "--out"]
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        assert main(["embed", str(root / "texts.txt"), *model, str(root / "vectors")]) == 0
        assert main(["index", str(root / "texts.txt"), "--states", "none", *model, str(root / "index")]) == 0
    return root


_TEXTS = "one text of several words\nanother text of several words\n"


JSON_FILES = (
    *("config.json", "tokenizer.json", "tokenizer_config.json", "unified_lm.json", "generation_config.json", "modules.json"),
    *("sentence_bert_config.json", "config_sentence_transformers.json", "1_Pooling/config.json", "special_tokens_map.json"),
)
RUN_FILES = ("run.json", "metrics.jsonl", "config.yaml", "validation/step-00000004.json", "evaluation/t.json")
RUN_FILES += ("mteb/results/m/r/STS.json",)
DAMAGED: Mapping[str, tuple[str, ...]] = {
    "export": (*JSON_FILES, "model.safetensors"),
    "run": RUN_FILES,
    "adapter": ("adapter_config.json",),
    "vectors": ("embeddings.json",),
    "index": ("index.json",),
}
"""Folder -> files that are damaged in it."""
_LINE = {"step": 4, "heldout/embedding": 1.0, "retrieval/ndcg@10": 0.75, "loss": 2.0, "step_seconds": 2.0}


def _values_of(root: str, name: str) -> Any:
    path = originals() / root / name
    if name == "metrics.jsonl" or not path.is_file() or path.suffix == ".safetensors":
        return _LINE if name == "metrics.jsonl" else {"a": 1}
    if path.suffix == ".yaml":
        return {"recipe": "grit_smollm2", "max_steps": 4, "seed": 7, "optim": {"learning_rate": 1e-5}}
    return json.loads(path.read_text())


def damages(root: str, names: tuple[str, ...]) -> st.SearchStrategy[tuple[str, str, Any]]:
    """(file, how, content) of a damage."""

    def of(name: str) -> st.SearchStrategy[tuple[str, str, Any]]:
        value = _values_of(root, name)
        changed = st.one_of(mutated(value), mutated(value, 1), VALUES)
        return st.one_of(
            changed.map(lambda new: (name, "value", new)),
            st.sampled_from(["gone", "empty", "half", "bytes", "folder", "deep"]).map(lambda how: (name, how, None)),
        )

    return st.sampled_from(names).flatmap(of)


def damage(folder: Path, name: str, how: str, new: Any) -> None:
    """Damage a file of a folder in one of the ways of `damages`."""
    path = folder / name
    old = path.read_bytes() if path.is_file() else b""
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    if how == "folder":
        path.mkdir()
    elif how == "value" and name == "metrics.jsonl":
        path.write_bytes(old + to_json(new) + b"\n" + to_json({"step": 5, "heldout/embedding": 0.5, "loss": 1.0}) + b"\n")
    elif how != "gone":
        contents = {"empty": b"", "half": old[: len(old) // 2], "bytes": b"\xff\xfe\0garbage", "deep": b"[" * 100_000}
        path.write_bytes(to_json(new) if how == "value" else contents[how])


class Place:
    """A user's folder for one command."""

    def __init__(self, root: Path, case: Case) -> None:
        self.root = root
        (root / "texts.txt").write_text(_TEXTS)
        (root / "pairs.jsonl").write_text('{"query": "what is it", "pos": ["it is this"]}\n{"query": "q", "pos": ["p"]}\n')
        (root / "bad.jsonl").write_bytes(b'{"text": "\xff"}\n[1]\n')
        (root / "empty.txt").write_text("")
        (root / "conll.txt").write_text("a DT\ntext NN\n\nanother DT\ntext NN\n")
        (root / "folder").mkdir()
        (root / "task").mkdir()
        (root / "task" / "task.yaml").write_text("type: sts\n")
        rows = [{"sentence1": "a text", "sentence2": f"text {i}", "score": i} for i in range(3)]
        (root / "task" / "test.jsonl").write_bytes(b"".join(to_json(row) + b"\n" for row in rows))
        shutil.copytree(originals() / "export", root / "export", copy_function=os.link)
        for folder in ("run", "sweep", "adapter", "vectors", "index"):
            shutil.copytree(originals() / folder, root / folder)
        if case["damage"] is not None:
            folder, how = case["damage"]
            damage(root / folder, *how)
