"""Compiled blocks: the same numbers for every family, one set of graphs for packs of any lengths, the same dropout."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from unified_lm.batch import Pack, Sample, make_pack
from unified_lm.core.errors import ModelError
from unified_lm.models.backbone import Backbone
from unified_lm.models.compiled import compile_blocks
from unified_lm.models.families import has_interface
from unified_lm.models.tiny import TINY_FAMILIES, tiny_model

PACKED = [family for family in sorted(TINY_FAMILIES) if family != "monet" and has_interface(tiny_model(family))]


def random_packs(count: int) -> Iterator[Pack]:
    rng = np.random.default_rng(0)
    for _ in range(count):
        lengths = [int(length) for length in rng.integers(2, 40, int(rng.integers(2, 9)))]
        yield make_pack(
            [
                Sample(
                    input_ids=rng.integers(5, 200, length),
                    stream="a",
                    bidirectional=(0, length) if index % 2 else (0, 0),
                    pool=(0, length),
                    group=index,
                    slot=0,
                )
                for index, length in enumerate(lengths)
            ]
        )


def number_of_graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def gradients(model: torch.nn.Module, backbone: Backbone, pack: Pack) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(3)
    states = backbone(pack)
    states.float().square().mean().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"states": states.detach(), **found}


def check(family: str, packs: int, **config: Any) -> None:
    torch.manual_seed(0)
    model = tiny_model(family, **config).train()
    backbone = Backbone(model, "sdpa")
    plain = [gradients(model, backbone, pack) for pack in random_packs(packs)]
    compile_blocks(model)
    counters.clear()
    after_two = 0
    for index, (pack, expected) in enumerate(zip(random_packs(packs), plain, strict=True)):
        for name, value in gradients(model, backbone, pack).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=2e-5, msg=f"{family}, pack {index}: {name}")
        torch.manual_seed(3)
        with torch.no_grad():
            torch.testing.assert_close(backbone(pack), expected["states"], rtol=1e-4, atol=2e-5)
        if index == 1:
            after_two = number_of_graphs()
    assert after_two > 0
    assert number_of_graphs() == after_two, "packs of other lengths were compiled again"


NO_DROPOUT = {"gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}}


def test_a_hundred_packs_of_random_lengths_are_compiled_once() -> None:
    check("llama", 100)


@pytest.mark.slow
@pytest.mark.parametrize("family", PACKED)
def test_every_family_gives_the_same_numbers(family: str) -> None:
    check(family, 5, **NO_DROPOUT.get(family, {}))


@pytest.mark.slow
def test_dropout_is_that_of_the_same_seed() -> None:
    """gpt2 drops inside of its blocks; compiled they draw the same numbers, also in GradCache's second forward."""
    check("gpt2", 3)


def test_what_cannot_be_compiled_is_refused() -> None:
    with pytest.raises(ModelError, match=r"family 'monet' cannot be compiled\. Set model\.compile=false"):
        compile_blocks(tiny_model("monet"))
