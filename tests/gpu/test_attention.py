"""Laws 1 and 2 on CUDA: the kernels that only run there, against the dense definition and against stock transformers."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from tests.models.test_attention import dense
from tests.models.test_families import CAUSAL, LENGTHS, MIXED, PACKED, WHOLE, by_sample, name, samples, stock_alone
from unified_lm.batch import AttentionMode, AttentionPlan, make_pack
from unified_lm.core.errors import ModelError
from unified_lm.models.attention import KERNELS as ALL_KERNELS
from unified_lm.models.attention import AttentionKernel, AutoKernel, Heads
from unified_lm.models.attention.flash import find_varlen, torch_varlen
from unified_lm.models.backbone import Backbone
from unified_lm.models.probe import probe_attention
from unified_lm.models.tiny import tiny_model

pytestmark = pytest.mark.gpu

PACK_LENGTHS = (7, 1, 20, 3, 130, 333, 12, 257, 64)
PACK_SPANS = ((0, 0), (0, 0), (0, 20), (0, 3), (0, 130), (0, 333), (0, 0), (0, 0), (0, 64))
WITH_PARTIAL = ((0, 0), (0, 0), (0, 20), (1, 3), (4, 90), (0, 333), (0, 5), (0, 200), (0, 0))
HALF_ERROR = 1e-2
"""Relative to the norm: what bfloat16 operands cost."""
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one head per key": {"num_kv": 6},
    "wide heads": {"size": 128, "value_size": 128},
    "window": {"sliding_window": 9},
    "wide window": {"sliding_window": 200},
    "softcap": {"softcap": 3.0},
    "narrow values": {"size": 192, "value_size": 128},
    "sinks": {"sinks_H": torch.linspace(-2, 2, 6)},
}
MODELS = [(family, values) for family, values in PACKED if family != "gpt_oss"]


def draw(
    spans: Any, dtype: torch.dtype, num_kv: int = 2, size: int = 64, value_size: int = 64, **options: Any
) -> tuple[Heads, Heads]:
    """The same problem on the CPU in float32, from values that the narrower type can hold, and on the GPU."""
    random = torch.Generator().manual_seed(7)
    plan = AttentionPlan.build(PACK_LENGTHS, spans)

    def values(heads: int, width: int) -> torch.Tensor:
        return torch.randn(plan.num_tokens, heads, width, generator=random).to(dtype)

    q, k, v = values(6, size), values(num_kv, size), values(num_kv, value_size)
    options.setdefault("scaling", size**-0.5)
    wide = Heads(*(x.float().requires_grad_() for x in (q, k, v)), plan, **options)
    if options.get("sinks_H") is not None:
        options["sinks_H"] = options["sinks_H"].cuda()
    narrow = Heads(*(x.cuda().requires_grad_() for x in (q, k, v)), plan.to(torch.device("cuda")), **options)
    return wide, narrow


def relative(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((mine.detach().cpu().double() - theirs.detach().double()).norm() / theirs.detach().double().norm())


def errors(kernel: AttentionKernel, wide: Heads, narrow: Heads) -> dict[str, float]:
    """Relative errors of the output and of the three gradients."""
    expected, got = dense(wide), kernel(narrow)
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    leaves = ("q_THd", "k_TKd", "v_TKe")
    theirs = torch.autograd.grad(expected, [getattr(wide, leaf) for leaf in leaves], grad)
    mine = torch.autograd.grad(got, [getattr(narrow, leaf) for leaf in leaves], grad.to(got))
    return {"output": relative(got, expected)} | {
        f"gradient of {leaf[0]}": relative(a, b) for leaf, a, b in zip(leaves, mine, theirs, strict=True)
    }


KERNELS = ("flash", "flex", "sdpa")


@cache
def kernel_of(name: str) -> AttentionKernel:
    """One of each: what flex has compiled is kept."""
    return ALL_KERNELS[name]()


def serves(kernel: str, feature: str, partial: bool) -> bool:
    """Whether a kernel takes a problem; what it refuses is tested by name on the CPU."""
    if kernel != "flash":
        return True
    uncapped = feature == "softcap" and find_varlen() is torch_varlen
    return not (feature == "sinks" or uncapped or (partial and "window" in feature))


@pytest.mark.parametrize("partial", [False, True], ids=["whole", "partial"])
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_values_and_gradients_are_those_of_the_definition(kernel: str, feature: str, partial: bool) -> None:
    if not serves(kernel, feature, partial):
        with pytest.raises(ModelError):
            kernel_of(kernel)(draw(WITH_PARTIAL if partial else PACK_SPANS, torch.bfloat16, **FEATURES[feature])[1])
        return
    wide, narrow = draw(WITH_PARTIAL if partial else PACK_SPANS, torch.bfloat16, **FEATURES[feature])
    found = errors(kernel_of(kernel), wide, narrow)
    assert all(error < HALF_ERROR for error in found.values()), found


@pytest.mark.parametrize("kernel", ["flex", "sdpa"])
def test_float32_is_exact(kernel: str) -> None:
    wide, narrow = draw(WITH_PARTIAL, torch.float32)
    found = errors(kernel_of(kernel), wide, narrow)
    assert all(error < 1e-5 for error in found.values()), found


def test_the_comparison_can_fail() -> None:
    wide, narrow = draw(PACK_SPANS, torch.bfloat16)
    causal = replace(wide, plan=AttentionPlan.build(PACK_LENGTHS, [(0, 0)] * len(PACK_LENGTHS)))
    assert errors(kernel_of("flash"), causal, narrow)["output"] > 0.1


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_bit_of_another_sample_matters(kernel: str) -> None:
    """Not a tolerance: with other values in every other sequence, a sequence's output is the same."""
    _, narrow = draw(PACK_SPANS, torch.bfloat16)
    offsets, index = narrow.plan.offsets, 5
    own = slice(offsets[index], offsets[index + 1])
    other = {}
    for leaf in ("q_THd", "k_TKd", "v_TKe"):
        value = torch.randn_like(getattr(narrow, leaf))
        value[own] = getattr(narrow, leaf)[own]
        other[leaf] = value
    with torch.no_grad():
        assert torch.equal(kernel_of(kernel)(narrow)[own], kernel_of(kernel)(replace(narrow, **other))[own])


def test_auto_takes_the_fast_kernels() -> None:
    _, whole = draw(PACK_SPANS, torch.bfloat16)
    _, partial = draw(WITH_PARTIAL, torch.bfloat16)
    _, single = draw(PACK_SPANS, torch.float32)
    sinks = replace(whole, sinks_H=torch.zeros(6, device="cuda"))
    assert [AutoKernel.choose(heads) for heads in (whole, partial, sinks, single)] == ["flash", "flex", "flex", "sdpa"]
    assert {run.mode for run in partial.plan.runs} >= {AttentionMode.SPAN}


@pytest.mark.parametrize(("family", "values"), MODELS, ids=name)
@torch.no_grad()
def test_law_2_every_family_in_float32(family: str, values: dict[str, Any]) -> None:
    model = tiny_model(family, **values)
    if family == "gemma2":
        model.set_attn_implementation("eager")  # stock sdpa of transformers before 5.23 leaves its score cap out
    expected = {
        (sample.input_ids.tobytes(), causal): stock_alone(model, sample, causal)
        for causal, spans in ((True, CAUSAL), (False, WHOLE))
        for sample in samples(spans)
    }
    model.cuda()
    for kernel in ("sdpa", "reference", "flex"):
        backbone = Backbone(model, kernel_of(kernel))
        for spans in (CAUSAL, WHOLE, MIXED):
            pack = make_pack(samples(spans)).to(torch.device("cuda"))
            got = by_sample(pack, backbone(pack).cpu())
            for sample in pack.samples:
                if sample.bidirectional not in ((0, 0), (0, len(sample))):
                    continue
                theirs = expected[sample.input_ids.tobytes(), sample.bidirectional == (0, 0)]
                mine, where = got[sample.input_ids.tobytes()], f"{backbone.kernel}, {len(sample)} tokens"
                torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4, msg=lambda text, where=where: f"{where}: {text}")


@pytest.mark.parametrize("kernel", ["auto", "flash", "flex", "sdpa"])
@pytest.mark.parametrize(("family", "values"), MODELS, ids=name)
def test_law_1_the_probe_finds_no_leak_in_bfloat16(family: str, values: dict[str, Any], kernel: str) -> None:
    if kernel == "flash" and family == "gemma2" and find_varlen() is torch_varlen:
        pytest.skip("score caps need flash-attn; refused by name")
    model = tiny_model(family, **values, dtype=torch.bfloat16).cuda()
    windowed = bool(values) or family in ("gemma2", "gemma3_text")
    probe_attention(Backbone(model, kernel), partial_spans=not (kernel == "flash" and windowed))


@pytest.mark.parametrize("kernel", ["flash", "flex", "sdpa"])
@torch.no_grad()
def test_law_2_in_bfloat16_a_pack_is_as_close_to_float32_as_a_sample_alone(kernel: str) -> None:
    """The rounding of a kernel in a pack is that of stock attention on one sample, not more."""
    model = tiny_model("llama", hidden_size=256, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=4)
    packs = make_pack(samples({i: (0, n) if i % 2 else (0, 0) for i, n in enumerate(LENGTHS)}))
    exact = by_sample(packs, Backbone(model, "reference")(packs))
    model.to("cuda", torch.bfloat16)
    got = by_sample(packs, Backbone(model, kernel)(packs.to(torch.device("cuda"))).float().cpu())
    alone = {}
    for sample in packs.samples:
        pack = make_pack([sample]).to(torch.device("cuda"))
        alone[sample.input_ids.tobytes()] = Backbone(model, "reference")(pack).float().cpu()
    ours = sum(float((got[key] - exact[key]).square().sum()) for key in exact)
    theirs = sum(float((alone[key] - exact[key]).square().sum()) for key in exact)
    assert ours < 2 * theirs


def test_the_number_of_packs_of_flex_does_not_grow_the_number_of_compilations() -> None:
    """Every pack has another length; a compilation for each would make training crawl."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    kernel = kernel_of("flex")
    random = torch.Generator().manual_seed(0)
    seen = []
    for _ in range(8):
        lengths = torch.randint(20, 300, (9,), generator=random).tolist()
        plan = AttentionPlan.build(lengths, [(0, 0)] * 5 + [(0, n // 2) for n in lengths[5:]]).to(torch.device("cuda"))
        q, k, v = (torch.randn(plan.num_tokens, h, 64, device="cuda", dtype=torch.bfloat16) for h in (6, 2, 2))
        kernel(Heads(q.requires_grad_(), k, v, plan, scaling=0.1)).sum().backward()
        seen.append(counters["stats"]["unique_graphs"])
    assert seen[-1] == seen[2], seen
