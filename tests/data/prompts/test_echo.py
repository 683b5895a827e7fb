"""Echo embeddings: the second copy, all of it and nothing else, is pooled."""

from __future__ import annotations

import numpy as np
import pytest

from tests.data.prompts.tokenizers_for_tests import chat_byte_level
from unified_lm.core.errors import ConfigError, DataError
from unified_lm.data.prompts.encoding import Encoded, PromptEncoder, Rejection
from unified_lm.data.prompts.templates import get_template
from unified_lm.inference.unified import UnifiedLM
from unified_lm.models.tiny import tiny_model, tiny_tokenizer

TEXTS = ["What is it?", "the (second) text 12", "Zwölf - 十二", "_x", " and then, the other one "]


@pytest.fixture(params=[True, False], ids=["adds-bos", "no-bos"])
def encoder(request: pytest.FixtureRequest) -> PromptEncoder:
    return PromptEncoder(get_template("echo"), tiny_tokenizer(add_bos=request.param))


@pytest.mark.parametrize("instruction", ["", "Find the answer"])
@pytest.mark.parametrize("text", TEXTS)
def test_the_pooled_tokens_are_exactly_the_second_copy(encoder: PromptEncoder, text: str, instruction: str) -> None:
    (encoded,) = encoder.embed([(text, instruction)], 512)
    assert isinstance(encoded, Encoded)
    decode = encoder.tokenizer.decode
    ((start, stop),) = encoded.spans
    assert decode(encoded.ids[start:stop]).strip() == text.strip()
    assert stop == len(encoded.ids)
    before = decode(encoded.ids[:start], skip_special_tokens=True).rstrip()
    assert before.count(text.strip()) == 1
    assert before.endswith("Query again:" if instruction else "rewritten sentence:")
    assert instruction in before


@pytest.mark.parametrize("limit", [60, 61, 75, 90])
def test_both_copies_are_cut_at_the_same_place(encoder: PromptEncoder, limit: int) -> None:
    text = "alpha beta gamma delta epsilon zeta eta theta iota kappa " * 4
    (encoded,) = encoder.embed([(text, "")], limit)
    assert isinstance(encoded, Encoded)
    assert encoded.truncated
    assert limit - 3 <= len(encoded.ids) <= limit, "cut no more than needed"
    ((start, stop),) = encoded.spans
    second = encoder.tokenizer.decode(encoded.ids[start:stop]).strip()
    whole = encoder.tokenizer.decode(encoded.ids, skip_special_tokens=True)
    assert text.startswith(second)
    assert whole == f"Rewrite the sentence: {second}, rewritten sentence: {second}"


def test_a_text_is_cut_before_a_character_of_several_tokens() -> None:
    """The bytes of an emoji are tokens that end at one character: to leave out the last of them is to leave out all."""
    encoder = PromptEncoder(get_template("echo"), chat_byte_level())
    (whole,) = encoder.embed([("ab🙂", "")], 512)
    (cut,) = encoder.embed([("ab🙂", "")], len(whole.ids) - 1)
    (expected,) = encoder.embed([("ab", "")], 512)
    assert cut.truncated
    assert cut.ids.tolist() == expected.ids.tolist()


def test_no_room_is_an_error_and_an_empty_text_none(encoder: PromptEncoder) -> None:
    with pytest.raises(DataError, match="no room"):
        encoder.embed([("some text", "")], 20)
    assert encoder.embed([("  ", "")], 100) == [Rejection.EMPTY]


def test_stock_tools_cannot_have_it(encoder: PromptEncoder) -> None:
    with pytest.raises(ConfigError, match="echo"):
        encoder.template.embedding_prompt(encoder.tokenizer)


def test_the_first_copy_would_give_another_vector() -> None:
    """A causal model has read the whole text only in the second copy: change the text's end and look at its first word."""
    model = UnifiedLM(tiny_model("llama"), tiny_tokenizer(), template="echo", attention="causal")
    left, right = (_first_word_states(model, text) for text in ("one two three", "one two seven"))
    np.testing.assert_allclose(left[0], right[0], atol=1e-6)  # the first copy cannot know how the text ends
    assert np.abs(left[1] - right[1]).max() > 1e-3


def _first_word_states(model: UnifiedLM, text: str) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of the text's first three characters in both copies."""
    from unified_lm.batch.sample import Sample
    from unified_lm.models.embedding import embed_samples
    from unified_lm.models.pooling import Pooling

    (encoded,) = model.prompt_encoder.embed([(text, "")], 200)
    assert isinstance(encoded, Encoded)
    ids = encoded.ids.astype("int64")
    second = encoded.spans[0][0]
    width = len(ids) - second
    first = next(start for start in range(second) if ids[start : start + width].tolist() == ids[second:].tolist())
    assert first + width <= second
    samples = [
        Sample(input_ids=ids, stream="x", bidirectional=(0, 0), pool=(start, start + 3), text_id=0, truncated=False)
        for start in (first, second)
    ]
    with model.borrow_backbone() as backbone:
        vectors = embed_samples(
            backbone, samples, Pooling.parse("mean"), token_budget=512, device=model.device, normalize=False
        )
    return vectors[0].numpy(), vectors[1].numpy()


def test_encode_uses_the_second_copy() -> None:
    causal_lm, tokenizer = tiny_model("llama"), tiny_tokenizer()
    echo = UnifiedLM(causal_lm, tokenizer, template="echo", attention="causal").encode(["one two three"])
    plain = UnifiedLM(causal_lm, tokenizer, template="plain", attention="causal").encode(["one two three"])
    assert echo.shape == plain.shape
    assert np.abs(echo - plain).max() > 1e-3
