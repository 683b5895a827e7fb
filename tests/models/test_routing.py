"""Routing: what stock transformers computes, for every family; who sees whom; vectors that depend on their text alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from tests.models.test_families import MIXTURES
from unified_lm.batch import Sample, make_pack
from unified_lm.core.errors import ConfigError, DataError, ModelError
from unified_lm.models.backbone import Backbone
from unified_lm.models.moee import RoutedPooling, WeightedBlocks, check_method, moee_head, standardize_batch
from unified_lm.models.pooling import Pooling
from unified_lm.models.routing import Gate, Routers, _read, find_gate
from unified_lm.models.standardizer import Standardizer
from unified_lm.models.tiny import tiny_model

SIGMOIDS = ("deepseek_v3",)


def ids(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, 200, length)


def sample(tokens: np.ndarray, *, whole: bool = False) -> Sample:
    span = (0, len(tokens) if whole else 0)
    return Sample(input_ids=tokens, stream="s", bidirectional=span, pool=(1, len(tokens)))


@pytest.mark.parametrize("family", MIXTURES)
@torch.no_grad()
def test_it_is_what_the_stock_model_computes(family: str) -> None:
    backbone = Backbone(tiny_model(family), "sdpa").eval()
    routers = Routers(backbone)
    tokens = ids(12)
    pack = make_pack([sample(ids(7, 1)), sample(tokens)])
    rows = torch.arange(7, 19) if pack.samples[1].input_ids is tokens else torch.arange(12)
    hidden, traced = routers.trace(pack, rows)
    assert torch.equal(hidden, backbone(pack)), "reading changes nothing"
    seen: list[tuple[torch.Tensor, ...]] = []
    modules = dict(backbone.causal_lm.get_decoder().named_modules())
    hooks = [modules[name].register_forward_hook(lambda module, given, output: seen.append(output)) for name in routers.names]
    with backbone.stock_attention() as stock:
        stock(input_ids=torch.from_numpy(tokens)[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    assert len(traced) == len(seen) == len(routers.sizes)
    for layer, (logits, weights, chosen) in zip(traced, seen, strict=True):
        torch.testing.assert_close(layer.logits, logits.float(), rtol=1e-5, atol=1e-5)
        assert torch.equal(layer.selected, torch.zeros_like(logits).bool().scatter(1, chosen, True))
        probability = layer.probabilities.gather(1, chosen)
        # The model's weights, but for a factor.
        torch.testing.assert_close(probability / probability.sum(1, keepdim=True), weights / weights.sum(1, keepdim=True))
        if routers.gate is Gate.SOFTMAX:
            torch.testing.assert_close(layer.probabilities.sum(1), torch.ones(12))
    assert routers.gate is (Gate.SIGMOID if family in SIGMOIDS else Gate.SOFTMAX)


@pytest.mark.parametrize("whole", [False, True], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("family", MIXTURES)
@torch.no_grad()
def test_no_sample_sees_another_and_only_bidirectional_ones_see_their_future(family: str, whole: bool) -> None:
    routers = Routers(Backbone(tiny_model(family), "sdpa").eval())
    first, second = ids(6), ids(7, 1)  # within the window of gpt-oss
    changed = second.copy()
    changed[-1] = 3 + (changed[-1] - 2) % 190

    def traced(last: np.ndarray) -> list[torch.Tensor]:
        pack = make_pack([sample(first, whole=whole), sample(last, whole=whole)])
        start = {id(each.input_ids): offset for each, offset in zip(pack.samples, pack.plan.offsets, strict=False)}
        rows = torch.tensor([start[id(first)] + 3, start[id(last)], start[id(last)] + 6])
        return [layer.logits for layer in routers.trace(pack, rows)[1]]

    for one, other in zip(traced(second), traced(changed), strict=True):
        differs = (one - other).abs().amax(1) > 1e-5  # rounding may depend on how many tokens an expert gets
        assert differs.tolist() == [False, whole, True], "the neighbor, the first token, the one that changed"


@pytest.mark.parametrize("method", list(Pooling))
@pytest.mark.parametrize("whole", [False, True], ids=["causal", "bidirectional"])
@torch.no_grad()
def test_a_vector_depends_on_its_text_alone(method: Pooling, whole: bool) -> None:
    from unified_lm.models.embedding import embed_samples

    backbone = Backbone(tiny_model("olmoe"), "sdpa").eval()
    routers = Routers(backbone)
    samples = [sample(ids(length, length), whole=whole) for length in (5, 17, 8, 2)]

    def embed(some: list[Sample], budget: int = 1000) -> torch.Tensor:
        return embed_samples(backbone, some, RoutedPooling(routers, method), token_budget=budget, device="cpu")

    together = embed(samples)
    assert together.shape == (4, 64 + 8)
    torch.testing.assert_close(embed(samples[::-1]).flip(0), together, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(embed(samples, 17), together, rtol=1e-5, atol=1e-5)
    for row, each in zip(together, samples, strict=True):
        torch.testing.assert_close(embed([each])[0], row, rtol=1e-5, atol=1e-5)
    states = embed_samples(backbone, samples, method, token_budget=1000, device="cpu")
    assert torch.equal(together[:, :64], states), "the states are those of the same forward"


@torch.no_grad()
def test_pooled_routing_is_the_pooled_trace() -> None:
    backbone = Backbone(tiny_model("olmoe"), "sdpa").eval()
    routers = Routers(backbone)
    pack = make_pack([sample(ids(6)), sample(ids(9, 1))])
    _, layers = routers.trace(pack, torch.arange(15))
    every = torch.cat([layer.probabilities for layer in layers], dim=1)
    expected = {
        Pooling.MEAN: torch.stack([every[start:stop].mean(0) for start, stop in pack.pool_spans.tolist()]),
        Pooling.LAST_TOKEN: every[pack.pool_spans[:, 1] - 1],
        Pooling.CLS: every[pack.pool_spans[:, 0]],
    }
    for method, value in expected.items():
        pooling = RoutedPooling(routers, method, states=False)
        with pooling.listening(pack):
            hidden = backbone(pack)
        torch.testing.assert_close(pooling(hidden, pack.pool_spans), value)


def test_the_gate_is_found_from_weights_of_any_scale() -> None:
    logits = torch.randn(20, 8, generator=torch.Generator().manual_seed(0)) * 2
    for gate in Gate:
        for k in (1, 2, 3):
            weights, chosen = gate(logits).topk(k, dim=-1)
            assert find_gate([(logits, chosen, weights * 2.5)]) is gate
            if k > 1:
                assert find_gate([(logits, chosen, weights / weights.sum(1, keepdim=True))]) is gate
            half = (logits.bfloat16(), chosen, weights.bfloat16())
            assert find_gate([half]) is gate
    weights, chosen = logits.abs().topk(2, dim=-1)
    with pytest.raises(ModelError, match="neither by a softmax nor by sigmoids"):
        find_gate([(logits, chosen, weights)])
    zero = (torch.zeros(4, 8), chosen[:4], torch.full((4, 2), 0.5))
    assert find_gate([zero], "scores = logits.sigmoid()") is Gate.SIGMOID
    assert find_gate([zero], "softmax(logits)") is Gate.SOFTMAX


def test_dense_models_and_strange_routers_are_refused() -> None:
    with pytest.raises(ModelError, match=r"'llama' has no router: it is dense.*mixtral, qwen2_moe"):
        Routers(Backbone(tiny_model("llama"), "sdpa"))
    logits, chosen, weights = torch.zeros(1, 3, 4), torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, 2)
    assert [part.shape for part in _read((logits, weights, chosen), 0, "x")] == [(3, 4), (3, 2), (3, 2)]
    dense = torch.tensor([[0.0, 0.3, 0.0, 0.6]] * 3)
    assert _read((dense, logits), 1, "x")[1].tolist() == [[3, 1]] * 3, "Llama 4: a weight for every expert"
    for strange in (logits, (logits,), (logits, weights, weights, chosen), (logits, "none", chosen)):
        with pytest.raises(ModelError, match=r"the router of family 'jet' returns .* cannot be read with this version"):
            _read(strange, 0, "jet")


def test_the_sum_is_a_vector() -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(6, 10, generator=generator, dtype=torch.float64) for _ in range(2))
    cosine = nn.functional.cosine_similarity
    for alpha in (0.0, 0.37, 1.0, 4.0):
        dots = (WeightedBlocks(4, alpha)(one) * WeightedBlocks(4, alpha)(other)).sum(1)
        expected = cosine(one[:, :4], other[:, :4]) + alpha * cosine(one[:, 4:], other[:, 4:])
        torch.testing.assert_close(dots, expected, rtol=1e-12, atol=1e-12)


def test_the_standardizer_serves_every_method_or_is_refused() -> None:
    fitted = Standardizer(torch.arange(1.0, 7.0), torch.zeros(6))
    vectors = torch.ones(2, 6)
    assert moee_head("moee_concat", 1.0, (4, 2), fitted)(vectors).tolist() == [[1, 2, 3, 4, 5, 6]] * 2  # type: ignore[misc]
    assert moee_head("rw", 1.0, (4, 2), fitted)(vectors[:, :2]).tolist() == [[5, 6]] * 2  # type: ignore[misc]
    assert moee_head("rw", 1.0, (4, 2), None) is None
    with pytest.raises(ConfigError, match=r"has 4 dimensions; method rw needs one of 4 \+ 2"):
        moee_head("rw", 1.0, (4, 2), fitted.part(0, 4))


def test_mistakes() -> None:
    with pytest.raises(ConfigError, match=r"unknown embedding method 'moee_sun'\. Did you mean 'moee_sum'"):
        check_method("moee_sun", 1.0)
    for alpha in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="alpha: got"):
            check_method("moee_sum", alpha)
    with pytest.raises(DataError, match="one vector cannot be standardized by its batch"):
        standardize_batch(torch.ones(1, 3))


_DIMENSIONS = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "num_experts_per_tok": 2}
OTHERS: dict[str, tuple[Gate, dict[str, Any]]] = {
    "minimax_m2": (Gate.SIGMOID, {"num_local_experts": 4, "rotary_dim": 16}),
    "afmoe": (
        Gate.SIGMOID,
        {"num_experts": 4, "moe_intermediate_size": 32, "num_dense_layers": 1, "layer_types": ["full_attention"] * 2},
    ),
    "glm4_moe": (Gate.SIGMOID, {"n_routed_experts": 4, "moe_intermediate_size": 32, "first_k_dense_replace": 1}),
    "ernie4_5_moe": (Gate.SOFTMAX, {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32}),
    "hunyuan_v1_moe": (Gate.SOFTMAX, {"num_experts": 4, "moe_topk": 2}),
}
"""Families without a tiny model of ours. Routers of the first two take more than hidden states."""


@pytest.mark.parametrize("family", OTHERS)
def test_other_families_are_read(family: str) -> None:
    gate, own = OTHERS[family]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **_DIMENSIONS, **_HEADS, **own)).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
    routers = Routers(Backbone(model, "sdpa"))
    assert routers.gate is gate
    assert set(routers.sizes) == {4}
