"""What is written, what is refused, and that a failure leaves the previous export alone."""

import errno
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoConfig, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from tests.export.export_cases import make_manifest
from unified_lm.core.errors import CheckpointError
from unified_lm.data.prompts.templates import TEMPLATES, get_template
from unified_lm.export import directory as export
from unified_lm.export.directory import export_model, sentence_transformers_obstacle, template_of
from unified_lm.export.manifest import Manifest
from unified_lm.export.merge import ModelParts
from unified_lm.export.sentence_transformers_files import POOLING_MODES
from unified_lm.models.backbone import Backbone
from unified_lm.models.pooling import Projection
from unified_lm.models.tiny import tiny_model, tiny_tokenizer
from unified_lm.models.weights_hash import hash_weights

GRIT = get_template("grit")


def write(target: Path, model: PreTrainedModel | None = None, verify: str = "off", **changes: Any) -> Manifest:
    return export_model(
        tiny_model("llama") if model is None else model,
        tiny_tokenizer(),
        target,
        manifest=make_manifest(**changes),
        template=get_template(changes.get("template", "grit")),
        verify=verify,
    )


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_files_that_stock_tools_read(tmp_path: Path) -> None:
    model = tiny_model("llama")
    backbone = Backbone(model, "sdpa")
    settings = {"dtype": model.config.dtype, "architectures": model.config.architectures}
    packed = model.config._attn_implementation
    write(tmp_path / "export", backbone.causal_lm)
    assert model.config._attn_implementation == packed, "exporting does not disturb a model in training"
    assert {name: getattr(model.config, name) for name in settings} == settings
    config = read(tmp_path / "export" / "config.json")
    assert config["is_causal"] is True
    assert config["use_cache"] is True
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert packed not in json.dumps(config)
    assert read(tmp_path / "export" / "sentence_bert_config.json") == {
        "max_seq_length": 64,
        "do_lower_case": False,
        "config_kwargs": {"is_causal": False},
        "processor_kwargs": {"padding_side": "right"},
    }
    assert read(tmp_path / "export" / "1_Pooling" / "config.json") == {
        "embedding_dimension": 64,
        "pooling_mode": "mean",
        "pooling_mode_cls_token": False,
        "pooling_mode_mean_tokens": True,
        "pooling_mode_max_tokens": False,
        "pooling_mode_mean_sqrt_len_tokens": False,
        "pooling_mode_weightedmean_tokens": False,
        "pooling_mode_lasttoken": False,
        "include_prompt": False,
    }
    modules = read(tmp_path / "export" / "modules.json")
    assert [module["type"].rpartition(".")[2] for module in modules] == ["Transformer", "Pooling", "Normalize"]
    prompts = read(tmp_path / "export" / "config_sentence_transformers.json")
    assert prompts["prompts"] == {"query": "<|user|>\nFind the passage.\n<|embed|>\n", "document": "<|embed|>\n"}
    assert prompts["default_prompt_name"] == "document"
    assert read(tmp_path / "export" / "generation_config.json")["eos_token_id"] == 2


def test_what_is_causal_follows_mode_and_attention(tmp_path: Path) -> None:
    for modes, attention, root, overlay in (
        (("embed",), "bidirectional", False, False),
        (("embed",), "causal", True, True),
        (("embed", "generate"), "causal", True, True),
    ):
        write(tmp_path / "export", modes=modes, attention=attention, verify="full")
        assert read(tmp_path / "export" / "config.json")["is_causal"] is root
        assert read(tmp_path / "export" / "sentence_bert_config.json")["config_kwargs"] == {"is_causal": overlay}
    write(tmp_path / "generative", modes=("generate",), verify="full")
    assert not (tmp_path / "generative" / "modules.json").exists()


@pytest.mark.parametrize("scaling", [{}, {"rope_type": "linear", "factor": 2.0}])
def test_rotary_settings_stand_where_older_transformers_looks(tmp_path: Path, scaling: dict[str, Any]) -> None:
    model = tiny_model("llama", rope_parameters={"rope_type": "default", "rope_theta": 54321.0} | scaling)
    write(tmp_path / "export", model, verify="full")
    config = read(tmp_path / "export" / "config.json")
    assert config["rope_theta"] == 54321.0
    assert config.get("rope_scaling", {}) == scaling
    assert AutoConfig.from_pretrained(tmp_path / "export").rope_parameters == model.config.rope_parameters


def test_an_embedding_export_has_no_chat_template_or_generation_config(tmp_path: Path) -> None:
    write(tmp_path / "export", modes=("embed",))
    assert not (tmp_path / "export" / "chat_template.jinja").exists()
    assert not (tmp_path / "export" / "generation_config.json").exists()


def test_tied_weights_are_written_once(tmp_path: Path) -> None:
    write(tmp_path / "export", tiny_model("llama", tie_word_embeddings=True), verify="full", dtype="bfloat16")
    state = load_file(tmp_path / "export" / "model.safetensors")
    assert "lm_head.weight" not in state
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}


def test_large_models_are_split(tmp_path: Path) -> None:
    export_model(
        tiny_model("mixtral"),
        tiny_tokenizer(),
        tmp_path / "export",
        manifest=make_manifest(),
        template=GRIT,
        verify="full",
        max_shard_size="200KB",
    )
    assert len(list((tmp_path / "export").glob("model-*.safetensors"))) > 2
    assert (tmp_path / "export" / "model.safetensors.index.json").exists()


def test_the_manifest_is_completed(tmp_path: Path) -> None:
    written = write(tmp_path / "export", family="to be filled in", template_fields={})
    assert written == Manifest.load(tmp_path / "export")
    assert (written.family, written.embedding_dim) == ("llama", 64)
    assert template_of(written) == GRIT
    assert written.weights_hash == hash_weights(tmp_path / "export")
    assert "transformers" in written.versions


def test_stops_at_the_templates_own_end_of_answer(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(add_bos=False)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    model = tiny_model("llama", vocab_size=len(tokenizer))
    export_model(model, tokenizer, tmp_path / "export", manifest=make_manifest(), template=TEMPLATES["chatml"], verify="full")
    stops = read(tmp_path / "export" / "generation_config.json")["eos_token_id"]
    assert set(stops) == {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")}


def test_projection(tmp_path: Path) -> None:
    torch.manual_seed(0)
    written = export_model(
        tiny_model("llama"),
        tiny_tokenizer(),
        tmp_path / "export",
        manifest=make_manifest(dtype="bfloat16"),
        template=GRIT,
        projection=Projection(64, 24),
        verify="full",
    )
    assert (written.embedding_dim, written.projection_dim) == (24, 24)
    assert [module["path"] for module in read(tmp_path / "export" / "modules.json")] == [
        "",
        "1_Pooling",
        "2_Dense",
        "3_Normalize",
    ]


@pytest.mark.parametrize("pooling", ["last_token", "cls"])
def test_other_poolings_agree_with_sentence_transformers(tmp_path: Path, pooling: str) -> None:
    write(tmp_path / "export", pooling=pooling, verify="full")


@pytest.mark.parametrize("pooling", POOLING_MODES)
def test_every_pooling_has_both_spellings(tmp_path: Path, pooling: str) -> None:
    plain = {"template": "plain", "instructions": {}} if pooling == "weighted_mean" else {}
    write(tmp_path / "export", pooling=pooling, **plain)
    written = read(tmp_path / "export" / "1_Pooling" / "config.json")
    older = {
        "mean": "pooling_mode_mean_tokens",
        "weighted_mean": "pooling_mode_weightedmean_tokens",
        "last_token": "pooling_mode_lasttoken",
        "cls": "pooling_mode_cls_token",
    }
    assert written["pooling_mode"] == POOLING_MODES[pooling]
    assert [key for key, value in written.items() if key.startswith("pooling_mode_") and value] == [older[pooling]]
    assert len([key for key in written if key.startswith("pooling_mode_")]) == 6, "the others are written as false"


def test_weighted_mean_behind_a_prompt_is_refused(tmp_path: Path) -> None:
    assert sentence_transformers_obstacle(make_manifest(pooling="weighted_mean"), GRIT, tiny_tokenizer())
    plain = make_manifest(pooling="weighted_mean", instructions={})
    assert sentence_transformers_obstacle(plain, TEMPLATES["plain"], tiny_tokenizer()) is None
    with pytest.raises(CheckpointError, match="counts positions from the start of the prompt"):
        write(tmp_path / "export", pooling="weighted_mean")
    export_model(
        tiny_model("llama"),
        tiny_tokenizer(),
        tmp_path / "export",
        manifest=make_manifest(pooling="weighted_mean"),
        template=GRIT,
        sentence_transformers=False,
    )
    assert not (tmp_path / "export" / "modules.json").exists()
    assert "cannot express how this model makes its vectors" in (tmp_path / "export" / "README.md").read_text()
    export_model(
        tiny_model("llama"), tiny_tokenizer(), tmp_path / "plain", manifest=plain, template=TEMPLATES["plain"], verify="full"
    )


def test_requests_that_cannot_be_met(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="Did you mean 'mean'"):
        write(tmp_path / "export", pooling="meen")
    with pytest.raises(CheckpointError, match="Did you mean 'bfloat16'"):
        write(tmp_path / "export", dtype="bfloat61")
    with pytest.raises(CheckpointError, match="Did you mean 'full'"):
        write(tmp_path / "export", verify="ful")
    assert list(tmp_path.iterdir()) == []


def test_an_ordinary_token_made_special_is_refused(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.mask_token = "_"
    with pytest.raises(CheckpointError, match=r"ordinary tokens as special: '_'.*mask_token = None"):
        export_model(tiny_model("llama"), tokenizer, tmp_path / "export", manifest=make_manifest(), template=GRIT)


def _without_root_key(building: Path) -> None:
    config = read(building / "config.json")
    del config["is_causal"]
    (building / "config.json").write_text(json.dumps(config))


def _bidirectional_root(building: Path) -> None:
    config = read(building / "config.json")
    (building / "config.json").write_text(json.dumps(config | {"is_causal": False}))


def _other_prompt(building: Path) -> None:
    path = building / "config_sentence_transformers.json"
    config = read(path)
    config["prompts"]["query"] = "Something else.\n"
    path.write_text(json.dumps(config))


def _pools_the_prompt(building: Path) -> None:
    path = building / "1_Pooling" / "config.json"
    path.write_text(json.dumps(read(path) | {"include_prompt": True}))


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (_without_root_key, "wrong attention"),
        (_bidirectional_root, "would not generate causally"),
        (_other_prompt, "other vectors for prompt 'query'"),
        (_pools_the_prompt, "other vectors for prompt 'query'"),
    ],
)
def test_verification_catches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Any, expected: str) -> None:
    write(tmp_path / "export")
    before = contents(tmp_path / "export")
    card = export.model_card

    def damaging_card(*arguments: Any) -> str:
        damage(next(tmp_path.glob(".export.*.building")))
        return card(*arguments)

    monkeypatch.setattr(export, "model_card", damaging_card)
    with pytest.raises(CheckpointError, match=expected):
        write(tmp_path / "export", verify="full")
    assert contents(tmp_path / "export") == before
    write(tmp_path / "export", verify="off")


def test_verification_catches_changed_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faithful = export.merged_weights

    def unfaithful(parts: ModelParts) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in faithful(parts):
            yield name, tensor
            if name == "model.norm.weight":  # in the file, after the hash was taken
                path = next(tmp_path.glob(".export.*.building")) / "model.safetensors"
                with open(path, "r+b") as handle:
                    handle.seek(-4, 2)
                    handle.write(b"\0\0\x20\x40")

    monkeypatch.setattr(export, "merged_weights", unfaithful)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight' differs"):
        write(tmp_path / "export", verify="full")


@pytest.mark.parametrize(
    ("writer", "error"),
    [
        (PreTrainedModel, OSError(errno.ENOSPC, "No space left on device")),
        (PreTrainedModel, SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")),
        (PreTrainedTokenizerBase, Exception("No space left on device (os error 28)")),
    ],
    ids=["config", "weights", "tokenizer"],
)
def test_a_full_disk_leaves_the_previous_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: type, error: Exception
) -> None:
    write(tmp_path / "export")
    before = contents(tmp_path / "export")

    def full(self: object, folder: Path, *_: object, **__: object) -> None:
        (Path(folder) / "half-written").write_text("half")
        raise error

    monkeypatch.setattr(writer, "save_pretrained", full)
    with pytest.raises(CheckpointError, match=r"No space left.*What was there before is untouched"):
        write(tmp_path / "export")
    assert contents(tmp_path / "export") == before
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_a_bug_is_not_called_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", broken)
    with pytest.raises(ZeroDivisionError):
        write(tmp_path / "export")
    assert list(tmp_path.iterdir()) == []
