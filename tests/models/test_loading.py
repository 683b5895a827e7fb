import json
import shutil

import pytest
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors.torch import save_file
from transformers import AutoConfig, BertConfig, T5Config

from unified_lm.config.schema import ModelConfig
from unified_lm.core.errors import ModelError
from unified_lm.models.load_errors import explain
from unified_lm.models.loading import load_model, load_tokenizer
from unified_lm.models.origin import MANIFEST
from unified_lm.models.precision import four_bit_config
from unified_lm.models.tiny import TINY_FAMILIES, tiny_model, tiny_tokenizer


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "model"
    tiny_model("llama", seed=1).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def config_for(name, **changes) -> ModelConfig:
    return ModelConfig(name=str(name), **{"dtype": "float32", **changes})


def edit_config(folder, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


class Malicious:
    def __reduce__(self):
        return (print, ("this must never run",))


# --- what works


def test_directory_is_loaded_exactly(checkpoint) -> None:
    loaded = load_model(config_for(checkpoint, family="llama"))
    expected = tiny_model("llama", seed=1)
    for mine, theirs in zip(loaded.causal_lm.parameters(), expected.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert not loaded.causal_lm.training
    assert loaded.provenance["source"] == "directory"
    assert loaded.provenance["family"] == "llama"
    assert json.loads(json.dumps(loaded.provenance)) == loaded.provenance


def test_dtype(checkpoint) -> None:
    assert load_model(config_for(checkpoint, dtype="bfloat16")).causal_lm.dtype == torch.bfloat16
    with pytest.raises(ModelError, match=r"unknown model\.dtype 'bfloat61'\. Did you mean 'bfloat16'"):
        load_model(config_for(checkpoint, dtype="bfloat61"))


def test_tied_heads_and_pickled_tensors_are_fine(tmp_path) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    loaded = load_model(config_for(tmp_path)).causal_lm
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight


@pytest.mark.parametrize("family", sorted(TINY_FAMILIES))
def test_tiny_random_of_every_family(family) -> None:
    loaded = load_model(ModelConfig(tiny_random=True, family=family, name="org/huge", dtype="bfloat16"))
    assert loaded.causal_lm.config.model_type == family
    assert loaded.causal_lm.dtype == torch.bfloat16
    assert loaded.tokenizer.pad_token_id == 0


def test_padded_kernel_loads_eager_attention() -> None:
    loaded = load_model(ModelConfig(tiny_random=True, family="falcon", dtype="float32", attention_kernel="padded"))
    assert loaded.causal_lm.config._attn_implementation == "eager"


def test_fingerprint_tells_weights_apart(checkpoint) -> None:
    first, again = load_model(config_for(checkpoint)), load_model(config_for(checkpoint))
    other = load_model(ModelConfig(tiny_random=True, family="llama", dtype="float32"))
    assert first.provenance["fingerprint"] == again.provenance["fingerprint"] != other.provenance["fingerprint"]


def test_missing_pad_token_is_replaced_without_adding_tokens(checkpoint) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(checkpoint)
    loaded = load_model(config_for(checkpoint))
    assert loaded.tokenizer.pad_token == "</s>"
    assert len(loaded.tokenizer) == len(tokenizer)
    assert any("no pad token" in notice for notice in loaded.provenance["notices"])
    tokenizer.eos_token = None
    tokenizer.save_pretrained(checkpoint)
    with pytest.raises(ModelError, match="neither a pad nor an end nor an unknown token"):
        load_model(config_for(checkpoint))


def test_a_pad_token_that_is_also_the_end_token_still_learns(checkpoint) -> None:
    edit_config(checkpoint, pad_token_id=2)
    model = load_model(config_for(checkpoint)).causal_lm
    model(torch.tensor([[5, 2, 7]])).logits.logsumexp(-1).sum().backward()
    assert model.get_input_embeddings().weight.grad[2].abs().sum() > 0


@pytest.mark.parametrize(
    ("family", "key"), [("llama", "attention_dropout"), ("gpt2", "attn_pdrop"), ("falcon", "attention_dropout")]
)
def test_attention_dropout_takes_effect(family, key) -> None:
    loaded = load_model(ModelConfig(tiny_random=True, family=family, dtype="float32", attention_dropout=0.4))
    assert getattr(loaded.causal_lm.config, key) == 0.4
    assert any("0.4" in notice for notice in loaded.provenance["notices"])
    own = getattr(load_model(ModelConfig(tiny_random=True, family=family, dtype="float32")).causal_lm.config, key)
    assert loaded.provenance["own_config"] == {key: own}, "an export must have the checkpoint's own value"


def test_attention_dropout_from_a_directory_changes_training_alone(checkpoint) -> None:
    model = load_model(config_for(checkpoint, attention_dropout=0.5)).causal_lm
    tokens = torch.tensor([[1, 70, 80, 90]])
    assert torch.equal(model(tokens).logits, model(tokens).logits)
    model.train()
    assert not torch.equal(model(tokens).logits, model(tokens).logits)


def test_init_from_takes_a_run_or_its_export_with_the_manifest(checkpoint, tmp_path) -> None:
    run = tmp_path / "run"
    shutil.copytree(checkpoint, run / "export")
    (run / "export" / MANIFEST).write_text('{"stages": [{"recipe": "llm2vec_mntp"}]}')
    for start in (run, run / "export"):
        loaded = load_model(
            ModelConfig(name="org/ignored", init_from=str(start), dtype="float32", tiny_random=True, family="llama")
        )
        assert torch.equal(loaded.causal_lm.lm_head.weight, tiny_model("llama", seed=1).lm_head.weight)
        assert loaded.provenance["manifest"]["stages"][0]["recipe"] == "llm2vec_mntp"
    (run / "export" / MANIFEST).unlink()
    assert load_model(ModelConfig(init_from=str(run), dtype="float32")).provenance["manifest"] is None


# --- what is refused


def test_a_run_from_random_weights_is_gone_on_from_with_its_own_tokenizer(tmp_path) -> None:
    """The tokenizer of model.source=scratch is what random weights are made for, cut to the vocabulary; a run has its own."""
    start = tmp_path / "run" / "export"
    tiny_model("llama").save_pretrained(start)
    tiny_tokenizer().save_pretrained(start)
    (start / MANIFEST).write_text(json.dumps({"family": "llama"}))
    other = tmp_path / "other"
    larger = tiny_tokenizer()
    larger.add_tokens([f"word{i}" for i in range(500)])
    larger.save_pretrained(other)
    config = ModelConfig(source="scratch", family="llama", tokenizer=str(other), init_from=str(tmp_path / "run"))
    assert len(load_tokenizer(config)) == len(tiny_tokenizer())
    assert len(load_model(config).tokenizer) == len(tiny_tokenizer())


def test_init_from_that_is_no_export(tmp_path) -> None:
    with pytest.raises(ModelError, match="no such directory"):
        load_model(ModelConfig(init_from=str(tmp_path / "gone")))
    with pytest.raises(ModelError, match="neither an export nor a run"):
        load_model(ModelConfig(init_from=str(tmp_path)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": ""}, "model.name is empty"),
        ({"name": "./nowhere"}, "no such directory"),
        ({"name": "a/b/c"}, "no such directory"),
        ({"source": "hup", "name": "a/b"}, "unknown model.source 'hup'. Did you mean 'hub'"),
        ({"name": "some-org/not-cached"}, "HF_HUB_OFFLINE is set"),
        ({"tiny_random": True}, "set model.family"),
        ({"tiny_random": True, "family": "lama"}, "Did you mean 'llama'"),
        ({"tiny_random": True, "family": "llama", "tokenizer": "./gone"}, "tokenizer"),
    ],
)
def test_names_that_lead_nowhere(monkeypatch, changes, message) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=message):
        load_model(ModelConfig(**changes))


def test_other_family(checkpoint) -> None:
    with pytest.raises(ModelError, match=r"of family 'llama', but the recipe expects model\.family=mistral"):
        load_model(config_for(checkpoint, family="mistral"))


@pytest.mark.parametrize(
    ("hf_config", "message"),
    [
        (T5Config(), "encoder-decoder model"),
        (BertConfig(), "is an encoder"),
        (AutoConfig.for_model("modernbert"), "is an encoder"),
        (AutoConfig.for_model("gemma3"), "multimodal"),
        (AutoConfig.for_model("vit"), "no causal language model"),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_architectures_that_are_no_decoders(tmp_path, hf_config, message) -> None:
    hf_config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=message):
        load_model(config_for(tmp_path))


def test_weights_that_do_not_fill_the_model(checkpoint, tmp_path) -> None:
    edit_config(checkpoint, num_hidden_layers=3)
    with pytest.raises(ModelError, match="9 weights are missing from the checkpoint"):
        load_model(config_for(checkpoint))
    edit_config(checkpoint, num_hidden_layers=1)
    with pytest.raises(ModelError, match="9 weights are in the checkpoint but not in the model"):
        load_model(config_for(checkpoint))
    edit_config(checkpoint, num_hidden_layers=2, intermediate_size=96)
    with pytest.raises(ModelError, match="cannot load the weights"):
        load_model(config_for(checkpoint))
    tiny_model("llama").model.save_pretrained(tmp_path / "bare")
    with pytest.raises(ModelError, match="no language-model head"):
        load_model(config_for(tmp_path / "bare"))


@pytest.mark.parametrize(
    ("buffer", "loads"),
    [
        ("transformer.h.1.attn.bias", True),
        ("transformer.h.1.attn.masked_bias", True),
        ("transformer.h.2.attn.masked_bias", False),  # of a layer that the model lacks
        ("transformer.h.1.attn.q_proj.bias", False),  # learned
        ("transformer.h.1.attn.gate", False),
    ],
)
def test_buffers_of_older_checkpoints_are_no_weights(tmp_path, buffer, loads) -> None:
    model = tiny_model("gptj")
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(state | {buffer: torch.ones(1, 1, 8, 8)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = config_for(tmp_path, attention_kernel="padded")
    if loads:
        loaded = load_model(config).causal_lm
        assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in state.items())
    else:
        with pytest.raises(ModelError, match="1 weights are in the checkpoint but not in the model"):
            load_model(config)


def test_files_that_are_torn_or_unsafe(checkpoint) -> None:
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="torn"):
        load_model(config_for(checkpoint))
    weights.unlink()
    with pytest.raises(ModelError, match=r"holds no model\.safetensors"):
        load_model(config_for(checkpoint))
    torch.save({"x": Malicious()}, checkpoint / "pytorch_model.bin")
    with pytest.raises(ModelError, match="Convert them to safetensors"):
        load_model(config_for(checkpoint))
    edit_config(checkpoint, model_type="zzz")
    with pytest.raises(ModelError, match=r"cannot load the configuration.*zzz"):
        load_model(config_for(checkpoint))
    edit_config(checkpoint, auto_map={"AutoConfig": "x.Y", "AutoModelForCausalLM": "x.Z"})
    with pytest.raises(ModelError, match="trust_remote_code=true"):
        load_model(config_for(checkpoint))
    (checkpoint / "config.json").unlink()
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        load_model(config_for(checkpoint))


def test_tokenizer_of_another_model(checkpoint, tmp_path) -> None:
    wide = tiny_tokenizer()
    wide.add_tokens([f"extra{i}" for i in range(3)])
    wide.save_pretrained(tmp_path / "wide")
    with pytest.raises(ModelError, match=r"281 tokens.*only 278 rows"):
        load_model(config_for(checkpoint, tokenizer=str(tmp_path / "wide")))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (GatedRepoError, "is gated"),
        (RepositoryNotFoundError, "the Hub has no model"),
        (RevisionNotFoundError, "no such revision"),
    ],
)
def test_answers_of_the_hub(kind, message) -> None:
    class Response:
        headers: dict = {}  # noqa: RUF012
        request = None
        status_code = 404

    cause = kind("from the server", response=Response())
    with pytest.raises(ModelError, match=message), explain("org/model", "configuration", is_hub=True):
        raise OSError("cannot load") from cause


def test_what_a_command_should_have_made_names_the_command() -> None:
    with pytest.raises(ModelError, match=r"no directory 'runs/smollm2-8x'.*unified-lm upcycle"):
        load_model(ModelConfig(source="hub", name="runs/smollm2-8x", family="mixtral"))


SCRATCH = {"source": "scratch", "family": "llama", "tokenizer": "smollm2-135m", "dtype": "float32"}
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 600}


def test_a_model_is_built_of_its_description_and_its_seed() -> None:
    one, again, other = (load_model(ModelConfig(**SCRATCH, architecture=SMALL, init_seed=seed)) for seed in (1, 1, 2))
    weights = [loaded.causal_lm.model.layers[0].mlp.up_proj.weight for loaded in (one, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert one.provenance["fingerprint"] != other.provenance["fingerprint"]
    assert one.provenance["location"] is None
    assert len(one.tokenizer) == 600
    text = "Zwölf Boxkämpfer: café 🙂 12\n\tif x:"
    ids = one.tokenizer(text)["input_ids"]
    assert max(ids) < 600
    assert one.tokenizer.decode(ids) == text
    assert load_tokenizer(ModelConfig(**SCRATCH, architecture=SMALL))(text)["input_ids"] == ids


def test_buffers_of_a_model_from_scratch_are_exact_in_bfloat16() -> None:
    loaded = load_model(ModelConfig(**SCRATCH | {"dtype": "bfloat16"}, architecture=SMALL))
    assert {parameter.dtype for parameter in loaded.causal_lm.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in loaded.causal_lm.buffers()} == {torch.float32}, "rotary frequencies"
    assert loaded.causal_lm.config.dtype == torch.bfloat16


def test_settings_without_a_weight_tell_models_apart() -> None:
    one, other = (load_model(ModelConfig(**SCRATCH, architecture=SMALL | {"rope_theta": t})) for t in (1e4, 1e5))
    assert one.provenance["fingerprint"] != other.provenance["fingerprint"], "a checkpoint of one is none of the other"


def test_what_cannot_be_built_is_refused() -> None:
    with pytest.raises(ModelError, match=r"vocab_size is 100.*its bytes and special tokens alone need 252\. Raise vocab_size"):
        load_model(ModelConfig(**SCRATCH, architecture=SMALL | {"vocab_size": 100}))
    with pytest.raises(ModelError, match="these values describe no llama model"):
        load_model(ModelConfig(**SCRATCH, architecture=SMALL | {"num_attention_heads": 0}))


def test_four_bit_needs_cuda_and_bitsandbytes(monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError, match=r"bitsandbytes is not installed .*there is no CUDA device.*quantize_4bit=false"):
        four_bit_config(torch.bfloat16)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config = four_bit_config(torch.bfloat16)
    assert (config.load_in_4bit, config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == (True, "nf4", True)
    assert config.bnb_4bit_compute_dtype == torch.bfloat16
