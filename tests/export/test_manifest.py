"""The manifest survives a round trip and says what is wrong with a file that it cannot read."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tests.export.export_cases import make_manifest
from unified_lm.core.errors import CheckpointError
from unified_lm.export.manifest import FORMAT_VERSION, Manifest
from unified_lm.models.weights_hash import hash_weights


def test_round_trip(tmp_path: Path) -> None:
    manifest = make_manifest()
    manifest.save(tmp_path)
    back = Manifest.load(tmp_path)
    assert back == manifest
    assert back.stages[0].adapter == manifest.stages[0].adapter
    assert back.modes == ("embed", "generate")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"format_version": FORMAT_VERSION + 1}, r"reads up to 1\. Upgrade: pip install"),
        ({"format_version": "one"}, "expected an integer"),
        ({"poolings": "mean"}, "unknown field 'poolings'. Did you mean 'pooling'"),
        ({"attention": "bidirektional"}, "Did you mean 'bidirectional'"),
        ({"modes": ["embed", "generat"]}, "Did you mean 'generate'"),
        ({"modes": []}, "at least one mode"),
        ({"stages": {}}, r"stages: got \{\} \(dict\), expected a list"),
        ({"stages": [{"recipe": "x", "step": 1}]}, "Did you mean 'steps'"),
        ({"max_tokens": "96"}, r"max_tokens: got '96' \(str\), expected a whole number"),
        ({"instructions": {"query": None}}, r"instructions\.query: got None \(null\), expected text"),
        ({"projection_dim": 10**30}, "a whole number of 31 digits"),
    ],
)
def test_a_file_that_cannot_be_read_says_why(tmp_path: Path, change: dict[str, Any], expected: str) -> None:
    (tmp_path / "unified_lm.json").write_text(json.dumps({**asdict(make_manifest()), **change}))
    with pytest.raises(CheckpointError, match=expected):
        Manifest.load(tmp_path)


def test_missing_field_file_and_torn_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not an export of unified_lm"):
        Manifest.load(tmp_path)
    value = asdict(make_manifest())
    del value["recipe"]
    (tmp_path / "unified_lm.json").write_text(json.dumps(value))
    with pytest.raises(CheckpointError, match="'recipe'"):
        Manifest.load(tmp_path)
    (tmp_path / "unified_lm.json").write_text(json.dumps(value)[:40])
    with pytest.raises(CheckpointError, match="not valid JSON"):
        Manifest.load(tmp_path)


def test_weights_hash_sees_every_byte(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"abc")
    first = hash_weights(tmp_path)
    assert first == hash_weights(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"abd")
    assert hash_weights(tmp_path) != first
