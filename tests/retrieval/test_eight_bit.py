"""Keys and values in 8 bits: how far off they are, what shares a scale, and that they still move."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.models.test_key_values import backbone_of, ids, read_texts, tail_logits, text
from unified_lm.models.key_values import KeyValueReader
from unified_lm.retrieval.eight_bit import GROUP, dequantize, quantize
from unified_lm.retrieval.stored import KeyValueStore


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("tokens", [1, GROUP - 1, GROUP, GROUP + 1, 3 * GROUP + 5])
def test_every_number_is_within_half_a_step_of_its_own_group(tokens: int, dim: int) -> None:
    values = torch.randn(2, 3, tokens, 80, generator=torch.Generator().manual_seed(tokens))
    numbers, scales = quantize(values.to(torch.bfloat16).float(), dim)
    found = dequantize(numbers, scales, dim)
    assert (numbers.dtype, scales.dtype, numbers.shape) == (torch.int8, torch.bfloat16, values.shape)
    assert scales.shape[dim] == -(-values.shape[dim] // GROUP)
    for part, group in zip(values.split(GROUP, dim), found.split(GROUP, dim), strict=True):
        step = part.abs().amax(dim, keepdim=True) / 127
        assert ((part - group).abs() <= 0.5 * step + 0.01 * part.abs()).all()
        assert ((part - group).abs() > 0.2 * step).any() or tokens == 1, "it is eight bits, not more"


def test_a_large_channel_does_not_cost_the_others() -> None:
    """Keys of some families have channels a hundred times larger than the rest: per token they would lose it."""
    keys = torch.randn(2, 200, 64, generator=torch.Generator().manual_seed(0))
    keys[..., 7] += 300
    small = torch.arange(64) != 7

    def lost(dim: int) -> float:
        return relative(dequantize(*quantize(keys, dim), dim)[..., small], keys[..., small])

    assert lost(-2) < 0.01
    assert lost(-1) > 0.3


def test_extremes() -> None:
    for values in (
        torch.zeros(1, 5, 4),
        torch.full((1, 5, 4), -1e30),
        torch.full((1, 5, 4), 1e-30),
        torch.tensor([[[0.0, 3.0]]]),
    ):
        for dim in (-1, -2):
            torch.testing.assert_close(dequantize(*quantize(values, dim), dim), values, rtol=0.01, atol=0)


def test_a_stored_text_is_moved_after_it_is_read(tmp_path: Path) -> None:
    """Joined caches that were stored in 8 bits read like those that were not: numbers are rotated, not their codes."""
    backbone = backbone_of("llama")
    reader = KeyValueReader(backbone)
    caches = read_texts(reader, [text(90, 1, True), text(70, 2, False), text(80, 3, True)])
    tail = ids(6, 4)
    expected = tail_logits(backbone, reader.join(caches), tail)
    with KeyValueStore(tmp_path, "int8") as store:
        for number, cache in enumerate(caches):
            store.put(str(number), "causal", cache)
        stored = [store.get(str(number), "causal") for number in range(3)]
        half = [store.get(str(number), "causal", dtype=torch.bfloat16) for number in range(3)]
    found = tail_logits(backbone, reader.join([cache for cache in stored if cache]), tail)
    assert relative(found, expected) < 0.01
    assert relative(found, expected) > 1e-5, "something was stored in 8 bits"
    assert all(cache is not None and cache.layers[0][0].dtype is torch.bfloat16 for cache in half)
    assert np.mean([relative(a.layers[0][0].float(), b.layers[0][0]) for a, b in zip(half, caches, strict=True) if a]) < 0.01
    unmoved = [
        replace(cache, position_ids=cache.position_ids + start) for cache, start in zip(caches, (0, 90, 160), strict=True)
    ]
    assert relative(tail_logits(backbone, reader.join(unmoved), tail), expected) > 0.02, "not moving them would be seen"
