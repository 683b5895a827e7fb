"""A mixture made of a dense model computes what its parent did, until its experts are made to differ."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel

from unified_lm.core.errors import ConfigError, ModelError
from unified_lm.models.backbone import Backbone
from unified_lm.models.routing import Gate, Routers
from unified_lm.models.tiny import tiny_model
from unified_lm.models.upcycle import TARGETS, UpcycleSettings, upcycle

PLAIN = UpcycleSettings(experts=4, top_k=2)
IDS = torch.arange(3, 40)[None]


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", TARGETS)
def test_copies_compute_what_the_dense_model_did(family: str, tied: bool) -> None:
    dense = tiny_model(family, tie_word_embeddings=tied)
    sparse = upcycle(dense, PLAIN)
    assert sparse.config.model_type == TARGETS[family]
    torch.testing.assert_close(logits(sparse), logits(dense), rtol=1e-4, atol=1e-5)
    assert sparse.config.tie_word_embeddings is tied
    own = {weight.data_ptr() for weight in dense.parameters()}
    assert not own & {weight.data_ptr() for weight in sparse.parameters()}, "nothing is shared"
    routers = Routers(Backbone(sparse, "sdpa"))
    assert routers.gate is Gate.SOFTMAX
    assert routers.sizes == (4, 4)


def test_a_window_and_scaled_positions_are_kept() -> None:
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}
    dense = tiny_model("mistral", sliding_window=5, rope_parameters=scaled)
    torch.testing.assert_close(logits(upcycle(dense, PLAIN)), logits(dense), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_keep_their_type(dtype: torch.dtype) -> None:
    sparse = upcycle(tiny_model("llama", dtype=dtype), replace(PLAIN, noise=0.1, drop=0.5))
    assert {weight.dtype for weight in sparse.parameters()} == {dtype}
    assert torch.get_default_dtype() is torch.float32


def test_parts_of_a_network_add_up_to_it() -> None:
    dense = tiny_model("llama")
    sparse = upcycle(dense, UpcycleSettings(experts=4, top_k=4, parts=4))
    for layer in sparse.model.layers:
        layer.mlp.gate.weight.data.zero_()  # so that each part has the same weight
    assert sparse.model.layers[0].mlp.experts.gate_up_proj.shape == (4, 2 * 32, 64)
    torch.testing.assert_close(logits(sparse), logits(dense), rtol=1e-4, atol=1e-5)


def test_a_share_of_each_experts_channels_is_drawn_anew() -> None:
    dense = tiny_model("llama")
    sparse = upcycle(dense, replace(PLAIN, drop=0.25))
    experts, network = sparse.model.layers[0].mlp.experts, dense.model.layers[0].mlp
    gate, up = experts.gate_up_proj.data.chunk(2, dim=1)
    changed = {
        "gate": (gate != network.gate_proj.weight).any(2),
        "up": (up != network.up_proj.weight).any(2),
        "down": (experts.down_proj.data != network.down_proj.weight).any(1),
    }
    assert torch.equal(changed["gate"], changed["up"])
    assert torch.equal(changed["gate"], changed["down"])
    assert changed["gate"].sum(1).tolist() == [32] * 4, "a quarter of 128"
    assert not torch.equal(changed["gate"][0], changed["gate"][1]), "each expert its own"
    assert gate[changed["gate"]].std() == pytest.approx(float(network.gate_proj.weight.data.std()), rel=0.1)
    other = (
        sparse.model.layers[1].mlp.experts.gate_up_proj.data != upcycle(dense, PLAIN).model.layers[1].mlp.experts.gate_up_proj
    )
    assert not torch.equal(other.any(2)[0, :128], changed["gate"][0]), "each layer its own"


def test_noise_is_relative_and_the_seed_decides() -> None:
    dense = tiny_model("llama")
    settings = replace(PLAIN, noise=0.1)
    one, again, other = (upcycle(dense, replace(settings, seed=seed)).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], again[name]) for name in one)
    name = "model.layers.0.mlp.experts.down_proj"
    assert not torch.equal(one[name], other[name])
    weight = dense.model.layers[0].mlp.down_proj.weight.data
    assert (one[name] - weight).std() == pytest.approx(0.1 * float(weight.std()), rel=0.05)


def test_routers_are_as_uneven_as_asked_and_the_parents_outputs_stay() -> None:
    dense = tiny_model("llama")
    wide = upcycle(dense, replace(PLAIN, router_std=0.5))
    for layer in wide.model.layers:
        assert float(layer.mlp.gate.weight.detach().std()) == pytest.approx(0.5, rel=0.2)
    torch.testing.assert_close(logits(wide), logits(dense), rtol=1e-4, atol=1e-5)


def test_what_cannot_be_made_is_refused() -> None:
    with pytest.raises(ModelError, match=r"family 'gpt2' cannot be upcycled: expected llama, mistral, qwen3"):
        upcycle(tiny_model("gpt2"), PLAIN)
    with pytest.raises(ModelError, match=r"has biases \(attention_bias\), and 'mixtral' has none"):
        upcycle(tiny_model("llama", attention_bias=True), PLAIN)
    for changes, said in [
        ({"experts": 1}, "experts: got 1"),
        ({"experts": 10**12}, "experts: got 1000000000000, expected at most 4096"),
        ({"top_k": 5}, "top_k: got 5, expected 1 to 4"),
        ({"parts": 3}, r"expected a multiple of parts \(3\)"),
        ({"experts": 5, "parts": 5}, "parts: got 5, which does not divide the 128 hidden channels"),
        ({"drop": 1.0}, r"drop: got 1\.0"),
        ({"noise": -1.0}, "noise: got -1"),
        ({"router_std": -1.0}, "router_std: got -1"),
    ]:
        with pytest.raises(ConfigError, match=said):
            upcycle(tiny_model("llama"), replace(PLAIN, **changes))
