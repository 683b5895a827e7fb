"""Exports with damaged weights are refused by whoever reads them."""

import json
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock
from uuid import uuid4

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from tests.inference.conftest import make_export
from unified_lm.cli.arguments import command_parser
from unified_lm.cli.evaluate_generation import evaluate_lm
from unified_lm.cli.evaluate_model import add_model_options, find_model
from unified_lm.cli.main import main
from unified_lm.cli.upcycle import upcycle
from unified_lm.config.schema import ModelConfig
from unified_lm.core.errors import CheckpointError, ModelError
from unified_lm.evaluation.analyses.arms import ArmSettings, parse_arms
from unified_lm.export.hub_upload import push_to_hub
from unified_lm.export.serving import ENGINES, write_serving
from unified_lm.inference import UnifiedLM, loading
from unified_lm.mining.embedders import load_embedder
from unified_lm.models import precision, weights_hash
from unified_lm.models.loading import load_model
from unified_lm.models.tiny import tiny_model


def flip(folder: Path) -> Path:
    """Change one bit of the last weight."""
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(bytes(content))
    return folder


def drop(folder: Path) -> Path:
    """Remove one weight, and the recorded hash with it."""
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    manifest = json.loads((folder / "unified_lm.json").read_text())
    (folder / "unified_lm.json").write_text(json.dumps({**manifest, "weights_hash": ""}))
    return folder


@pytest.fixture
def copy(exported: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported(), tmp_path / "copy"))


def evaluated(folder: Path) -> Any:
    parser = command_parser("test", "", "")
    add_model_options(parser)
    return find_model(str(folder)).load(parser.parse_args([str(folder), "--device", "cpu"]))


def harnessed(folder: Path) -> Any:
    """`eval lm` with a harness that asks nothing: lm-eval may not be installed."""
    harness = mock.MagicMock(VERSION="0", **{"run_harness.return_value": ([], {})})
    harness.HarnessSettings.__dataclass_fields__ = {}
    with mock.patch.dict(sys.modules, {"unified_lm.evaluation.generation.lm_eval_adapter": harness}):
        try:
            evaluate_lm([str(folder), "--tasks", "none", "--out", str(folder.parent / f"{uuid4()}.json")])
        finally:
            assert harness.run_harness.called != isinstance(sys.exc_info()[1], ModelError | CheckpointError)


def pushed(folder: Path) -> Any:
    with mock.patch("unified_lm.export.hub_upload.HfApi") as api:
        try:
            push_to_hub(folder, "org/model")
        except ModelError:
            assert not api.return_value.upload_folder.called
            raise
        assert api.return_value.upload_folder.called


def served(folder: Path, engine: str) -> Any:
    target = folder.parent / "served"
    try:
        write_serving(folder, target, engine, pool_prompt=True)
    finally:
        assert target.exists() != isinstance(sys.exc_info()[1], ModelError | CheckpointError)
        shutil.rmtree(target, ignore_errors=True)


def adapted(folder: Path) -> Any:
    """Train from an adapter whose base the export is."""
    model = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    model.peft_config["default"].base_model_name_or_path = str(folder)
    model.save_pretrained(folder.parent / "adapter")
    return load_model(ModelConfig(name=str(folder.parent / "adapter"), dtype="float32"))


READERS: dict[str, Callable[[Path], Any]] = {
    "UnifiedLM": lambda folder: UnifiedLM.from_pretrained(folder, device="cpu"),
    "training": lambda folder: load_model(ModelConfig(init_from=str(folder), dtype="float32")),
    "training by name": lambda folder: load_model(ModelConfig(name=str(folder), dtype="float32")),
    "training from an adapter": adapted,
    "evaluation": evaluated,
    "analysis": lambda folder: parse_arms([str(folder)], ArmSettings(device="cpu"))[0].load(),
    "eval lm": harnessed,
    "upcycle": lambda folder: upcycle([str(folder), "--experts", "2", "--out", str(folder.parent / str(uuid4()))]),
    "push_to_hub": pushed,
    **{f"export --for {engine}": partial(served, engine=engine) for engine in ENGINES},
    "mining": lambda folder: load_embedder(str(folder), device="cpu"),
}


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_refuses_damaged_weights(reader: str, copy: Path) -> None:
    READERS[reader](copy)
    with pytest.raises(ModelError, match="are not those that were exported"):
        READERS[reader](flip(copy))


def test_an_export_by_name_is_compared_and_starts_no_history(copy: Path) -> None:
    provenance = load_model(ModelConfig(name=str(copy), dtype="float32")).provenance
    assert (provenance["source"], "manifest" in provenance, "init_from" in provenance) == ("directory", False, False)


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_refuses_missing_weights(reader: str, copy: Path) -> None:
    with pytest.raises(ModelError, match=r"1 weights are missing from the checkpoint .they would be random.*up_proj"):
        READERS[reader](drop(copy))


def cut(folder: Path, share: float) -> Path:
    """A copy that was interrupted, of an export without a recorded hash."""
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: round(path.stat().st_size * share)])
    manifest = json.loads((folder / "unified_lm.json").read_text())
    (folder / "unified_lm.json").write_text(json.dumps({**manifest, "weights_hash": ""}))
    return folder


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
@pytest.mark.parametrize("reader", READERS)
def test_every_reader_refuses_truncated_weights(reader: str, share: float, copy: Path) -> None:
    """With the hash they are not those that were exported (above); without one the library's own check is passed on."""
    with pytest.raises((ModelError, CheckpointError), match=r"cannot load the model in .*copy: SafetensorError|are torn"):
        READERS[reader](cut(copy, share))


def test_standardizing_refuses_damaged_weights(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "texts.txt").write_text("one\ntwo\nthree\n")
    flip(copy)
    arguments = ["standardize", str(copy), "--corpus", str(tmp_path / "texts.txt"), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--device", "cpu"]) == 2
    assert "are not those that were exported" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_large_weights_are_compared_on_request(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flip(copy)
    UnifiedLM.from_pretrained(copy, device="cpu", check_weights=False)
    monkeypatch.setattr(weights_hash, "CHECKED_BYTES", 10)
    UnifiedLM.from_pretrained(copy, device="cpu")
    with pytest.raises(ModelError, match="are not those that were exported"):
        UnifiedLM.from_pretrained(copy, device="cpu", check_weights=True)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("config.json", b"-1", "cannot load the model in"),
        ("config.json", b'{"model_type": "llama", "hidden_size": "x"}', "cannot load the model in"),
        ("tokenizer.json", b'{"version": null}', "cannot load the model in"),
        ("tokenizer_config.json", b"false", "cannot load the model in"),
        ("tokenizer_config.json", b'{"model_max_length": []}', "cannot load the model in"),  # loads, and fails when it is used
        ("generation_config.json", b'" "', "cannot load the model in"),
        *(
            ("generation_config.json", f'{{"{name}": {value}}}'.encode(), "cannot load the model in")
            for name in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
            for value in ("1e308", "1" + 30 * "0", "{}", "true", '[1, "2"]')
        ),
        ("unified_lm.json", b"[" * 100_000, "is not valid JSON"),
        ("unified_lm.json", b"\xff", "is not valid JSON"),
    ],
)
def test_a_damaged_file_of_an_export_is_named(name: str, content: bytes, told: str, copy: Path) -> None:
    (copy / name).unlink(missing_ok=True)
    (copy / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{told}|{name}"):
        UnifiedLM.from_pretrained(copy)


@pytest.mark.parametrize(("stored", "has_unit"), [("bfloat16", False), ("bfloat16", True), ("float32", False)])
def test_a_wider_type_than_the_stored_one_is_said_once(
    stored: str, has_unit: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_export(tmp_path / "export", changes={"dtype": stored})
    monkeypatch.setattr(precision, "bfloat16_unit", lambda device: "unit" if has_unit else None)
    loading._say_widened.cache_clear()
    for _ in range(2):
        UnifiedLM.from_pretrained(folder, device="cpu")
        assert loading.stock_dtype(folder, "auto", "cpu") == (stored if has_unit else "float32")
    assert loading.stock_dtype(folder, None, "cpu") == stored
    UnifiedLM.from_pretrained(folder, device="cpu", dtype=None)
    said = [record.getMessage() for record in caplog.records if "twice the memory" in record.getMessage()]
    assert len(said) == (stored == "bfloat16" and not has_unit)
    assert all(text.startswith("note: weights stored as bfloat16 are held as float32") for text in said)


@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32"])
def test_auto_is_exactly_the_stored_type_where_that_is_fast(
    stored: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Buffers included: rotary frequencies rounded to bfloat16 turn the positions of long texts."""
    monkeypatch.setattr(loading, "auto_inference_dtype", lambda dtype, device: dtype)
    folder = make_export(tmp_path / "export", changes={"dtype": stored})
    texts = ["a text", "words " * 80]
    found = {dtype: UnifiedLM.from_pretrained(folder, device="cpu", dtype=dtype) for dtype in ("auto", None, stored)}
    vectors = {dtype: model.encode(texts) for dtype, model in found.items()}
    assert np.array_equal(vectors["auto"], vectors[None])
    assert np.array_equal(vectors["auto"], vectors[stored])
    for model in found.values():
        with model.borrow_backbone() as backbone:
            assert {buffer.dtype for name, buffer in backbone.causal_lm.named_buffers() if "inv_freq" in name} == {
                torch.float32
            }


def test_a_folder_for_another_library_is_complete(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="1 weights are missing from the checkpoint"):
        loading.stock_dtype(drop(copy), None)
    tiny_model("mistral", tie_word_embeddings=False).get_decoder().save_pretrained(tmp_path / "bare")
    with pytest.raises(ModelError, match="no language-model head"):
        loading.stock_dtype(tmp_path / "bare", "float32")
    (copy / "config.json").write_text("-1")
    with pytest.raises(ModelError, match="cannot load the weights"):
        loading.stock_dtype(copy, None)
