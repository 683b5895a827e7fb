"""MONET: layers against the sum over every expert, routers that see one token at a time, and the model in transformers."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from unified_lm.config.schema import LoraConfig
from unified_lm.core.errors import ModelError
from unified_lm.models.architecture import check_architecture
from unified_lm.models.identity import identity_key
from unified_lm.models.lora import apply_lora
from unified_lm.models.monet import MonetConfig, MonetForCausalLM
from unified_lm.models.monet import experts as expert_layers
from unified_lm.models.monet.baselines import PeerExperts, SparseExperts
from unified_lm.models.monet.experts import HorizontalExperts, VerticalExperts
from unified_lm.models.monet.router import MonetRouter, score_moments
from unified_lm.models.routing import router_sizes
from unified_lm.models.tiny import tiny_model

KINDS = ("vertical", "horizontal")
KEYS, HALF, HIDDEN = 5, 2, 6


def make(kind: str, **changes: object) -> MonetConfig:
    values: dict[str, object] = {"hidden_size": HIDDEN, "num_attention_heads": 1, "moe_dim": 2 * HALF, "moe_heads": 2}
    values |= {"moe_experts": KEYS, "moe_topk": 2, "num_hidden_layers": 4, "vocab_size": 11, "moe_decompose": kind}
    return MonetConfig(**values | changes)


def layer_and_inputs(kind: str, tokens: int = 4) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    layer = {"vertical": VerticalExperts, "horizontal": HorizontalExperts}[kind](make(kind)).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    hidden = torch.randn(tokens, HIDDEN, dtype=torch.double, requires_grad=True)
    gates = torch.rand(tokens, 2, 2, KEYS, dtype=torch.double)  # of no particular sum
    return layer, hidden, (gates * (gates > 0.3)).requires_grad_()


def expert(layer: nn.Module, hidden: torch.Tensor, i: int, j: int) -> torch.Tensor:
    """One expert of many, spelled out."""

    def rows(linear: nn.Linear, key: int) -> torch.Tensor:
        size = linear.out_features // KEYS
        part = slice(key * size, (key + 1) * size)
        return (hidden @ linear.weight[part].T + linear.bias[part]).relu().square()

    def columns(linear: nn.Linear, key: int, values: torch.Tensor) -> torch.Tensor:
        size = linear.in_features // KEYS
        return values @ linear.weight[:, key * size : (key + 1) * size].T

    if isinstance(layer, HorizontalExperts):
        return columns(layer.v, j, rows(layer.u, i)) + layer.b[j]
    left, right = rows(layer.u1, i), rows(layer.u2, j)
    top = columns(layer.v11, i, left) + columns(layer.v12, i, right) + layer.b1[i]
    bottom = columns(layer.v21, j, left) + columns(layer.v22, j, right) + layer.b2[j]
    return torch.cat([top, bottom], dim=-1)


def every_expert(layer: nn.Module, hidden: torch.Tensor, gates: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    total = torch.zeros_like(hidden)
    for i in range(KEYS):
        for j in range(KEYS):
            weight = (gates[:, 0, :, i] * gates[:, 1, :, j]).sum(1) * keep[i, j]
            total = total + weight[:, None] * expert(layer, hidden, i, j)
    return total


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("fused", [True, False], ids=["by hand", "layer by layer"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_is_the_sum_over_its_experts(kind: str, fused: bool, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, hidden, gates = layer_and_inputs(kind, tokens=40)  # more than are masked at a time
    keep = torch.rand(KEYS, KEYS, generator=torch.Generator().manual_seed(1)) > 0.4 if masked else None
    if not fused:
        monkeypatch.setattr(expert_layers, "_are_plain", lambda linears: False)
    found = layer(hidden, gates, keep)
    expected = every_expert(layer, hidden, gates, torch.ones(KEYS, KEYS) if keep is None else keep)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    inputs = [hidden, gates, *layer.parameters()]
    probe = torch.randn(found.shape, dtype=torch.double, generator=torch.Generator().manual_seed(2))
    for one, other in zip(*(torch.autograd.grad((y * probe).sum(), inputs) for y in (found, expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_under_autocast_and_in_bfloat16(kind: str) -> None:
    layer, hidden, gates = layer_and_inputs(kind)
    layer, hidden, gates = layer.float(), hidden.float().detach().requires_grad_(), gates.float()
    exact = layer(hidden, gates)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(hidden, gates)
    output.float().sum().backward()
    assert output.dtype == torch.bfloat16
    assert hidden.grad is not None
    assert all(parameter.grad is not None and parameter.grad.dtype == torch.float32 for parameter in layer.parameters())
    half = layer.bfloat16()(hidden.bfloat16(), gates)
    for rounded in (output, half):
        assert float((rounded.float() - exact).norm().detach() / exact.norm().detach()) < 2e-2


def test_an_adapter_on_a_layer_of_experts_is_not_lost() -> None:
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    model = tiny_model("monet")
    adapted = get_peft_model(model, PeftConfig(target_modules=["u1", "v12"], init_lora_weights=False))
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        changed = adapted(ids).logits
        with adapted.disable_adapter():
            assert (adapted(ids).logits - changed).abs().max() > 1e-2
        torch.testing.assert_close(adapted.merge_and_unload()(ids).logits, changed, rtol=1e-4, atol=1e-4)


# --- routers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("selection", ["threshold", "topk"])
@torch.no_grad()
def test_a_router_chooses_keys_and_weighs_them_by_raw_scores(selection: str) -> None:
    router = MonetRouter(make("vertical", moe_experts=64, moe_topk=4, moe_selection=selection))
    hidden = torch.randn(500, HIDDEN, generator=torch.Generator().manual_seed(0))
    _, scores = router(hidden)
    router.observe(score_moments(scores), first=True)
    gates, _ = router(hidden)
    chosen = gates > 0
    torch.testing.assert_close(gates.sum(-1), torch.ones(500, 2, 2))
    counts = chosen.sum(-1).float()
    if selection == "topk":
        assert bool((counts == 4).all())
    else:
        assert float(counts.mean()) == pytest.approx(4, rel=0.15), "a sixteenth of the keys, on average"
        assert bool((counts >= 1).all())
        assert float(counts.std()) > 0
    expected = scores.masked_fill(~chosen, float("-inf")).softmax(-1)
    assert torch.equal(gates, expected)
    lowest = scores.masked_fill(~chosen, float("inf")).amin(-1)
    assert bool((scores.masked_fill(chosen, float("-inf")).amax(-1) <= lowest).all()), "the best keys"
    for number in (0, 499):
        assert torch.equal(router(hidden[number : number + 1])[0][0], gates[number]) or torch.allclose(
            router(hidden[number : number + 1])[0][0], gates[number], atol=1e-6
        ), "whatever else is in the batch"


@torch.no_grad()
def test_statistics_add_up_and_follow_batchnorm() -> None:
    router = MonetRouter(make("vertical"))
    parts = [torch.randn(rows, 2, 2, KEYS, generator=torch.Generator().manual_seed(rows)) for rows in (7, 3)]
    whole = torch.cat(parts)
    torch.testing.assert_close(sum(map(score_moments, parts)), score_moments(whole))
    stock = nn.BatchNorm1d(2)
    stock.train()(whole[:, 0].movedim(1, 2).reshape(-1, 2))  # the first side, a head a channel
    router.observe(score_moments(whole))
    torch.testing.assert_close(router.norm1.running_mean, stock.running_mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(router.norm1.running_var, stock.running_var, rtol=1e-5, atol=1e-6)


# --- the model -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [{"moe_decompose": kind} for kind in KINDS]
    + [{"moe_selection": "topk"}, {"feed_forward": "dense", "intermediate_size": 128}]
    + [{"feed_forward": "smoe", "num_experts": 4}, {"feed_forward": "peer", "num_experts": 64}],
    ids=str,
)
@torch.no_grad()
def test_cached_decoding_is_the_whole_forward(changes: dict) -> None:
    model = tiny_model("monet", **changes)
    ids = torch.arange(3, 15)[None]
    whole = model(ids).logits
    first = model(ids[:, :5], use_cache=True)
    logits = [first.logits]
    cache = first.past_key_values
    for position in range(5, 12):
        step = model(ids[:, position : position + 1], past_key_values=cache, use_cache=True)
        logits.append(step.logits)
    torch.testing.assert_close(torch.cat(logits, 1), whole, rtol=1e-4, atol=1e-4)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    together = torch.cat([torch.cat([torch.zeros(1, 3, dtype=torch.long), ids[:, :4]], 1), ids[:, :7]])
    mask = torch.ones_like(together)
    mask[0, :3] = 0
    for row, alone in zip(model.generate(together, attention_mask=mask, **options), (ids[:, :4], ids[:, :7]), strict=True):
        assert row[-4:].tolist() == model.generate(alone, **options)[0, -4:].tolist(), "in a padded batch as alone"


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_tokens_in_a_row_and_in_batches_are_the_same(kind: str) -> None:
    """M5: a server's layout without a batch dimension is that of a model with one."""
    model = tiny_model("monet", moe_decompose=kind)
    ids = torch.arange(3, 27).view(2, 12)
    together = model.model(ids, output_hidden_states=True)
    for row, alone in enumerate(ids):
        single = model.model(alone[None], output_hidden_states=True)
        for a, b in zip(together.hidden_states, single.hidden_states, strict=True):
            torch.testing.assert_close(a[row], b[0], rtol=1e-5, atol=1e-6)
    layer = model.model.layers[0]
    hidden = together.hidden_states[0]
    gates, scores = layer.router(hidden)
    flat_gates, flat_scores = layer.router(hidden.flatten(0, 1))
    torch.testing.assert_close(gates.flatten(0, 1), flat_gates)
    torch.testing.assert_close(scores.flatten(0, 1), flat_scores)


def test_checkpoints_load_through_auto_classes(tmp_path) -> None:
    model = tiny_model("monet", moe_masked=True)
    router = model.model.layers[0].router
    router.keep[1, 2] = False
    router.norm1.running_mean.fill_(0.3)
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).moe_experts == 16
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert isinstance(again, MonetForCausalLM)
    other = again.model.layers[0].router
    assert torch.equal(other.keep, router.keep)
    assert torch.equal(other.norm1.running_mean, router.norm1.running_mean)
    ids = torch.arange(3, 12)[None]
    torch.testing.assert_close(again(ids).logits, model(ids).logits)
    assert model.model.layers[1].router is None, "the second layer of a group"
    check_architecture(again.config, "monet", "x")


@torch.no_grad()
def test_experts_that_are_left_out_change_what_tokens_chose_them() -> None:
    model = tiny_model("monet", moe_masked=True)
    ids = torch.arange(3, 12)[None]
    whole = model(ids).logits
    torch.testing.assert_close(whole, tiny_model("monet")(ids).logits, rtol=1e-4, atol=1e-4)
    model.model.layers[0].router.keep[:8] = False
    assert (model(ids).logits - whole).abs().max() > 1e-3


PUBLISHED = {  # layers, hidden size, attention heads, channels, heads (arXiv:2412.04139, table 6), parameters by group size
    "850M": (24, 1536, 12, 12, 6, {4: 0.854}),
    "1.4B": (24, 2048, 16, 16, 8, {4: 1.465, 1: 1.767}),
    "4.1B": (32, 3072, 24, 24, 12, {4: 4.173}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_papers(name: str, kind: str) -> None:
    layers, hidden, attention, channels, heads, counts = PUBLISHED[name]
    for groups, billions in counts.items():
        values = {"num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": attention, "moe_dim": channels}
        config = MonetConfig(**values, moe_heads=heads, moe_groups=groups, moe_decompose=kind)
        with torch.device("meta"):
            model = MonetForCausalLM(config)
        assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e9, 3) == billions


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"moe_groups": 3}, r"moe_groups: got 3, which does not divide the 4 layers"),
        ({"moe_topk": KEYS}, r"moe_topk: got 5, expected less than moe_experts=5"),
        ({"moe_decompose": "diagonal"}, r"moe_decompose: got 'diagonal', expected one of vertical, horizontal"),
        ({"moe_dim": 3}, r"moe_dim: got 3, expected an even number"),
        ({"moe_heads": 0}, r"moe_heads: got 0, expected a whole number of at least 1"),
        ({"hidden_act": "silu"}, r"hidden_act: got 'silu', expected relu2"),
        ({"feed_forward": "peer", "num_experts": 24}, r"num_experts: got 24, expected a square number"),
        ({"feed_forward": "peer", "num_experts": 16, "moe_topk": 5}, r"moe_topk: got 5, expected at most 4"),
        ({"feed_forward": "smoe", "num_experts": 2, "num_experts_per_tok": 3}, r"expected at most num_experts=2"),
    ],
)
def test_configurations_that_make_no_sense_are_refused(changes: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make("vertical", **changes)


def test_unfamiliar_weights_are_refused(tmp_path) -> None:
    from unified_lm.config.schema import ModelConfig
    from unified_lm.models.loading import load_model
    from unified_lm.models.tiny import tiny_tokenizer

    model = tiny_model("monet")
    state = model.state_dict()
    state["model.layers.0.moe.u3.weight"] = state.pop("model.layers.0.moe.u1.weight")
    model.save_pretrained(tmp_path, state_dict=state)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"missing from the checkpoint.*moe\.u1\.weight.*but not in the model"):
        load_model(ModelConfig(name=str(tmp_path), family="monet", dtype="float32"))


def test_statistics_stay_exact_in_bfloat16(tmp_path) -> None:
    """A tenth of a small change would be lost."""
    model = tiny_model("monet")
    model.model.layers[0].router.norm1.running_var.fill_(0.123456)
    model.save_pretrained(tmp_path)
    router = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).model.layers[0].router
    assert router.w1.weight.dtype == torch.bfloat16
    assert router.norm1.running_var.dtype == torch.float32
    assert float(router.norm1.running_var[0]) == pytest.approx(0.123456)


def test_sizes_of_routers_with_adapters() -> None:
    model = tiny_model("monet")
    before = router_sizes(model)
    apply_lora(model, LoraConfig(r=4, target_modules=("w1", "w2")), 0)
    assert router_sizes(model) == before == [2 * 2 * 16]


def test_a_model_is_known_by_its_statistics_and_its_mask() -> None:
    model = tiny_model("monet", moe_masked=True)
    keys = {identity_key(model)}
    model.model.layers[0].router.keep[0, 0] = False
    keys.add(identity_key(model))
    model.model.layers[0].router.norm1.running_mean.add_(0.1)
    assert len(keys | {identity_key(model)}) == 3


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("kind", KINDS)
def test_frozen_matrices_have_no_gradient_and_others_the_same(kind: str, trained: bool) -> None:
    layer, hidden, gates = layer_and_inputs(kind)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(trained or name.startswith("u"))
    layer(hidden, gates).square().sum().backward()
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in layer.parameters())
    reference, states, weights = layer_and_inputs(kind)
    reference(states, weights).square().sum().backward()
    for one, other in ((hidden, states), (gates, weights)):
        torch.testing.assert_close(one.grad, other.grad)


# --- baselines -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_sparse_experts_are_the_weighed_sum_of_the_chosen() -> None:
    torch.manual_seed(0)
    layer = SparseExperts(make("vertical", feed_forward="smoe", num_experts=7, num_experts_per_tok=3))
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    hidden = torch.randn(9, HIDDEN)
    expected = torch.zeros_like(hidden)
    for row, state in enumerate(hidden):
        best = (layer.router.weight @ state).topk(3)
        for weight, number in zip(best.values.softmax(0), best.indices, strict=True):
            expected[row] += weight * layer.experts.down[number] @ (layer.experts.up[number] @ state).relu().square()
    torch.testing.assert_close(layer(hidden), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_product_keys_find_the_best_experts_of_all() -> None:
    torch.manual_seed(0)
    layer = PeerExperts(make("vertical", feed_forward="peer", num_experts=49, moe_topk=3))
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    hidden = torch.randn(9, HIDDEN)
    left, right = (scores(half).view(9, 2, 7) for scores, half in zip((layer.w1, layer.w2), hidden.chunk(2, -1), strict=True))
    every = (left[..., :, None] + right[..., None, :]).flatten(-2)
    best = every.topk(3)
    weights, chosen = layer.route(hidden)
    assert torch.equal(chosen.sort(-1).values, best.indices.sort(-1).values)
    torch.testing.assert_close(weights, best.values.softmax(-1))
    expected = torch.zeros_like(hidden)
    for row, state in enumerate(hidden):
        for weight, number in zip(weights[row].flatten(), chosen[row].flatten(), strict=True):
            expected[row] += weight * layer.down.weight[number] * (layer.up.weight[number] @ state).relu().square()
    torch.testing.assert_close(layer(hidden), expected, rtol=1e-4, atol=1e-4)
