"""Kernels against the dense definition: masks, features, gradients, dropout, refusals."""

import math
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from unified_lm.batch import AttentionPlan, Block
from unified_lm.batch.plan import sequence_mask
from unified_lm.core.errors import ModelError
from unified_lm.core.random import RngState
from unified_lm.models.attention import (
    ATTENTION_NAME,
    KERNELS,
    AutoKernel,
    FlashKernel,
    FlexKernel,
    Heads,
    ReferenceKernel,
    SdpaKernel,
    packed_attention,
)
from unified_lm.models.attention.flash import installed_varlen, torch_varlen
from unified_lm.models.attention.grouped import LENGTH_MULTIPLE, group_by_length

LENGTHS = (7, 1, 20, 3, 20, 33, 12, 5)
SPANS = ((0, 0), (0, 0), (0, 0), (1, 3), (4, 15), (0, 20), (0, 12), (0, 5))
BLOCKS = AttentionPlan.build(
    [9, 20, 6, 15, 31, 4],
    [(0, 0), (0, 20), (0, 0), (0, 0), (0, 0), (0, 0)],
    blocks=[
        (),
        (),
        (Block(0, 4),),
        (Block(2, 6, bidirectional=True), Block(6, 11, bidirectional=True)),
        (Block(0, 8, bidirectional=True), Block(8, 13), Block(20, 25, bidirectional=True)),
        (Block(0, 4, bidirectional=True),),
    ],
)
"""Blocks at the start, next to each other, apart, at the end, both kinds in one sequence, and nothing else."""
KEEP_FIRST = AttentionPlan.build([7, 20, 33, 5, 2, 1, 20], [(1, 7), (1, 20), (0, 33), (1, 5), (1, 2), (0, 0), (1, 20)])
KEEP_FIRST_BLOCKS = AttentionPlan.build(
    [20, 31, 4],
    [(0, 0)] * 3,
    blocks=[
        (Block(0, 6, bidirectional=True, keep_first=True), Block(6, 7, bidirectional=True, keep_first=True)),
        (Block(2, 19, bidirectional=True, keep_first=True), Block(19, 23), Block(23, 31, bidirectional=True)),
        (Block(0, 4, bidirectional=True, keep_first=True),),
    ],
)
EXACT = {"rtol": 1e-5, "atol": 1e-5}


def varlen_on_cpu(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
) -> torch.Tensor:
    """What `flash_attn_varlen_func` documents, written plainly: masks align to the bottom right, windows are inclusive."""
    assert q.shape[-1] == v.shape[-1]
    outputs = []
    for index in range(len(cu_seqlens_q) - 1):
        part_q = q[cu_seqlens_q[index] : cu_seqlens_q[index + 1]]
        part_k, part_v = (x[cu_seqlens_k[index] : cu_seqlens_k[index + 1]] for x in (k, v))
        assert len(part_q) <= max_seqlen_q
        assert len(part_k) <= max_seqlen_k
        share = q.shape[1] // k.shape[1]
        scores = torch.einsum("qhd,khd->hqk", part_q, part_k.repeat_interleave(share, 1)) * softmax_scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        row = torch.arange(len(part_q))[:, None] + len(part_k) - len(part_q)
        distance = row - torch.arange(len(part_k))
        left, right = window_size
        right = 0 if causal else right
        hidden = torch.zeros_like(distance, dtype=torch.bool)
        if left >= 0:
            hidden |= distance > left
        if right >= 0:
            hidden |= -distance > right
        weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
        weights = functional.dropout(weights, dropout_p)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, part_v.repeat_interleave(share, 1)))
    return torch.cat(outputs)


def dense(heads: Heads) -> torch.Tensor:
    """The definition over the whole pack at once, from the plan's dense mask."""
    share = heads.q_THd.shape[1] // heads.k_TKd.shape[1]
    k, v = heads.k_TKd.repeat_interleave(share, 1), heads.v_TKe.repeat_interleave(share, 1)
    scores = torch.einsum("qhd,khd->hqk", heads.q_THd, k) * heads.scaling
    if heads.softcap:
        scores = heads.softcap * torch.tanh(scores / heads.softcap)
    weights = scores.masked_fill(~heads.plan.dense_mask(heads.sliding_window), -math.inf).exp()
    total = weights.sum(-1, keepdim=True)
    if heads.sinks_H is not None:
        total = total + heads.sinks_H.exp()[:, None, None]
    return torch.einsum("hqk,khd->qhd", weights / total, v)


def make_heads(
    num_heads: int = 6, num_kv: int = 2, size: int = 8, value_size: int = 8, dtype: torch.dtype = torch.float32, **kwargs: Any
) -> Heads:
    generator = torch.Generator().manual_seed(7)
    plan = kwargs.pop("plan", None) or AttentionPlan.build(LENGTHS, SPANS)
    total = plan.num_tokens

    def draw(heads: int, width: int) -> torch.Tensor:
        # transformers hands over [1, heads, tokens, width] views of [1, tokens, heads, width]
        return torch.randn(total, heads, width, generator=generator).to(dtype).requires_grad_()

    q, k, v = draw(num_heads, size), draw(num_kv, size), draw(num_kv, value_size)
    return Heads(q, k, v, plan, scaling=kwargs.pop("scaling", 0.5), **kwargs)


CPU_KERNELS = {
    "sdpa": SdpaKernel(),
    "sdpa, nothing grouped": SdpaKernel(longest_grouped=0),
    "sdpa, short ones grouped": SdpaKernel(longest_grouped=12),
    "flash": FlashKernel(varlen_on_cpu),
    "reference": ReferenceKernel(),
}
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one head per key": {"num_kv": 6},
    "window": {"sliding_window": 4},
    "wide window": {"sliding_window": 64},
    "softcap": {"softcap": 3.0},
    "narrow values": {"value_size": 4},
    "sinks": {"sinks_H": torch.linspace(-2, 2, 6)},
    "blocks": {"plan": BLOCKS},
    "blocks and a window": {"plan": BLOCKS, "sliding_window": 4},
    "first alone": {"plan": KEEP_FIRST},
    "first alone, a window": {"plan": KEEP_FIRST, "sliding_window": 4},
    "first alone, narrow values": {"plan": KEEP_FIRST, "value_size": 4},
    "first alone, sinks": {"plan": KEEP_FIRST, "sinks_H": torch.linspace(-2, 2, 6)},
    "first alone in blocks": {"plan": KEEP_FIRST_BLOCKS},
    "first alone in blocks, a window": {"plan": KEEP_FIRST_BLOCKS, "sliding_window": 4},
}


REFUSED_BY_FLASH = ("sinks", "first alone, sinks", "first alone, a window", "first alone in blocks, a window")


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("kernel", CPU_KERNELS)
def test_values_and_gradients_are_those_of_the_definition(kernel: str, feature: str) -> None:
    heads = make_heads(**FEATURES[feature])
    if kernel == "flash" and feature == "window":
        whole = [(0, n) if (0, n) == span else (0, 0) for n, span in zip(LENGTHS, SPANS, strict=True)]
        heads = replace(heads, plan=AttentionPlan.build(LENGTHS, whole))
    if kernel == "flash" and feature in REFUSED_BY_FLASH:
        with pytest.raises(ModelError, match=r"Use model\.attention_kernel=flex"):
            CPU_KERNELS[kernel](heads)
        return
    expected = dense(heads)
    got = CPU_KERNELS[kernel](heads)
    torch.testing.assert_close(got, expected, **EXACT)
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    leaves = (heads.q_THd, heads.k_TKd, heads.v_TKe)
    for name, mine, theirs in zip(
        "qkv", torch.autograd.grad(got, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True
    ):
        torch.testing.assert_close(mine, theirs, **EXACT, msg=lambda text, name=name: f"gradient of {name}: {text}")


@pytest.mark.parametrize("feature", FEATURES)
def test_flex_agrees_without_gradients(feature: str) -> None:
    heads = make_heads(**FEATURES[feature])
    with torch.no_grad():
        torch.testing.assert_close(FlexKernel()(heads), dense(heads), **EXACT)


def test_the_comparison_can_fail() -> None:
    heads = make_heads()
    causal = replace(heads, plan=AttentionPlan.build(LENGTHS, [(0, 0)] * len(LENGTHS)))
    assert (SdpaKernel()(heads) - dense(causal)).abs().max() > 0.1


@pytest.mark.parametrize("window", [None, 3])
def test_layers_share_one_layout_per_pack(window: int | None) -> None:
    heads = make_heads(sliding_window=window)
    SdpaKernel()(heads)
    made = len(heads.plan.kernel_cache)
    SdpaKernel()(heads)
    assert len(heads.plan.kernel_cache) == made > 0
    assert not heads.plan.to(torch.device("cpu")).kernel_cache


def test_a_window_differs_by_one_between_the_two_directions() -> None:
    causal, whole = sequence_mask(9, (0, 0), 3), sequence_mask(9, (0, 9), 3)
    assert causal[5].nonzero().flatten().tolist() == [3, 4, 5]
    assert whole[5].nonzero().flatten().tolist() == [2, 3, 4, 5, 6, 7, 8]
    partial = sequence_mask(9, (4, 9), 3)
    assert partial[5].nonzero().flatten().tolist() == [3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_stay_close_to_float32(dtype: torch.dtype) -> None:
    heads = make_heads(dtype=dtype)
    wide = replace(heads, **{name: getattr(heads, name).float() for name in ("q_THd", "k_TKd", "v_TKe")})
    got = SdpaKernel()(heads)
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), dense(wide), rtol=0.03, atol=0.03)


def test_groups_cover_every_sequence_once_and_beat_one_group_for_all() -> None:
    lengths = [int(x) for x in torch.randint(1, 300, (80,), generator=torch.Generator().manual_seed(3))]
    groups = group_by_length(lengths, overhead=1000)

    def cost(split: list[list[int]]) -> int:
        ups = [-(-max(lengths[i] for i in g) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE for g in split]
        return sum(1000 + len(g) * up**2 for g, up in zip(split, ups, strict=True))

    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    assert cost(groups) < cost([list(range(len(lengths)))])
    assert cost(groups) < cost([[i] for i in range(len(lengths))])
    assert group_by_length([5, 5, 5], overhead=1000) == [[0, 1, 2]]


@pytest.mark.parametrize("kernel", ["sdpa", "sdpa, nothing grouped", "sdpa, short ones grouped", "flash", "reference"])
def test_dropout_repeats_with_the_generator_and_keeps_the_mean(kernel: str) -> None:
    heads = make_heads(dropout=0.3, plan=AttentionPlan.build([24, 16, 30], [(0, 0), (0, 16), (0, 0)]))
    state = RngState.capture()
    first = CPU_KERNELS[kernel](heads)
    other = CPU_KERNELS[kernel](heads)
    state.restore()
    again = CPU_KERNELS[kernel](heads)
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    with torch.no_grad():
        mean = torch.stack([CPU_KERNELS[kernel](heads) for _ in range(300)]).mean(0)
    assert (mean - dense(heads)).abs().max() < 0.4
    assert (mean - dense(heads)).abs().mean() < 0.03


def test_dropout_gradient_is_that_of_the_weights_it_kept() -> None:
    """Values one at a time recover the dropped weights; the same product written out must have the same gradient."""
    size = 6
    plan = AttentionPlan.build([size], [(0, size)])
    heads = make_heads(num_heads=1, num_kv=1, size=4, value_size=size, plan=plan, dropout=0.4)
    state = RngState.capture()
    identity = replace(heads, v_TKe=torch.eye(size)[:, None, :])
    dropped = SdpaKernel()(identity).detach()[:, 0]
    state.restore()
    got = SdpaKernel()(heads)
    weights = torch.softmax(heads.q_THd[:, 0] @ heads.k_TKd[:, 0].T * heads.scaling, -1)
    assert 0 < (dropped == 0).sum() < dropped.numel()
    expected = (weights * (dropped / weights.detach())) @ heads.v_TKe[:, 0]
    torch.testing.assert_close(got[:, 0], expected, **EXACT)
    grad = torch.randn(size, size)
    leaves = (heads.q_THd, heads.k_TKd, heads.v_TKe)
    mine, theirs = torch.autograd.grad(got[:, 0], leaves, grad), torch.autograd.grad(expected, leaves, grad)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def test_flash_makes_one_call_per_mode_on_views() -> None:
    calls: list[dict[str, Any]] = []

    def spy(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        calls.append({"storage": q.untyped_storage().data_ptr(), "causal": kwargs["causal"], "window": kwargs["window_size"]})
        return varlen_on_cpu(q, k, v, **kwargs)

    heads = make_heads(plan=AttentionPlan.build([5, 9, 30, 4, 21], [(0, 0)] * 3 + [(0, 4), (0, 21)]), sliding_window=7)
    torch.testing.assert_close(FlashKernel(spy)(heads), dense(heads), **EXACT)
    assert [(call["causal"], call["window"]) for call in calls] == [(True, (6, 0)), (False, (7, 7))]
    assert {call["storage"] for call in calls} == {heads.q_THd.untyped_storage().data_ptr()}


@pytest.mark.parametrize(
    ("kernel", "changes", "text"),
    [
        (FlashKernel(varlen_on_cpu), {"sinks_H": torch.zeros(6)}, "sinks.*flex"),
        (FlashKernel(varlen_on_cpu), {"sliding_window": 4}, "sliding window.*partial.*flex"),
        (FlexKernel(), {"dropout": 0.1}, "no attention dropout.*attention_dropout=0"),
        (FlexKernel(), {}, "no backward on CPU.*sdpa"),
        (FlashKernel(torch_varlen), {"softcap": 2.0}, "softcap.*flash"),
        (FlashKernel(torch_varlen), {"dropout": 0.1}, "attention dropout.*flash"),
    ],
)
def test_what_a_kernel_cannot_do_it_refuses_by_name(kernel: Any, changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ModelError, match=text):
        kernel(make_heads(**changes))


def test_auto_takes_sdpa_on_cpu() -> None:
    assert AutoKernel.choose(make_heads()) == "sdpa"
    torch.testing.assert_close(KERNELS["auto"]()(make_heads()), dense(make_heads()), **EXACT)


@pytest.mark.parametrize(
    ("varlen", "changes", "kernel"),
    [
        (varlen_on_cpu, {}, "flex"),
        (varlen_on_cpu, {"whole": True}, "flash"),
        (varlen_on_cpu, {"whole": True, "softcap": 2.0, "dropout": 0.1}, "flash"),
        (varlen_on_cpu, {"whole": True, "sinks_H": torch.zeros(6)}, "flex"),
        (torch_varlen, {"whole": True}, "flash"),
        (torch_varlen, {"whole": True, "softcap": 2.0}, "flex"),
        (torch_varlen, {"whole": True, "dropout": 0.1}, "sdpa"),
        (None, {"whole": True}, "flex"),
        (None, {"whole": True, "dropout": 0.1}, "sdpa"),
    ],
)
def test_what_auto_takes_on_cuda(monkeypatch: pytest.MonkeyPatch, varlen: Any, changes: dict[str, Any], kernel: str) -> None:
    monkeypatch.setattr("unified_lm.models.attention.installed_varlen", lambda: varlen)
    whole = {"plan": AttentionPlan.build(LENGTHS, [(0, 0)] * 4 + [(0, n) for n in LENGTHS[4:]])}
    heads = make_heads(**{key: value for key, value in changes.items() if key != "whole"}, **(whole if changes else {}))
    on_cuda: Any = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16)
    assert AutoKernel.choose(replace(heads, q_THd=on_cuda)) == kernel


def test_a_varlen_attention_without_scale_windows_and_groups_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def of_torch_2_10(query: Any, key: Any, value: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: int, max_k: int) -> None: ...

    monkeypatch.setitem(sys.modules, "flash_attn", None)
    assert installed_varlen.__wrapped__() is torch_varlen
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", of_torch_2_10)
    assert installed_varlen.__wrapped__() is None
    monkeypatch.setattr("unified_lm.models.attention.flash.installed_varlen", lambda: None)
    with pytest.raises(ModelError, match="flash-attn, or torch 2"):
        FlashKernel()


def call(heads: Heads, **kwargs: Any) -> torch.Tensor:
    """`packed_attention` as transformers calls it."""
    q, k, v = (x.transpose(0, 1)[None] for x in (heads.q_THd, heads.k_TKd, heads.v_TKe))
    output, weights = packed_attention(nn.Linear(1, 1), q, k, v, scaling=heads.scaling, **kwargs)
    assert weights is None
    return output


def test_the_registered_function_has_transformers_shapes_and_ignores_what_has_no_bearing() -> None:
    assert not any(word in ATTENTION_NAME for word in ("sdpa", "flash", "flex_attention"))
    heads = make_heads(sliding_window=4)
    plan = {"plan": heads.plan, "attention_kernel": SdpaKernel()}
    output = call(heads, sliding_window=4, is_causal=False, position_ids=None, use_cache=False, output_attentions=False, **plan)
    torch.testing.assert_close(output[0], dense(heads), **EXACT)


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"plan": None}, "without an attention plan.*stock_attention"),
        ({"attention_mask": torch.zeros(1, 1, 2, 2)}, "attention_mask"),
        ({"position_bias": torch.zeros(1)}, "position_bias"),
        ({"output_attentions": True}, "output_attentions"),
        ({"plan": AttentionPlan.build([3], [(0, 0)])}, "plan is for 3 tokens"),
    ],
)
def test_the_registered_function_refuses(kwargs: dict[str, Any], text: str) -> None:
    heads = make_heads()
    with pytest.raises(ModelError, match=text):
        call(heads, **{"plan": heads.plan, "attention_kernel": SdpaKernel(), **kwargs})
