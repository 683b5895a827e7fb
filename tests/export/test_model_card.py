"""The card says what the manifest knows, in every combination, and nothing else."""

import json

import pytest

from tests.export.export_cases import make_manifest
from unified_lm.data.prompts.templates import get_template
from unified_lm.export.directory import prompts
from unified_lm.export.manifest import Manifest
from unified_lm.export.model_card import model_card
from unified_lm.models.tiny import tiny_tokenizer


def card(manifest: Manifest, loads: bool = True) -> str:
    return model_card(manifest, prompts(manifest, get_template("grit"), tiny_tokenizer()), loads)


def test_a_dual_model() -> None:
    text = card(make_manifest(embedding_dim=64))
    front = text.split("---")[1]
    assert "library_name: sentence-transformers" in front
    assert 'license: "apache-2.0"' in front
    assert 'base_model: "org/base"' in front
    assert "- text-generation" in front
    assert json.dumps("<|user|>\nFind the passage.\n<|embed|>\n") in text
    assert "| retrieval nDCG@10 | 0.3 | 0.6851 |" in text
    assert "| 1 | mntp | 10 | LoRA r=4, alpha=8, dropout=0.05, on q_proj, v_proj |" in text
    assert "AutoModelForCausalLM" in text
    assert "{%" not in text
    assert "{{" not in text


def test_usage_snippets_are_python() -> None:
    blocks = card(make_manifest()).split("```python\n")[1:]
    assert len(blocks) == 3
    for block in blocks:
        compile(block.partition("```")[0], "card", "exec")


def test_nothing_is_claimed_that_is_not_known() -> None:
    bare = card(make_manifest(metrics={}, stages=(), data=(), base_license="", base_model="a local model"))
    front = bare.split("---")[1]
    assert "license" not in front
    assert "base_model" not in front
    assert "## Metrics" not in bare
    assert "Adapters were merged" not in bare
    assert "No training stage is recorded" in bare
    assert "its license is not recorded here" in bare


def test_the_license_is_spelled_as_in_the_front_matter() -> None:
    text = card(make_manifest())
    assert "| rows | license |" in text
    assert "so does its license" in text


@pytest.mark.parametrize(("modes", "absent"), [(("embed",), "AutoModelForCausalLM"), (("generate",), "SentenceTransformer")])
def test_one_mode_shows_only_its_use(modes: tuple[str, ...], absent: str) -> None:
    assert absent not in card(make_manifest(modes=modes))
