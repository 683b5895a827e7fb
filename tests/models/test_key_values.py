"""Cached keys and values: moved and joined they are what one forward under the same blocks computes."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.models.test_families import PACKED, PADDED, name
from unified_lm.batch import Block, Sample, make_pack
from unified_lm.core.errors import ModelError
from unified_lm.models.backbone import Backbone
from unified_lm.models.key_values import KeyValueCache, KeyValueReader
from unified_lm.models.tiny import tiny_model

EXACT = {"rtol": 1e-4, "atol": 1e-4}
SCALINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
}
SCALED = ["llama", "mistral", "qwen2", "qwen3", "olmoe"]
LEARNED = {"gpt2"}
LATENT = {"deepseek_v2", "deepseek_v3"}


def ids(length: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, 200, size=length)


def text(length: int, seed: int, bidirectional: bool) -> Sample:
    return Sample(input_ids=ids(length, seed), stream="s", bidirectional=(0, length) if bidirectional else (0, 0))


def backbone_of(family: str, **values: Any) -> Backbone:
    return Backbone(tiny_model(family, **values), "sdpa").eval()


def read_texts(reader: KeyValueReader, samples: list[Sample]) -> list[KeyValueCache]:
    """The samples' caches, in the order given (a pack has its own), read in one forward."""
    pack = make_pack(samples)
    caches = dict(zip(map(id, pack.samples), reader.read(pack)[1], strict=True))
    return [caches[id(sample)] for sample in samples]


@torch.no_grad()
def tail_logits(backbone: Backbone, cache: KeyValueCache, tail: np.ndarray) -> torch.Tensor:
    """Logits `[tail, V]` of stock transformers that reads on from a cache."""
    with backbone.stock_attention() as model:
        past = cache.to_transformers(model.config)
        return model(input_ids=torch.from_numpy(tail)[None], past_key_values=past).logits[0]


@torch.no_grad()
def whole_logits(backbone: Backbone, cache: KeyValueCache, tail: np.ndarray) -> torch.Tensor:
    """The same from one packed forward over everything, under the cache's blocks."""
    everything = np.concatenate([cache.token_ids.numpy(), tail])
    hidden = backbone(make_pack([Sample(input_ids=everything, stream="s", blocks=cache.blocks)]))
    head = backbone.output_head()
    logits = torch.nn.functional.linear(hidden[len(cache) :], head.weight, head.bias) * head.scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def check_joined(backbone: Backbone) -> None:
    reader = KeyValueReader(backbone)
    caches = read_texts(reader, [text(21, 1, True), text(13, 2, False), text(17, 3, True)])
    joined, tail = reader.join(caches), ids(6, 4)
    assert joined.blocks == (Block(0, 21, True), Block(21, 34), Block(34, 51, True))
    assert joined.position_ids.tolist() == list(range(51))
    expected = whole_logits(backbone, joined, tail)
    torch.testing.assert_close(tail_logits(backbone, joined, tail), expected, **EXACT)
    if any(len(rotation.inv_freq) for rotation in reader.rotations):
        layers = [
            tuple(torch.cat(parts, dim=1) for parts in zip(*layer, strict=True))
            for layer in zip(*(cache.layers for cache in caches), strict=True)
        ]
        unmoved = tail_logits(backbone, replace(joined, layers=tuple(layers)), tail)
        assert (unmoved - expected).abs().max() > 1e-3, "keys that overlap at position 0 read otherwise"


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("family", SCALED)
def test_joined_caches_are_one_prefill_under_every_static_scaling(family: str, scaling: str) -> None:
    values = {"rope_parameters": {"rope_theta": 10000.0, **SCALINGS[scaling]}} if scaling != "plain" else {}
    check_joined(backbone_of(family, **values))


@pytest.mark.parametrize(("family", "values"), PACKED, ids=name)
def test_every_family_is_exact_or_refused_by_name(family: str, values: dict[str, Any]) -> None:
    backbone = backbone_of(family, **values)
    if family in LATENT:
        with pytest.raises(ModelError, match=rf"'{family}' caches \(heads, size\)"):
            KeyValueReader(backbone)
    elif family in LEARNED:
        with pytest.raises(ModelError, match=f"'{family}': keys of layer 0 cannot be moved"):
            check_joined(backbone)
    else:
        check_joined(backbone)


@pytest.mark.parametrize(("family", "values"), [case for case in PACKED if case[0] not in LATENT], ids=name)
def test_a_causal_cache_at_the_start_answers_as_the_whole_prompt(family: str, values: dict[str, Any]) -> None:
    """Also where positions cannot move, and under sliding windows: greedy answers are equal token for token."""
    backbone = backbone_of(family, **values)
    reader = KeyValueReader(backbone)
    (cache,) = read_texts(reader, [text(24, 5, False)])
    prompt = torch.from_numpy(np.concatenate([cache.token_ids.numpy(), ids(5, 6)]))[None]
    with backbone.stock_attention() as model:
        options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(prompt), "pad_token_id": 0}
        expected = model.generate(prompt, **options)
        got = model.generate(prompt, past_key_values=reader.join([cache]).to_transformers(model.config), **options)
        again = model.generate(prompt, past_key_values=cache.to_transformers(model.config), **options)
    assert torch.equal(got, expected)
    assert torch.equal(again, expected), "generation leaves the cache as it was"


@pytest.mark.parametrize(("family", "values"), PADDED, ids=name)
def test_what_keeps_no_keys_is_refused(family: str, values: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="'padded' keeps no keys"):
        KeyValueReader(Backbone(tiny_model(family, **values), "padded"))


def test_a_packed_document_is_cached_as_alone_and_as_transformers_caches_it() -> None:
    backbone = backbone_of("llama")
    reader = KeyValueReader(backbone)
    samples = [text(9, 1, False), text(14, 2, True), text(5, 3, False)]
    for sample, cache in zip(samples, read_texts(reader, samples), strict=True):
        (alone,) = read_texts(reader, [sample])
        with torch.no_grad(), backbone.stock_attention() as model:
            model.config.is_causal = not cache.blocks
            past = model(input_ids=torch.from_numpy(sample.input_ids)[None], use_cache=True).past_key_values
            del model.config.is_causal
        stock = KeyValueCache.from_transformers(past, cache.token_ids)
        for other in (alone, stock):
            for mine, theirs in zip(cache.layers, other.layers, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_parts_moves_and_sizes() -> None:
    backbone = backbone_of("llama")
    reader = KeyValueReader(backbone)
    rotations = reader.rotations
    (cache,) = read_texts(reader, [text(12, 1, False)])
    part, (alone,) = cache[:7], read_texts(reader, [replace(text(7, 1, False), input_ids=ids(12, 1)[:7])])
    for mine, theirs in zip(part.layers, alone.layers, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    assert (part.token_ids.tolist(), part.position_ids.tolist()) == (ids(12, 1)[:7].tolist(), list(range(7)))
    assert cache.num_bytes == 2 * 2 * 2 * 12 * 16 * 4, "two layers, keys and values, two heads of 16, float32"
    assert cache.to(dtype=torch.bfloat16).num_bytes == cache.num_bytes // 2
    there = cache.moved(100, rotations)
    assert there.start == 100
    for mine, theirs in zip(there.moved(0, rotations).layers, cache.layers, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    with pytest.raises(ModelError, match=r"no part \[5:5"):
        cache[5:5]
    with pytest.raises(ModelError, match="begins at position 100"):
        there.to_transformers(backbone.causal_lm.config)
    blocked = reader.join([cache, cache])[10:20]
    assert blocked.blocks == (Block(0, 2), Block(2, 10))


def test_first_tokens_that_are_read_again_see_what_stands_before_them() -> None:
    backbone = backbone_of("llama")
    reader = KeyValueReader(backbone)
    texts = [text(12, 1, False), text(9, 2, False), text(3, 3, False)]
    caches = read_texts(reader, texts)
    everything = np.concatenate([sample.input_ids for sample in texts])
    (plain,) = read_texts(reader, [Sample(input_ids=everything, stream="s")])
    for recompute, same in ((100, slice(0, 24)), (4, slice(0, 16))):
        joined = reader.join(caches, recompute)
        assert joined.position_ids.tolist() == list(range(24))
        for mine, theirs in zip(joined[same].layers, plain[same].layers, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    unrepaired = reader.join(caches)
    for mine, theirs in zip(joined[16:21].layers, unrepaired[16:21].layers, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    assert joined.blocks == (Block(0, 12), Block(16, 21)), "what was read again is causal, as all outside blocks is"
    assert reader.join(caches[:1], 4) is not None


def test_frequencies_that_follow_the_length_move_up_to_where_they_change() -> None:
    scaling = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    backbone = backbone_of("llama", rope_parameters=scaling, max_position_embeddings=64)
    check_joined(backbone)
    reader = KeyValueReader(backbone)
    with pytest.raises(ModelError, match=r"70 tokens, but beyond 63 tokens.*dynamic"):
        reader.join(read_texts(reader, [text(35, 1, True), text(35, 2, False)]))


def test_partial_spans_are_refused() -> None:
    with pytest.raises(ModelError, match="partial bidirectional span"):
        KeyValueReader(backbone_of("llama")).read(make_pack([replace(text(9, 1, False), bidirectional=(1, 5))]))
