"""Rotary settings are in config.json under their older names too, which transformers 4 reads, and are the same there."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.export.export_cases import make_manifest
from unified_lm.export import directory
from unified_lm.models.families import OWN_FAMILIES
from unified_lm.models.tiny import TINY_FAMILIES, tiny_config, tiny_model

IDS = torch.arange(3, 60)[None]
LINEAR = {"rope_type": "linear", "factor": 2.0}


def rope_of(family: str) -> dict[str, Any]:
    """Rotary settings that are the same for all layers; none of a family without."""
    rope = getattr(tiny_config(family), "rope_parameters", None) or {}
    return rope if "rope_theta" in rope else {}


FAMILIES = [family for family in TINY_FAMILIES if rope_of(family) and family not in OWN_FAMILIES]
CASES = [(family, scaling) for family in FAMILIES for scaling in ({}, LINEAR) if not (family == "phi3" and scaling)]
"""Phi-3 has no linear scaling."""


@torch.no_grad()
@pytest.mark.parametrize(("family", "scaling"), CASES)
def test_older_names_say_what_the_newer_ones_say(family: str, scaling: dict[str, Any], tmp_path: Path) -> None:
    rope = rope_of(family)
    part = {"partial_rotary_factor": 0.5} if "partial_rotary_factor" in rope else {}
    model = tiny_model(family, rope_parameters={**rope, "rope_theta": 54321.0, **part, **scaling})
    model.save_pretrained(tmp_path)
    directory._write_config(tmp_path, make_manifest(), {})  # alone: not every family has a tokenizer like the tiny one
    config = json.loads((tmp_path / "config.json").read_text())
    older = {name: value for name, value in config.items() if name != "rope_parameters"}
    for spelled in (config, older):  # transformers 5 reads the older names where the newer ones are missing
        read = AutoConfig.for_model(**spelled)
        assert read.rope_parameters == model.config.rope_parameters
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, config=read, dtype="float32")
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    if part:
        assert config["rotary_pct" if family == "gpt_neox" else "partial_rotary_factor"] == 0.5
    if family == "gpt_neox":
        assert config["rotary_emb_base"] == 54321.0


def test_families_with_a_part_of_their_own_are_among_them() -> None:
    assert {"gpt_neox", "phi3"} <= {family for family in FAMILIES if "partial_rotary_factor" in rope_of(family)}


@pytest.mark.parametrize("family", ["gpt_neox_japanese", "phi", "stablelm", "glm", "glm4", "nemotron", "persimmon"])
def test_other_families_that_rotate_a_part(family: str) -> None:
    """By their configurations alone: what transformers 4 takes, without `rope_parameters`, is the same."""
    rope = AutoConfig.for_model(family).rope_parameters
    part = rope["partial_rotary_factor"] / 2
    config = AutoConfig.for_model(family, rope_parameters={**rope, "rope_theta": 54321.0, "partial_rotary_factor": part})
    text = json.loads(config.to_json_string())
    directory._add_older_rope(text)
    older = AutoConfig.for_model(**{name: value for name, value in text.items() if name != "rope_parameters"})
    assert older.rope_parameters == config.rope_parameters
    assert text["rotary_pct" if family.startswith("gpt_neox") else "partial_rotary_factor"] == part
