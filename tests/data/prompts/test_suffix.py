"""Prompts that go on after the text: read as one string, cut before the suffix, pooled from the text to the end."""

from __future__ import annotations

import numpy as np
import pytest

from tests.data.prompts.tokenizers_for_tests import chat_byte_level
from unified_lm.core.errors import ConfigError, DataError
from unified_lm.data.prompts.encoding import Encoded, PromptEncoder, Rejection
from unified_lm.data.prompts.templates import TEMPLATES, get_template
from unified_lm.inference.unified import UnifiedLM
from unified_lm.models.tiny import tiny_model, tiny_tokenizer

QUOTED = sorted(name for name, template in TEMPLATES.items() if template.quoted)
TEXTS = ["plain words", "ends.", "Really?", "wow!", 'He said "no"', "it's his'", "snake_case_name", "  around  ", "_x_"]
TEXTS.append("Zwölf – 十二")
TOKENIZERS = {"bos": tiny_tokenizer(), "no bos": tiny_tokenizer(add_bos=False), "bytes": chat_byte_level()}


def published(template: str, text: str) -> str:
    """What a text becomes in MOEE's experiments, by their description (case E5)."""
    text = text.strip()
    text = text if text.endswith((".", "?", "!", '"', "'")) else text + "."
    text = text.replace('"', "'").replace("_", " ")
    before, after = {"quoted": ("", ""), "prompt_eol": ("This sentence : ", ' means in one word:"')}[template]
    return f'{before}"{text}"{after}'


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
@pytest.mark.parametrize("name", QUOTED)
@pytest.mark.parametrize("instruction", ["", "Find it"])
def test_the_ids_are_those_of_the_whole_string(tokenizer, name: str, instruction: str) -> None:
    template = get_template(name)
    encoder = PromptEncoder(template, tokenizer)
    for text, encoded in zip(TEXTS, encoder.embed([(text, instruction) for text in TEXTS], 512), strict=True):
        assert isinstance(encoded, Encoded)
        whole = template.body(instruction) + template.cleaned(text.strip()) + template.suffix
        assert encoded.ids.tolist() == tokenizer(whole)["input_ids"]
        ((start, stop),) = encoded.spans
        assert stop == len(encoded.ids)
        pooled = tokenizer.decode(encoded.ids[start:], skip_special_tokens=True)
        # A token may hold the opening quotation mark and the first letter.
        assert pooled.strip().lstrip('"').strip() == (template.cleaned(text.strip()) + template.suffix).strip()


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", ["quoted", "prompt_eol"])
def test_a_text_stands_in_its_quotes_as_published(name: str, text: str) -> None:
    tokenizer = chat_byte_level()
    (encoded,) = PromptEncoder(get_template(name), tokenizer).embed([(text, "")], 512)
    assert tokenizer.decode(encoded.ids, skip_special_tokens=True) == published(name, text)


def test_all_ten_are_there() -> None:
    assert len(QUOTED) == 10
    assert len({(TEMPLATES[name].bare_prompt, TEMPLATES[name].suffix) for name in QUOTED}) == 10
    assert all(TEMPLATES[name].bare_prompt.endswith('"') and TEMPLATES[name].suffix.startswith('"') for name in QUOTED)


@pytest.mark.parametrize("limit", [25, 26, 40])
@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
def test_a_long_text_is_cut_before_the_suffix(tokenizer, limit: int) -> None:
    template = get_template("prompt_eol")
    encoder = PromptEncoder(template, tokenizer)
    text = "alpha beta gamma delta epsilon zeta eta theta iota kappa " * 8
    around = len(encoder.embed([("x", "")], 512)[0].ids)
    (encoded,) = encoder.embed([(text, "")], around + limit)
    assert encoded.truncated
    assert around + limit - 6 <= len(encoded.ids) <= around + limit, "cut no more than a word beyond what is needed"
    whole = tokenizer.decode(encoded.ids, skip_special_tokens=True)
    assert whole.endswith('" means in one word:"')
    assert text.startswith(whole.removeprefix(template.bare_prompt).removesuffix(template.suffix))


def test_an_empty_text_and_a_limit_without_room() -> None:
    encoder = PromptEncoder(get_template("prompt_eol"), tiny_tokenizer())
    assert encoder.embed([("  ", "")], 512) == [Rejection.EMPTY]
    with pytest.raises(DataError, match=r"the prompt 'This sentence : .* leaves no room for text under the limit of 4 tokens"):
        encoder.embed([("text", "")], 5)


def test_stock_tools_cannot_put_anything_after_a_text() -> None:
    with pytest.raises(ConfigError, match=r"'prompt_eol' goes on after every text"):
        get_template("prompt_eol").embedding_prompt(tiny_tokenizer())


def test_the_last_token_has_read_the_suffix() -> None:
    causal_lm, tokenizer = tiny_model("olmoe"), tiny_tokenizer()
    vectors = {
        name: UnifiedLM(causal_lm, tokenizer, template=name, attention="causal", pooling="last_token").encode(["a text"])
        for name in ("plain", "quoted", "prompt_eol")
    }
    assert len({value.tobytes() for value in vectors.values()}) == 3
    assert all(np.isfinite(value).all() for value in vectors.values())
