import pytest
import torch
from transformers import AutoTokenizer

from unified_lm.core.errors import ModelError
from unified_lm.models.tiny import TINY_FAMILIES, tiny_config, tiny_model, tiny_tokenizer

TEXTS = ["the other thing", "  a\n\n\ttab ", "naïve — 日本語 🙂", "\x00\x7f<|user|>\n", ""]


@pytest.mark.parametrize("text", TEXTS)
def test_tokenizer_round_trips_any_text(text: str) -> None:
    tokenizer = tiny_tokenizer()
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_tokenizer_survives_saving(tmp_path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert again.decode(again(text, add_special_tokens=False)["input_ids"]) == text
    assert (again.pad_token_id, again.bos_token_id, again.eos_token_id) == (0, 1, 2)


def test_tokenizer_bos_is_optional_and_merges_cross_no_newline() -> None:
    assert tiny_tokenizer()("x")["input_ids"][0] == 1
    assert 1 not in tiny_tokenizer(add_bos=False)("x")["input_ids"]
    assert tiny_tokenizer().tokenize("of the") == ["o", "f", "Ġthe"]  # not bytes alone: boundaries depend on context
    assert len(tiny_tokenizer().tokenize("_")) == 1  # LLM2Vec's mask token


@pytest.mark.parametrize("family", sorted(TINY_FAMILIES))
def test_every_family_predicts_something_and_looks_back(family: str) -> None:
    model = tiny_model(family)
    tokens = torch.tensor([[1, 70, 80, 90, 100, 110, 120, 130]])
    changed = tokens.clone()
    changed[0, 1] = 71
    with torch.no_grad():
        logits, other = model(tokens).logits, model(changed).logits
    assert logits.std() > 0.5, "logits are nearly uniform"
    assert torch.allclose(logits[0, 0], other[0, 0], atol=1e-5)  # experts multiply other numbers of rows
    assert (logits[0, -1] - other[0, -1]).abs().max() > 1e-3, "the last token does not notice the second"
    assert model.get_input_embeddings().weight.shape[0] == len(tiny_tokenizer())


def test_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = tiny_model("llama", seed=3)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    second, third = tiny_model("llama", seed=3), tiny_model("llama", seed=4)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.lm_head.weight, third.lm_head.weight)


def test_dtype_and_overrides() -> None:
    model = tiny_model("mistral", dtype=torch.bfloat16, sliding_window=4)
    assert model.dtype == torch.bfloat16
    assert model.config.sliding_window == 4


def test_unknown_family_suggests_a_known_one() -> None:
    with pytest.raises(ModelError, match=r"no tiny model of family 'mistal'\. Did you mean 'mistral'"):
        tiny_config("mistal")
