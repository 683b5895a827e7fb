"""The key of a model's numbers: of its configuration and of all its weights."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from unified_lm.models import identity
from unified_lm.models.identity import fingerprint, identity_key
from unified_lm.models.tiny import tiny_model


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama")


def last_weight(model: PreTrainedModel) -> None:
    """What a short fine-tuning in bfloat16 may leave of a difference: one value, and not among the first of its tensor."""
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.up_proj.weight")[-1, -1] += 1.0


def rotary_base(model: PreTrainedModel) -> None:
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": 500_000.0}


def rotary_scaling(model: PreTrainedModel) -> None:
    model.config.rope_parameters = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}


@pytest.mark.parametrize("change", [last_weight, rotary_base, rotary_scaling])
def test_models_that_differ_have_other_keys(model: PreTrainedModel, change: Callable[[PreTrainedModel], None]) -> None:
    other = copy.deepcopy(model)
    assert identity_key(other) == identity_key(model)
    change(other)
    assert identity_key(other) != identity_key(model)
    assert fingerprint(other) == fingerprint(model), "which checkpoints compare, and which does not see this"


def test_dtypes_have_other_keys(model: PreTrainedModel) -> None:
    assert identity_key(copy.deepcopy(model).to(torch.bfloat16)) != identity_key(model)


def test_where_a_model_comes_from_is_no_part_of_it(model: PreTrainedModel) -> None:
    other = copy.deepcopy(model)
    other.config.name_or_path = "elsewhere"
    other.config.transformers_version = "0"
    assert identity_key(other) == identity_key(model)


def test_every_block_counts(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "_BLOCK_BYTES", 64)
    keys = {identity_key(model)}
    other = copy.deepcopy(model)
    last_weight(other)
    assert identity_key(other) not in keys
