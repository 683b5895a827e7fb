"""Adapter folders of peft as a start: merged as peft would, or refused where something of them is missing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from unified_lm.config.schema import ModelConfig
from unified_lm.core.errors import ModelError
from unified_lm.inference import UnifiedLM
from unified_lm.models.adapters import find_adapter
from unified_lm.models.loading import load_model, load_tokenizer
from unified_lm.models.tiny import tiny_model, tiny_tokenizer

TOKENS = torch.arange(3, 27)[None]
KINDS = {
    "plain": LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]),
    "dora": LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], use_dora=True),
    "rank-stabilized": LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", use_rslora=True),
    "saved head": LoraConfig(r=4, lora_alpha=8, target_modules=["v_proj"], modules_to_save=["lm_head"]),
    "trained tokens": LoraConfig(r=4, lora_alpha=8, target_modules=["v_proj"], trainable_token_indices=[5, 9]),
}


def write_adapter(folder: Path, config: LoraConfig, dtype: torch.dtype = torch.float32) -> Path:
    """A base and an adapter that does something, in two folders; returns that of the adapter."""
    tiny_model("llama", dtype=dtype).save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "base"), config)
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * 0.05
    model.save_pretrained(folder / "adapter")
    return folder / "adapter"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("key", ["name", "init_from"])
@torch.no_grad()
def test_an_adapter_is_merged_into_its_base(kind: str, key: str, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path, KINDS[kind])
    expected = AutoPeftModelForCausalLM.from_pretrained(adapter).eval()(TOKENS).logits
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded = load_model(ModelConfig(**{key: str(adapter)}, dtype="float32"))
    assert set(loaded.causal_lm.state_dict()) == set(plain.state_dict())
    assert all(parameter.requires_grad for parameter in loaded.causal_lm.parameters())
    got = loaded.causal_lm(TOKENS).logits
    assert (expected - got).abs().max() <= 1e-5 * expected.abs().max()
    assert (expected - plain(TOKENS).logits).abs().max() > 1e-3 * expected.abs().max()
    manifest = loaded.provenance["manifest"]
    assert manifest["base_model"] == str(tmp_path / "base")
    assert [stage["adapter"]["r"] for stage in manifest["stages"]] == [4]
    assert len(load_tokenizer(ModelConfig(name=str(adapter)))) == len(tiny_tokenizer())


def test_bfloat16_is_rounded_once(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path, KINDS["plain"], torch.bfloat16)
    exact = AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.float32).merge_and_unload().state_dict()
    loaded = load_model(ModelConfig(name=str(adapter), dtype="bfloat16")).causal_lm
    assert all(torch.equal(tensor, exact[name].bfloat16()) for name, tensor in loaded.state_dict().items())


@torch.no_grad()
def test_unified_lm_merges_it(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path, KINDS["plain"])
    model = UnifiedLM.from_pretrained(adapter, template="plain", attention="causal", device="cpu")
    expected = AutoPeftModelForCausalLM.from_pretrained(adapter).eval()
    merged = UnifiedLM(expected.merge_and_unload(), tiny_tokenizer(), template="plain", attention="causal")
    assert abs(model.encode("a text") - merged.encode("a text")).max() < 1e-6


def edit(folder: Path, **values: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def drop_a_tensor(adapter: Path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors.pop(next(iter(tensors)))
    save_file(tensors, adapter / "adapter_model.safetensors")


def add_a_tensor(adapter: Path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    name, tensor = next(iter(tensors.items()))
    save_file({**tensors, name.replace("layers.0", "layers.7"): tensor.clone()}, adapter / "adapter_model.safetensors")


def name_an_adapter(adapter: Path) -> None:
    shutil.copytree(adapter, adapter.parent / "other")
    edit(adapter, base_model_name_or_path=str(adapter.parent / "other"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_a_tensor, r"does not fit a LlamaForCausalLM: 1 weights are missing"),
        (add_a_tensor, r"1 weights belong to no layer of the base"),
        (lambda path: edit(path, r=8), r"cannot load the adapter of '.*adapter'"),
        (
            lambda path: edit(path, base_model_name_or_path="/no/such"),
            r"the base of the adapter '.*adapter' .*no such directory",
        ),
        (lambda path: edit(path, base_model_name_or_path=None), r"does not name the model that the adapter belongs to"),
        (lambda path: edit(path, peft_type="IA3"), r"is an adapter of kind IA3; only those of kind LORA are merged"),
        (name_an_adapter, r"the base of the adapter '.*adapter' is an adapter itself"),
        (lambda path: (path / "adapter_config.json").write_text("{"), r"is not valid JSON"),
        (lambda path: (path / "adapter_config.json").write_text("[]"), r"json: got \[\] \(list\), expected an object"),
        (lambda path: (path / "adapter_config.json").write_text("[" * 100_000), r"nested too deeply to be read"),
        (lambda path: edit(path, r=None), r"adapter_config\.json: r: got None"),
        (lambda path: edit(path, r="x"), r"adapter_config\.json: r: got 'x' \(str\), expected a whole number"),
        (lambda path: edit(path, lora_alpha=[]), r"lora_alpha: got \[\] \(list\), expected a number"),
        (lambda path: edit(path, target_modules=5), r"target_modules: got 5 \(int\), expected text or a list of text"),
    ],
)
def test_what_does_not_fit_is_refused(damage: object, message: str, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path, KINDS["plain"])
    damage(adapter)
    with pytest.raises(ModelError, match=message):
        load_model(ModelConfig(name=str(adapter), dtype="float32"))


def test_the_revision_of_the_base_is_the_adapters(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path, KINDS["plain"])
    edit(adapter, base_model_name_or_path="org/base", revision="0123abc")
    found = find_adapter(str(adapter))
    assert found is not None
    assert (found.base, found.base_revision) == ("org/base", "0123abc")
    with pytest.raises(ModelError, match=r"the base of the adapter .*'org/base' is not in the local cache"):
        load_model(ModelConfig(name=str(adapter), dtype="float32"))


def test_no_adapter_in_four_bits(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path, KINDS["plain"])
    with pytest.raises(ModelError, match=r"cannot be merged into 4-bit weights"):
        load_model(ModelConfig(name=str(adapter), dtype="float32"), quantize_4bit=True)
