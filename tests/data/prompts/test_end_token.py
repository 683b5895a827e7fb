"""The end of an embedded text: a token for last-token pooling where the tokenizer adds none; prompts that merge with texts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.data.prompts.test_templates import TEXTS, stock_prompt_length
from tests.data.prompts.tokenizers_for_tests import TOKENIZERS, chat_byte_level
from unified_lm.core.errors import ConfigError
from unified_lm.data.prompts.encoding import Encoded, PromptEncoder, Rejection
from unified_lm.data.prompts.templates import TEMPLATES, Template, get_template, special_tokens
from unified_lm.models.tiny import tiny_tokenizer


@pytest.mark.parametrize("name", ["plain+eos", "grit+eos", "e5_instruct"])
@pytest.mark.parametrize("kind", sorted(TOKENIZERS))
def test_every_text_ends_with_one_pooled_end_token_also_when_cut(kind: str, name: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    template = get_template(name)
    encoder = PromptEncoder(template, tokenizer)
    prompt = template.embedding_prompt(tokenizer, "Find it")
    room = len(tokenizer(prompt)["input_ids"]) + 4
    for limit in (512, room):
        for text, encoded in zip(TEXTS, encoder.embed([(t, "Find it") for t in TEXTS], limit), strict=True):
            assert isinstance(encoded, Encoded)
            stock = list(tokenizer(prompt + text)["input_ids"])
            bare = stock[:-1] if stock[-1] == tokenizer.eos_token_id else stock
            assert encoded.ids.tolist() == [*bare[: limit - 1], tokenizer.eos_token_id], text
            start = 0 if template.pools_prompt else stock_prompt_length(tokenizer, prompt)
            assert encoded.spans == ((start, len(encoded.ids)),)
            assert encoded.truncated == (len(bare) >= limit)


@pytest.mark.parametrize("name", sorted(TEMPLATES))
@pytest.mark.parametrize("kind", sorted(TOKENIZERS))
def test_any_template_can_end_texts_with_a_pooled_token_or_says_why_not(kind: str, name: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    if TEMPLATES[name].suffix:
        with pytest.raises(ConfigError, match="whose last token is what is pooled"):
            get_template(f"{name}+eos")
        return
    if name == "chatml" and "<|im_end|>" not in special_tokens(tokenizer):
        pytest.skip("the tokenizer has no such token, so the template is refused with any end")
    for limit in (512, 64):
        encoder = PromptEncoder(get_template(f"{name}+eos"), tokenizer)
        assert encoder.ends_texts
        for encoded in encoder.embed([(text, "") for text in TEXTS], limit):
            if encoded is not Rejection.STRADDLES:
                assert isinstance(encoded, Encoded)
                assert encoded.ids[-1] == tokenizer.eos_token_id
                assert encoded.spans[0][1] == len(encoded.ids)


@pytest.mark.parametrize("kind", sorted(TOKENIZERS))
def test_what_stands_after_every_text_is_its_end(kind: str) -> None:
    """A suffix is; the second copy of an echoed text is not, whatever its tokenizer adds after it."""
    ends = {
        name: PromptEncoder(get_template(name), TOKENIZERS[kind]()).ends_texts for name in ("prompt_eol", "echo", "echo+eos")
    }
    assert ends == {"prompt_eol": True, "echo": False, "echo+eos": True}


def test_the_end_is_a_special_token_of_the_tokenizer() -> None:
    with pytest.raises(ConfigError, match=r"'<\|endoftext\|>', which is not a special token .*NAME\+eos"):
        PromptEncoder(get_template("qwen3_embedding"), tiny_tokenizer())
    tokenizer = chat_byte_level()
    (encoded,) = PromptEncoder(get_template("qwen3_embedding"), tokenizer).embed([("hello", "Find")], 64)
    assert encoded.ids.tolist() == [*tokenizer("Instruct: Find\nQuery:hello")["input_ids"], 0]


def test_running_text_and_conversations_have_no_such_end() -> None:
    tokenizer = tiny_tokenizer()
    with_end, without = (PromptEncoder(get_template(name), tokenizer) for name in ("grit+eos", "grit"))
    turns = [("user", "a"), ("assistant", "b")]
    assert with_end.chat([turns], 64)[0].ids.tolist() == without.chat([turns], 64)[0].ids.tolist()
    assert with_end.running_text(["a"])[0].tolist() == without.running_text(["a"])[0].tolist()


@pytest.mark.parametrize("kind", sorted(TOKENIZERS))
def test_a_joined_prompt_is_pooled_from_where_stock_tools_pool_it(kind: str) -> None:
    """ "Query: " ends in a space, which a first word takes; the span begins after as many tokens as the prompt has alone."""
    tokenizer = TOKENIZERS[kind]()
    template = replace(get_template("e5_instruct"), pools_prompt=False, embedding_end="")
    prompt = template.embedding_prompt(tokenizer, "Find it")
    start = stock_prompt_length(tokenizer, prompt)
    for text, encoded in zip(
        TEXTS, PromptEncoder(template, tokenizer).embed([(t, "Find it") for t in TEXTS], 512), strict=True
    ):
        stock = tokenizer(prompt + text)["input_ids"]
        if len(stock) == start:
            assert encoded is Rejection.STRADDLES  # one token with the space: stock tools would pool nothing at all
            continue
        assert isinstance(encoded, Encoded)
        assert encoded.ids.tolist() == stock
        assert encoded.spans == ((start, len(stock)),)


def test_without_joining_a_text_that_merges_with_its_prompt_is_refused() -> None:
    """The case of every tokenizer with words that begin with a space; the rule of `joined` is what lifts it."""
    template = Template(name="space", instruction_prompt="Query for {instruction}: ", embedding_end="{eos}")
    with pytest.raises(ConfigError, match="straddles"):
        PromptEncoder(template, chat_byte_level())
    PromptEncoder(replace(template, joined=True), chat_byte_level())
