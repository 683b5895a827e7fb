"""The adapter alone: stock peft puts it on the base with the logits of training, and this package starts from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.export.export_cases import make_manifest
from unified_lm.cli.main import main
from unified_lm.cli.script import train
from unified_lm.config.schema import LoraConfig, ModelConfig
from unified_lm.core.errors import CheckpointError
from unified_lm.data.prompts.templates import get_template
from unified_lm.export.adapter_folder import write_adapter
from unified_lm.export.manifest import Manifest
from unified_lm.inference import UnifiedLM
from unified_lm.models.loading import load_model
from unified_lm.models.lora import apply_lora
from unified_lm.models.tiny import tiny_model, tiny_tokenizer

TOKENS = torch.arange(3, 27)[None]
EXPERTS = ("q_proj", "experts.gate_up_proj", "experts.down_proj")


@pytest.mark.parametrize(
    ("family", "targets"),
    [("llama", "all-linear"), ("gpt2", "all-linear"), ("mixtral", EXPERTS), ("qwen3_moe", ("q_proj", "o_proj"))],
)
@torch.no_grad()
def test_peft_computes_what_training_did(family: str, targets: tuple[str, ...] | str, tmp_path: Path) -> None:
    tiny_model(family).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = LoraConfig(r=4, alpha=8.0, dropout=0.1, target_modules=targets)
    apply_lora(model, config, seed=0)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05)
    base = str(tmp_path / "base")
    given = {"config": config, "base": base, "base_revision": None, "template": get_template("grit")}
    write_adapter(model, tiny_tokenizer(), tmp_path / "adapter", manifest=make_manifest(family=family), **given)
    expected = model.eval()(TOKENS).logits
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter").eval()
    assert (stock(TOKENS).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (AutoModelForCausalLM.from_pretrained(base)(TOKENS).logits - expected).abs().max() > 1e-2 * expected.abs().max()
    again = load_model(ModelConfig(name=str(tmp_path / "adapter"), dtype="float32")).causal_lm
    assert (again(TOKENS).logits - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_an_adapter_that_peft_puts_elsewhere_is_refused(tmp_path: Path) -> None:
    model, config = tiny_model("deepseek_v3"), LoraConfig(r=4, dropout=0.0)
    apply_lora(model, config, seed=0)
    given = {"config": config, "base": "base", "base_revision": None, "template": get_template("grit")}
    with pytest.raises(CheckpointError, match=r"stock peft cannot put this adapter on a model of family 'deepseek_v3'"):
        write_adapter(model, tiny_tokenizer(), tmp_path / "a", manifest=make_manifest(family="deepseek_v3"), **given)
    assert not (tmp_path / "a").exists()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with adapters from a base on disk, with its export."""
    folder = tmp_path_factory.mktemp("adapter")
    tiny_model("llama").save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    (folder / "rows.jsonl").write_text("".join(f'{{"text": "sentence number {i}"}}\n' for i in range(8)))
    start = [
        "model.source=hub",
        f"model.name={folder}/base",
        "model.family=llama",
        "model.dtype=float32",
        "export.dtype=float32",
    ]
    stream = ["streams.simcse.batch_size=4", f"streams.simcse.sources=[{{path: {folder}/rows.jsonl}}]"]
    more = [
        "lora=all_linear",
        "optim.learning_rate=0.05",
        "max_steps=3",
        "logging.progress=false",
        f"run_dir={folder}/run",
    ]
    return train(["recipe=llm2vec_simcse", *start, *stream, *more])


def test_the_folder_of_a_run(run: Path) -> None:
    assert main(["export", str(run), "--adapter"]) == 0
    folder = run / "export-adapter"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str((run.parent / "base").resolve())
    assert Manifest.load(folder).stages == Manifest.load(run / "export").stages
    assert "holds a LoRA adapter only" in (folder / "README.md").read_text()
    assert len(AutoTokenizer.from_pretrained(folder)) == len(tiny_tokenizer())
    merged, alone = (UnifiedLM.from_pretrained(path, device="cpu").encode("a text") for path in (run / "export", folder))
    assert abs(merged - alone).max() < 1e-6
    untrained = UnifiedLM.from_pretrained(run.parent / "base", template="plain", attention="bidirectional", device="cpu")
    assert abs(untrained.encode("a text", normalize=True) - alone).max() > 1e-3
    assert main(["export", str(run), "--adapter"]) == 0, "our own folder may be replaced"


def test_a_run_starts_from_it(run: Path, tmp_path: Path) -> None:
    assert main(["export", str(run), "--adapter", "--out", str(tmp_path / "adapter")]) == 0
    start = ["model.source=hub", f"model.name={tmp_path}/adapter", "model.family=llama", "model.dtype=float32"]
    stream = ["streams.simcse.batch_size=4", f"streams.simcse.sources=[{{path: {run.parent}/rows.jsonl}}]"]
    more = ["lora=all_linear", "max_steps=1", "logging.progress=false", f"run_dir={tmp_path}/run"]
    again = train(["recipe=llm2vec_simcse", *start, *stream, *more])
    manifest = Manifest.load(again / "export")
    assert [stage.steps for stage in manifest.stages] == [3, 1]
    assert manifest.base_model == Manifest.load(run / "export").base_model


def test_what_has_no_adapter_or_no_base_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["recipe=llm2vec_simcse", "model=tiny_random", "max_steps=1", "export.enabled=false", "logging.progress=false"]
    for name, lora, message in (
        ("full", "none", "trained every weight: there is no adapter to export"),
        ("lora", "all_linear", "whose weights are in no folder that the adapter could name as its base"),
    ):
        train([*common, f"lora={lora}", f"run_dir={tmp_path}/{name}"])
        assert main(["export", f"{tmp_path}/{name}", "--adapter"]) == 2
        assert message in " ".join(capsys.readouterr().err.split())
        assert not (tmp_path / name / "export-adapter").exists()
