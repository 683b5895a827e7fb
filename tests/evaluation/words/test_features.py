"""Word vectors: equal to transformers' own states at the right positions, whatever the pack, dropout off, read once."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.data.prompts.tokenizers_for_tests import TOKENIZERS
from tests.evaluation.words.word_files import random_data
from unified_lm.core.errors import ConfigError, DataError
from unified_lm.data.prompts.encoding import PromptEncoder
from unified_lm.data.prompts.templates import get_template
from unified_lm.evaluation.words import features as word_level_features
from unified_lm.evaluation.words.data import Sentence
from unified_lm.evaluation.words.features import Alignment, FeatureSettings, Subtoken, align, windows, word_features
from unified_lm.inference import UnifiedLM
from unified_lm.models.tiny import tiny_model, tiny_tokenizer

SENTENCES = [
    Sentence(("the", "sum", "of", "and", "thing"), {}),
    Sentence(("x", "=", "fetching(", "ünder", "—", "z"), {}, frozenset({3})),
]
BOTH = (Alignment.SAME_TOKEN, Alignment.NEXT_TOKEN)


def make_model(add_bos: bool = True, **config: float) -> UnifiedLM:
    return UnifiedLM(tiny_model("llama", **config), tiny_tokenizer(add_bos), template="plain")


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokens_of_words_spell_them(name: str) -> None:
    encoder = PromptEncoder(get_template("plain"), TOKENIZERS[name]())
    ascii_only = [SENTENCES[0], Sentence(("hello", "world", "that", "answers."), {})]
    for sentence, (window,) in zip(ascii_only, windows(encoder, ascii_only), strict=True):
        spelled = [encoder.tokenizer.decode(window.ids[list(word)]).strip() for word in window.words]
        # the sentencepiece-like ones of these tests have tokens across words, which then stand for both
        assert all(word in text for word, text in zip(sentence.words, spelled, strict=True))
        assert spelled == list(sentence.words) or "metaspace" in name
        assert min(window.words[0]) >= 1


def test_same_and_next_token_are_transformers_own_states() -> None:
    causal_lm = tiny_model("llama")
    tokenizer = tiny_tokenizer()
    model = UnifiedLM(causal_lm, tokenizer, template="plain")
    features = word_features(model, SENTENCES, BOTH, FeatureSettings("causal"))
    row = 0
    for sentence in SENTENCES:
        (window,) = windows(model.prompt_encoder, [sentence])[0]
        assert window.ids.tolist() == tokenizer(sentence.text()[0])["input_ids"]
        with model.borrow_backbone() as backbone, backbone.stock_attention() as stock, torch.no_grad():
            states = stock.model(torch.from_numpy(window.ids)[None]).last_hidden_state[0].numpy()
        for word in window.words:
            own, before = states[list(word)].mean(axis=0), states[[token - 1 for token in word]].mean(axis=0)
            np.testing.assert_allclose(features[Alignment.SAME_TOKEN][row], own, atol=1e-5)
            np.testing.assert_allclose(features[Alignment.NEXT_TOKEN][row], before, atol=1e-5)
            assert np.abs(own - before).max() > 1e-2
            row += 1
    assert row == len(features[Alignment.SAME_TOKEN])


def test_attention_decides_who_sees_what_follows() -> None:
    model = make_model()
    changed = Sentence((*SENTENCES[0].words[:-1], "other"), {})
    for attention, moves in (("causal", False), ("bidirectional", True)):
        settings = FeatureSettings(attention)
        one, other = (word_features(model, [side], BOTH, settings)[Alignment.SAME_TOKEN] for side in (SENTENCES[0], changed))
        difference = np.abs(one[:-1] - other[:-1]).max()
        assert (difference > 1e-3) if moves else (difference < 1e-6)


def test_subtokens() -> None:
    states = torch.arange(12.0).reshape(6, 2)
    words = ((1,), (2, 3), (5,))
    expected = {Subtoken.FIRST: [1, 2, 5], Subtoken.LAST: [1, 3, 5], Subtoken.MEAN: [1, 2.5, 5]}
    for subtoken, rows in expected.items():
        for alignment, shift in zip(BOTH, (0, 1), strict=True):
            assert align(states, words, alignment, subtoken)[:, 0].tolist() == [2 * (row - shift) for row in rows]


def test_packs_do_not_matter_and_dropout_is_off() -> None:
    model = make_model(attention_dropout=0.5)
    with model.borrow_backbone() as backbone:
        backbone.train()  # as a model straight out of training
    settings = FeatureSettings("bidirectional")
    together = word_features(model, SENTENCES, BOTH, settings)
    again = word_features(model, SENTENCES, BOTH, settings)
    alone = [word_features(model, [sentence], BOTH, settings) for sentence in SENTENCES]
    for alignment in BOTH:
        np.testing.assert_array_equal(together[alignment], again[alignment])
        np.testing.assert_allclose(together[alignment], np.concatenate([part[alignment] for part in alone]), atol=1e-5)
    with model.borrow_backbone() as backbone:
        assert backbone.training


def test_without_a_begin_of_text_the_first_word_still_has_a_position_before_it() -> None:
    window = windows(make_model(add_bos=False).prompt_encoder, SENTENCES[:1])[0][0]
    assert window.ids[0] == tiny_tokenizer().bos_token_id
    assert window.words[0][0] == 1


def test_long_sentences_are_cut_between_words_and_no_word_is_lost() -> None:
    encoder = make_model().prompt_encoder
    whole = windows(encoder, SENTENCES)
    for (full,), parts in zip(whole, windows(encoder, SENTENCES, max_tokens=9), strict=True):
        assert len(parts) > 1
        assert all(len(part.ids) <= 9 and part.ids[0] == full.ids[0] for part in parts)
        spelled = [part.ids[list(word)].tolist() for part in parts for word in part.words]
        assert spelled == [full.ids[list(word)].tolist() for word in full.words]
    with pytest.raises(DataError, match="the word 'fetching"):
        windows(encoder, SENTENCES, max_tokens=4)


def test_vectors_are_computed_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("UNIFIED_LM_CACHE", str(tmp_path))
    model, sentences = make_model(), list(random_data().train)
    calls = []
    compute = word_level_features._compute
    monkeypatch.setattr(word_level_features, "_compute", lambda *args: calls.append(args[2]) or compute(*args))
    settings = FeatureSettings("causal")
    first = word_features(model, sentences, BOTH[:1], settings, cache_key="a")
    again = word_features(model, sentences, BOTH, settings, cache_key="a")
    assert calls == [[BOTH[0]], [BOTH[1]]]
    np.testing.assert_array_equal(first[BOTH[0]], again[BOTH[0]])
    plain = word_features(model, sentences, BOTH, settings)
    np.testing.assert_array_equal(plain[BOTH[1]], again[BOTH[1]])
    del calls[:]
    for changed in (
        lambda: word_features(model, sentences, BOTH[:1], settings, cache_key="b"),
        lambda: word_features(model, sentences[1:], BOTH[:1], settings, cache_key="a"),
        lambda: word_features(model, sentences, BOTH[:1], FeatureSettings("bidirectional"), cache_key="a"),
        lambda: word_features(model, sentences, BOTH[:1], FeatureSettings("causal", Subtoken.LAST), cache_key="a"),
    ):
        changed()
    assert len(calls) == 4


def test_names() -> None:
    with pytest.raises(ConfigError, match="unknown alignment 'next'"):
        Alignment.parse("next")
