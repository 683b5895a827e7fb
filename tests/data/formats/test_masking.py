"""Corruption: rates, positions, schemes, and a mask token that stays ordinary."""

import numpy as np
import pytest

from tests.data.prompts.tokenizers_for_tests import chat_byte_level, metaspace
from unified_lm.batch import IGNORE
from unified_lm.core.errors import ConfigError
from unified_lm.data.formats import MaskingConfig
from unified_lm.data.formats.masking import Corruptor, mask_token_id
from unified_lm.models.tiny import tiny_tokenizer


def corruptor(**settings: object) -> Corruptor:
    tokenizer = tiny_tokenizer()
    return Corruptor(MaskingConfig(**settings), tokenizer, tokenizer.all_special_ids)  # type: ignore[arg-type]


def many(corrupt: Corruptor, ids: np.ndarray, times: int = 200) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    parts = [corrupt.corrupt(ids, rng) for _ in range(times)]
    return np.stack([read for read, _ in parts]), np.stack([labels for _, labels in parts])


def test_rates_of_the_bert_scheme():
    corrupt = corruptor(probability=0.2)
    ids = np.random.default_rng(1).choice(corrupt.ordinary_ids[corrupt.ordinary_ids != corrupt.mask_id], size=500)
    read, labels = many(corrupt, ids)
    chosen = labels != IGNORE
    assert chosen[:, 1:].mean() == pytest.approx(0.2, abs=0.005)
    masked = (read == corrupt.mask_id)[chosen].mean()
    kept = (read == labels)[chosen].mean()
    random = ((read != corrupt.mask_id) & (read != labels))[chosen].mean()
    assert masked == pytest.approx(0.8, abs=0.01)
    assert kept == pytest.approx(0.1, abs=0.01)
    assert random == pytest.approx(0.1, abs=0.01)
    assert (read[~chosen] == np.broadcast_to(ids, read.shape)[~chosen]).all(), "what is not chosen is not changed"
    assert (labels[chosen] == np.broadcast_to(ids, read.shape)[chosen]).all()


def test_all_mask_replaces_every_chosen_token():
    corrupt = corruptor(probability=0.8, scheme="all_mask")
    read, labels = many(corrupt, np.arange(10, 200))
    chosen = labels != IGNORE
    assert chosen[:, 1:].mean() == pytest.approx(0.8, abs=0.01)
    assert (read[chosen] == corrupt.mask_id).all()


def test_position_0_and_special_tokens_are_never_chosen_and_never_drawn():
    corrupt = corruptor(probability=1.0)
    specials = corrupt.special_ids
    ids = np.concatenate([[50], specials, np.arange(60, 90), specials])
    read, labels = many(corrupt, ids)
    assert (labels[:, 0] == IGNORE).all()
    assert (labels[:, np.isin(ids, specials)] == IGNORE).all()
    assert (labels[:, corrupt.maskable(ids)] != IGNORE).all()
    assert not np.isin(read[:, corrupt.maskable(ids)], specials).any()


def test_every_sample_predicts_something():
    corrupt = corruptor(probability=0.001)
    _, labels = many(corrupt, np.array([5, 77, 78]))
    assert ((labels != IGNORE).sum(axis=1) == 1).all()
    assert {int(i) for i in np.flatnonzero((labels != IGNORE).any(axis=0))} == {1, 2}


def test_the_same_generator_state_gives_the_same_corruption():
    corrupt, ids = corruptor(), np.arange(10, 100)
    first, again, other = (corrupt.corrupt(ids, np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert (first[1] != other[1]).any()


@pytest.mark.parametrize("make", [tiny_tokenizer, metaspace, chat_byte_level])
def test_the_mask_token_is_ordinary_and_the_tokenizer_stays_as_it_was(make):
    tokenizer = make()
    before = tokenizer.backend_tokenizer.to_str(), list(tokenizer.all_special_tokens)
    index = mask_token_id("e", tokenizer)
    assert index not in tokenizer.all_special_ids
    assert tokenizer.decode([index]).strip() == "e"
    assert (tokenizer.backend_tokenizer.to_str(), list(tokenizer.all_special_tokens)) == before
    assert tokenizer.mask_token is None


def test_a_mask_token_that_exists_only_after_a_space_is_found():
    tokenizer = chat_byte_level()
    name = next(token for token in tokenizer.get_vocab() if token.startswith("Ġ") and len(token) > 4)
    word = name[1:]
    if word in tokenizer.get_vocab():
        pytest.skip("the toy vocabulary has the word without a space, too")
    assert mask_token_id(word, tokenizer) == tokenizer.get_vocab()[name]


def test_impossible_mask_tokens_and_settings():
    with pytest.raises(ConfigError, match=r"'zebra' is not a single token of this tokenizer, which reads it as \['z', 'e'"):
        corruptor(mask_token="zebra")
    with pytest.raises(ConfigError, match="'<s>' is a special token"):
        corruptor(mask_token="<s>")
    with pytest.raises(ConfigError, match=r"masking\.probability is 0"):
        corruptor(probability=0.0)
    with pytest.raises(ConfigError, match=r"unknown masking\.scheme 'berd'\. Did you mean 'bert'"):
        corruptor(scheme="berd")
