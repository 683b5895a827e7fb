"""`UnifiedLM`: shapes, order, errors, and two modes in turn."""

import dataclasses
import logging
import threading
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from unified_lm.cli.arguments import add_embedding_options, command_parser, embedding_options
from unified_lm.core.errors import CheckpointError, ConfigError, DataError, UserError
from unified_lm.evaluation.analyses.arms import Arm, ArmSettings
from unified_lm.inference import Hit, UnifiedLM
from unified_lm.models.tiny import tiny_model, tiny_tokenizer

TEXTS = ["a text", "another, longer text about something else", "b", "the third text of four", "a text"]


@pytest.fixture(scope="module")
def model(exported: Callable[..., Path]) -> UnifiedLM:
    return UnifiedLM.from_pretrained(exported(), device="cpu")


def test_shapes_and_order(model: UnifiedLM) -> None:
    vectors = model.encode(TEXTS)
    assert (vectors.shape, vectors.dtype) == ((5, 64), np.float32)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    one = model.encode(TEXTS[1])
    assert one.shape == (64,)
    np.testing.assert_allclose(one, vectors[1], atol=1e-6)
    np.testing.assert_allclose(vectors[0], vectors[4], atol=1e-6)
    assert np.abs(vectors[0] - vectors[2]).max() > 1e-2
    np.testing.assert_allclose(model.encode(TEXTS, token_budget=1), vectors, atol=1e-6)
    assert model.encode([]).shape == (0, 64)


def test_outputs(model: UnifiedLM) -> None:
    tensor = model.encode(TEXTS, output="torch")
    assert isinstance(tensor, torch.Tensor)
    np.testing.assert_allclose(tensor.numpy(), model.encode(TEXTS), atol=1e-6)
    raw = model.encode(TEXTS, normalize=False)
    assert np.abs(np.linalg.norm(raw, axis=1) - 1).max() > 1e-2
    with pytest.raises(ConfigError, match="Did you mean 'torch'"):
        model.encode(TEXTS, output="torhc")  # type: ignore[call-overload]


def test_the_prompt_is_read_but_not_pooled(model: UnifiedLM) -> None:
    """The mean over the text's own tokens, computed by hand from a bidirectional forward of the stock decoder."""
    tokenizer = model._tokenizer
    prompt = "<|user|>\nFind the passage.\n<|embed|>\n"
    ids = tokenizer(prompt + "some text", return_tensors="pt")["input_ids"]
    start = len(tokenizer(prompt)["input_ids"])
    with model._backbone.stock_attention() as causal_lm, torch.no_grad():
        states = causal_lm.model(input_ids=ids, is_causal=False, use_cache=False).last_hidden_state[0]
    got = model.encode("some text", instruction="Find the passage.", normalize=False)
    np.testing.assert_allclose(got, states[start:].mean(0).numpy(), atol=1e-5)
    assert np.abs(states.mean(0).numpy() - got).max() > 1e-2, "pooling the prompt as well would show"


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["a", " \n"], r"texts\[1\] cannot be embedded: text empty"),
        ("", r"texts\[0\]"),
        (["a", "b", 3], r"texts\[2\] is a int, expected a string"),
        (["a", None], r"texts\[1\] is a NoneType"),
    ],
)
def test_bad_texts_name_their_index(model: UnifiedLM, texts: Any, expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        model.encode(texts)


def test_truncation_is_counted(exported: Callable[..., Path], caplog: pytest.LogCaptureFixture) -> None:
    model = UnifiedLM.from_pretrained(exported(), device="cpu")
    with caplog.at_level(logging.WARNING):
        cut = model.encode(["word " * 200, "short"])
    assert model.num_truncated == 1
    assert "1 of 2 texts were cut to 96 tokens" in caplog.text
    assert np.abs(cut[0] - model.encode("word " * 200, max_tokens=1000)).max() > 1e-4
    assert model.num_truncated == 1
    with pytest.raises(DataError, match="leaves no room"):
        model.encode("text", instruction="long " * 100)


def test_search(model: UnifiedLM) -> None:
    vectors = model.encode(TEXTS)
    hits = model.search("b", vectors, k=2, instruction="")
    assert hits[0][0].index == 2
    assert hits[0][0].score == pytest.approx(1, abs=1e-5)
    assert [len(row) for row in model.search(["a", "b"], TEXTS, k=3)] == [3, 3]
    assert isinstance(hits[0][1], Hit)
    assert model.query_instruction == "Find the passage."
    by_default = model.search("b", vectors, k=5)[0]
    asked = model.similarity(model.encode("b", instruction="Find the passage."), vectors)[0]
    assert [hit.score for hit in by_default] == pytest.approx(sorted(asked, reverse=True), abs=1e-6)


def test_generate(model: UnifiedLM) -> None:
    answer = model.generate("What is it?", max_new_tokens=8)
    assert answer == model.generate([{"role": "user", "content": "What is it?"}], max_new_tokens=8)
    torch.manual_seed(0)
    drawn = model.generate("What is it?", max_new_tokens=8, temperature=5.0)
    torch.manual_seed(0)
    assert drawn == model.generate("What is it?", max_new_tokens=8, temperature=5.0)
    assert drawn != answer


def test_an_answer_ends_with_the_last_learned_position(exported: Callable[..., Path]) -> None:
    model = UnifiedLM.from_pretrained(exported("gpt2", max_position_embeddings=40), device="cpu")
    prompt = len(model.prompt_encoder.generation_prompt([("user", "x")]))
    pieces: list[str] = []
    model.generate("x", max_new_tokens=1000, min_new_tokens=40 - prompt, on_text=pieces.append)
    assert "".join(pieces)
    with pytest.raises(DataError, match=r"the prompt has \d+ tokens, but family 'gpt2' has a table of 40 positions: no room"):
        model.generate("a rather long question " * 10)


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([], "messages is empty"),
        ([{"role": "usr", "content": "x"}], r"messages\[0\]: unknown role 'usr'. Did you mean 'user'"),
        ([{"role": "user"}], r"messages\[0\] is .*expected"),
        (["hello"], r"messages\[0\] is 'hello'"),
    ],
)
def test_bad_messages(model: UnifiedLM, messages: Any, expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        model.generate(messages)


def test_modes_take_turns_across_threads(model: UnifiedLM) -> None:
    expected_vectors, expected_answer = model.encode(TEXTS), model.generate("What is it?", max_new_tokens=6)
    problems: list[str] = []

    def embed() -> None:
        for _ in range(5):
            if np.abs(model.encode(TEXTS) - expected_vectors).max() > 1e-6:
                problems.append("vectors")

    def answer() -> None:
        for _ in range(5):
            if model.generate("What is it?", max_new_tokens=6) != expected_answer:
                problems.append("answer")

    threads = [threading.Thread(target=work) for work in (embed, answer, embed, answer)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []


def test_one_mode_exports_refuse_the_other(exported: Callable[..., Path]) -> None:
    embedder = UnifiedLM.from_pretrained(exported(changes={"modes": ("embed",)}), device="cpu")
    embedder.encode("text")
    with pytest.raises(CheckpointError, match="embed only, so it cannot generate"):
        embedder.generate("hello")
    writer = UnifiedLM.from_pretrained(exported(changes={"modes": ("generate",)}), device="cpu")
    writer.generate("hello", max_new_tokens=2)
    with pytest.raises(CheckpointError, match="generate only, so it cannot embed"):
        writer.encode("text")


def test_a_plain_model_needs_a_template(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"no unified_lm\.json"):
        UnifiedLM.from_pretrained(tmp_path)
    causal = UnifiedLM.from_pretrained(tmp_path, device="cpu", template="grit", attention="causal")
    both = UnifiedLM.from_pretrained(tmp_path, device="cpu", template="grit")
    assert np.abs(causal.encode(TEXTS) - both.encode(TEXTS)).max() > 1e-3
    built = UnifiedLM(tiny_model("llama"), tiny_tokenizer(), template="grit")
    np.testing.assert_allclose(built.encode(TEXTS), both.encode(TEXTS), atol=1e-6)
    assert both.manifest is None


def test_what_a_command_line_may_replace_reaches_the_model(exported: Callable[..., Path]) -> None:
    parser = command_parser("encode", "", "")
    add_embedding_options(parser)
    given = ["--template", "plain", "--pooling", "cls", "--attention", "causal", "--max-tokens", "5"]
    chosen = embedding_options(parser.parse_args(given))
    assert set(chosen) <= set(signature(UnifiedLM.from_pretrained).parameters)
    fields = {field.name for field in dataclasses.fields(ArmSettings)}
    assert set(chosen) - {"method", "alpha"} <= fields, "analyze takes them too"
    model = UnifiedLM.from_pretrained(exported(), device="cpu", **chosen)
    assert (model.max_tokens, model.attention) == (5, "causal")
    model.encode(["a text of many more words than five tokens hold"])
    assert model.num_truncated == 1
    arm = Arm("a", exported(), ArmSettings(device="cpu", max_tokens=5, template="plain"))
    assert arm.load().max_tokens == 5
    assert arm.key() != Arm("a", exported(), ArmSettings(device="cpu", template="plain")).key(), "measured anew"


def test_what_cannot_be_loaded(tmp_path: Path, exported: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match="there is no folder"):
        UnifiedLM.from_pretrained(tmp_path / "missing")
    with pytest.raises(CheckpointError, match="neither a folder nor a model"):
        UnifiedLM.from_pretrained("nobody/nothing")
    with pytest.raises(ConfigError, match="unknown dtype 'floaty'"):
        UnifiedLM.from_pretrained(exported(), dtype="floaty")
    with pytest.raises(UserError, match="unknown attention 'sideways'"):
        UnifiedLM.from_pretrained(exported(), attention="sideways")
