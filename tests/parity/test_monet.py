"""M1 to M4, M6 and M9: MONET's router, its layers with and without a mask, a whole model, and its two terms.

M5 (without a batch dimension), M7 (cached decoding) and M8 (parameter counts) need no tensors: tests/models/test_monet.py. M10
(statistics by matrix products) is in tests/evaluation/experts/test_experts.py.
"""

import pytest
import torch

from tests.parity.parity_case import Case
from unified_lm.models.monet import MonetConfig, MonetForCausalLM
from unified_lm.models.monet.experts import HorizontalExperts, VerticalExperts
from unified_lm.models.monet.router import MonetRouter, mean_and_variance, score_moments
from unified_lm.objectives.routing_spread import ambiguity, uniformity

LAYERS = {"horizontal": HorizontalExperts, "vertical": VerticalExperts}


def config(hidden: int, heads: int, keys: int, **values: object) -> MonetConfig:
    small = {"num_attention_heads": 1, "num_hidden_layers": 4, "moe_topk": 2}
    return MonetConfig(hidden_size=hidden, moe_heads=heads, moe_experts=keys, **small | values)


def both(case: Case, name: str) -> torch.Tensor:
    """The two sides as this project stacks them, `[..., 2, H, E]`."""
    return torch.stack([case[f"{name}1"], case[f"{name}2"]], dim=-3)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_m1_router(shared_dir, mode):
    case = Case(shared_dir, f"M1_router_{mode}")
    router = MonetRouter(config(16, 3, 8))
    for side in (1, 2):
        norm = getattr(router, f"norm{side}")
        getattr(router, f"w{side}").weight.data = case[f"weight/W{side}"].flatten(0, 1)
        norm.running_mean.copy_(case[f"input/running_mean{side}"])
        norm.running_var.copy_(case[f"input/running_var{side}"])
    gates, scores = router(case["input/x"])
    moments = score_moments(scores)
    if mode == "train":  # the published code normalizes by the batch, and then moves its statistics
        gates = router.gates(scores, mean_and_variance(moments))
        router.observe(moments)
        for side in (1, 2):
            norm = getattr(router, f"norm{side}")
            case.check(norm.running_mean, f"running_mean{side}_after")
            case.check(norm.running_var, f"running_var{side}_after")
    for side in (1, 2):
        case.check(scores[..., side - 1, :, :], f"z{side}")
        case.check(gates[..., side - 1, :, :], f"g{side}")
        assert torch.equal((gates[..., side - 1, :, :] > 0).sum(-1), case[f"output/active{side}"])


def layer_of(case: Case, kind: str) -> torch.nn.Module:
    layer = LAYERS[kind](config(16, 3, 8, moe_dim=4, moe_decompose=kind)).double()
    names = {"u": "U", "b": "b2"} if kind == "horizontal" else {"u1": "U1", "u2": "U2", "b1": "b12", "b2": "b22"}
    biases = {"u": "b1"} if kind == "horizontal" else {"u1": "b11", "u2": "b21"}
    for name, parameter in layer.named_parameters():
        part, _, what = name.partition(".")
        if what == "bias":
            value = case[f"weight/{biases[part]}"].flatten()
        elif part.startswith("v"):  # an expert's matrix [E, D, m], side by side: [D, E m]
            value = case[f"weight/{part.upper()}"].movedim(0, 1).flatten(1)
        else:
            value = case[f"weight/{names[part]}"]
            value = value.flatten(0, 1) if what else value
        parameter.data = value
    return layer


@pytest.mark.parametrize("kind", LAYERS)
def test_m2_and_m3_layers(shared_dir, kind):
    case = Case(shared_dir, {"horizontal": "M2_horizontal", "vertical": "M3_vertical"}[kind])
    gates = both(case, "input/g").flatten(0, 1)
    case.check(layer_of(case, kind)(case["input/x"].flatten(0, 1), gates).view(2, 5, 16), "y")


@pytest.mark.parametrize("kind", LAYERS)
def test_m4_experts_left_out(shared_dir, kind):
    case = Case(shared_dir, f"M4_masked_{kind}")
    layer, hidden, gates = layer_of(case, kind), case["input/x"].flatten(0, 1), both(case, "input/g").flatten(0, 1)
    case.check(layer(hidden, gates, case["input/keep_mask"].bool()).view(2, 5, 16), "y_masked")
    case.check(layer(hidden, gates, torch.ones(8, 8, dtype=torch.bool)).view(2, 5, 16), "y_unmasked")


@pytest.mark.parametrize("kind", LAYERS)
@torch.no_grad()
def test_m6_the_published_layout_of_a_model(shared_dir, kind):
    case = Case(shared_dir, f"M6_tiny_model_{kind}")
    values = {key: value for key, value in case.params["hf_config"].items() if key != "model_type"}
    model = MonetForCausalLM(MonetConfig(**values)).eval()
    model.load_state_dict(case.weights())
    ids, mask = case["input/input_ids"], case["input/attention_mask"]
    output = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100), output_router_logits=True)
    real = mask.bool()
    tolerance = case.entry["tolerance"]["default"]["float32"]
    torch.testing.assert_close(output.logits[real], case["output/logits"][real], **tolerance)
    case.check(output.loss, "loss")
    routers = [module for module in model.modules() if isinstance(module, MonetRouter)]
    assert len(routers) == len(output.router_logits) == 2
    for number, (router, scores) in enumerate(zip(routers, output.router_logits, strict=True)):
        gates = router.gates(scores)
        for side in (1, 2):
            expected = case[f"output/router/{2 * number}/g{side}"]
            torch.testing.assert_close(gates[..., side - 1, :, :][real], expected[real], **tolerance)


@pytest.mark.parametrize("name", ["random", "uniform", "onehot_balanced"])
def test_m9_uniformity_and_ambiguity(shared_dir, name):
    case = Case(shared_dir, "M9_losses")
    gates = both(case, f"input/{name}/g").requires_grad_()
    even, clear = uniformity(gates.mean((0, 1))), ambiguity(gates).mean()
    case.check(even, f"{name}/uniformity")
    case.check(clear, f"{name}/ambiguity")
    if name == "random":
        for loss, what in ((even, "uniformity"), (clear, "ambiguity")):
            (gradient,) = torch.autograd.grad(loss, gates)
            for side in (1, 2):
                case.check(gradient[..., side - 1, :, :], f"{name}/grad_{what}_g{side}")
