"""A tiny model as a folder, and small files to measure it on."""

import json
from itertools import pairwise
from pathlib import Path

import pytest

from unified_lm.inference import UnifiedLM
from unified_lm.models.tiny import tiny_model, tiny_tokenizer

WORDS = ("the", "sea", "bread", "moves", "over", "a", "ship", "oven", "and", "waits", "for", "sand", "dough", "in", "two")


def sentences(count: int, words: int = 9) -> list[str]:
    """Different sentences out of a few words."""
    return [" ".join(WORDS[(i * 7 + j * (i % 5 + 1)) % len(WORDS)] for j in range(words)) + f" {i}" for i in range(count)]


@pytest.fixture(scope="package")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny causal language model that is no export."""
    path = tmp_path_factory.mktemp("tiny") / "base"
    tiny_model("llama").save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="package")
def model(folder: Path) -> UnifiedLM:
    return UnifiedLM.from_pretrained(folder, device="cpu", template="plain")


@pytest.fixture(scope="package")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """texts (.txt), sts (.jsonl with scores), pairs (.jsonl)."""
    root = tmp_path_factory.mktemp("files")
    texts = sentences(60)
    (root / "texts.txt").write_text("\n".join(texts) + "\n")
    scored = [{"sentence1": a, "sentence2": b, "score": i % 6} for i, (a, b) in enumerate(pairwise(texts))]
    (root / "sts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in scored))
    pairs = [{"query": ["Find it.", a], "pos": [["", f"{a} {b}"]]} for a, b in zip(texts[:20], texts[20:], strict=False)]
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    return {name.split(".")[0]: root / name for name in ("texts.txt", "sts.jsonl", "pairs.jsonl")}
