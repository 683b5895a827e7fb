"""Law 6: stock tools, in a process that never imports unified_lm, give our vectors, our logits and our answers."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from unified_lm.batch import Sample, make_pack
from unified_lm.inference import UnifiedLM

TEXTS = [
    "a short text",
    "A rather longer text, so that a batch of stock tools has padding in it and a window of eight tokens is exceeded.",
    "Zwölf – 十二",
    "x",
]
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is it?"},
    {"role": "assistant", "content": "A test."},
    {"role": "user", "content": "And the other?"},
]
CASES: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama"},
    "mistral, sliding window": {"family": "mistral", "sliding_window": 8},
    "qwen3": {"family": "qwen3", "add_bos": False},
    "gpt2": {"family": "gpt2", "add_bos": False},
    "gemma2": {"family": "gemma2"},
}


@pytest.fixture(scope="module")
def stock(exported: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, np.ndarray]]:
    """Case -> what stock tools say, from one separate process for all of them."""
    folder = tmp_path_factory.mktemp("stock")
    cases = [
        {"folder": str(exported(**options)), "out": str(folder / f"{i}.npz"), "texts": TEXTS, "messages": MESSAGES}
        for i, options in enumerate(CASES.values())
    ]
    (folder / "cases.json").write_text(json.dumps(cases))
    script = Path(__file__).with_name("stock_tools.py")
    command = [sys.executable, str(script), str(folder / "cases.json")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: dict(np.load(case["out"])) for name, case in zip(CASES, cases, strict=True)}


@pytest.mark.parametrize("name", CASES)
def test_the_same_vectors(exported: Callable[..., Path], stock: dict[str, dict[str, np.ndarray]], name: str) -> None:
    model = UnifiedLM.from_pretrained(exported(**CASES[name]), device="cpu")
    np.testing.assert_allclose(model.encode(TEXTS), stock[name]["documents"], atol=1e-5)
    queries = model.encode(TEXTS, instruction="Find the passage.")
    np.testing.assert_allclose(queries, stock[name]["queries"], atol=1e-5)
    assert np.abs(queries - stock[name]["documents"]).max() > 1e-3, "the instruction must matter for this test to mean it"


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_the_same_logits(exported: Callable[..., Path], stock: dict[str, dict[str, np.ndarray]], name: str) -> None:
    """Ours from a packed causal forward, next to another sample."""
    model = UnifiedLM.from_pretrained(exported(**CASES[name]), device="cpu")
    tokens = stock[name]["tokens"]
    backbone = model._backbone
    hidden = backbone(make_pack([Sample(input_ids=tokens, stream="a"), Sample(input_ids=tokens[:3], stream="b")]))
    head = backbone.output_head()
    logits = torch.nn.functional.linear(hidden[: len(tokens)], head.weight, head.bias) * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    np.testing.assert_allclose(logits.numpy(), stock[name]["logits"], atol=1e-5 * np.abs(stock[name]["logits"]).max())


@pytest.mark.parametrize("name", CASES)
def test_the_same_chat(exported: Callable[..., Path], stock: dict[str, dict[str, np.ndarray]], name: str) -> None:
    model = UnifiedLM.from_pretrained(exported(**CASES[name]), device="cpu")
    turns = [(message["role"], message["content"]) for message in MESSAGES]
    np.testing.assert_array_equal(model._encoder.generation_prompt(turns), stock[name]["chat"])
    assert model.generate(MESSAGES, max_new_tokens=12) == str(stock[name]["answer"])


@pytest.mark.parametrize("name", CASES)
def test_leak_probes(stock: dict[str, dict[str, np.ndarray]], name: str) -> None:
    assert stock[name]["causal_leak"] <= 1e-6, "generation is causal"
    assert stock[name]["embedding_leak"] > 1e-3, "embedding is bidirectional"
