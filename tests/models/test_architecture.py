"""Configurations that a recipe describes."""

import time

import pytest

from unified_lm.config.schema import ModelConfig
from unified_lm.core.errors import ModelError
from unified_lm.models.architecture import described_config
from unified_lm.models.tiny import TINY_FAMILIES


@pytest.mark.parametrize("family", sorted(TINY_FAMILIES))
def test_a_senseless_depth_is_refused_before_a_configuration_is_made(family: str) -> None:
    """Some families write a list with an entry for each layer into theirs, which took all memory."""
    values = TINY_FAMILIES[family]
    depth = next(name for name in ("num_hidden_layers", "n_layer") if name in values)
    started = time.process_time()
    with pytest.raises(ModelError, match="got 2147483648 layers, expected at most 2000"):
        described_config(ModelConfig(family=family, architecture=values | {depth: 2**31}))
    assert time.process_time() - started < 5, "minutes and gigabytes before"
    assert described_config(ModelConfig(family=family, architecture=values)).model_type == family


def test_a_family_that_does_not_exist_is_named() -> None:
    with pytest.raises(ModelError, match=r"model\.family: transformers knows no family 'nothing'"):
        described_config(ModelConfig(family="nothing", architecture={"hidden_size": 8}))
