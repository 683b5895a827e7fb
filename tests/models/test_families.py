"""Laws 1 and 2 for every family: who sees whom, and that packing changes nothing. Stock transformers is the judge."""

import logging
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from unified_lm.batch import Block, Pack, Sample, make_pack
from unified_lm.core.errors import ModelError
from unified_lm.models.attention import ATTENTION_NAME, AttentionKernel, FlashKernel, FlexKernel, ReferenceKernel, SdpaKernel
from unified_lm.models.backbone import Backbone
from unified_lm.models.probe import probe_attention, stock_attention_sees_future
from unified_lm.models.tiny import tiny_model

from .test_attention import varlen_on_cpu

WINDOWED: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 5},
    "phi3": {"sliding_window": 5},
    "mixtral": {"sliding_window": 5},
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
}
PACKED = [
    *((family, {}) for family in ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt_neox", "gpt2")),
    *(
        (family, {})
        for family in ("olmoe", "mixtral", "qwen2_moe", "qwen3_moe", "granitemoe", "deepseek_v2", "deepseek_v3", "gpt_oss")
    ),
    *WINDOWED.items(),
]
PADDED = [("gptj", {}), ("falcon", {})]
MIXTURES = ("olmoe", "mixtral", "qwen2_moe", "qwen3_moe", "granitemoe", "deepseek_v2", "deepseek_v3", "gpt_oss")
EXACT = {"rtol": 1e-5, "atol": 1e-5}

LENGTHS = (11, 4, 19, 1, 24, 7)
CAUSAL = dict.fromkeys(range(len(LENGTHS)), (0, 0))
WHOLE = {index: (0, length) for index, length in enumerate(LENGTHS)}
MIXED = {**CAUSAL, 1: (0, 4), 2: (3, 12), 4: (0, 24), 5: (0, 3)}


def name(value: Any) -> str:
    return value if isinstance(value, str) else "-".join(value) or "plain"


def samples(spans: dict[int, tuple[int, int]]) -> list[Sample]:
    generator = np.random.default_rng(5)
    tokens = [generator.integers(3, 200, length) for length in LENGTHS]
    return [Sample(input_ids=ids, stream="s", bidirectional=spans[index]) for index, ids in enumerate(tokens)]


def by_sample(pack: Pack, hidden: torch.Tensor) -> dict[bytes, torch.Tensor]:
    """Hidden states keyed by the sample's tokens: make_pack orders samples by mode."""
    parts = hidden.split(list(pack.plan.lengths))
    return {sample.input_ids.tobytes(): part for sample, part in zip(pack.samples, parts, strict=True)}


def stock_alone(model: PreTrainedModel, sample: Sample, causal: bool) -> torch.Tensor:
    """Stock transformers on one sample: its own causal mask, or the one of `is_causal=False`."""
    ids = torch.from_numpy(sample.input_ids)[None]
    model.config.is_causal = causal
    try:
        return model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0]
    finally:
        del model.config.is_causal


def kernels(family: str) -> list[AttentionKernel | str]:
    if family in ("gptj", "falcon"):
        return ["padded"]
    chosen: list[AttentionKernel | str] = [SdpaKernel(), SdpaKernel(longest_grouped=9), ReferenceKernel(), "padded"]
    if family != "gpt_oss":
        chosen.append(FlashKernel(varlen_on_cpu))
    if family == "gpt_oss":  # slow on CPU; caps are tested on the kernel
        chosen.append(FlexKernel())
    return chosen


@pytest.mark.parametrize(("family", "values"), [*PACKED, *PADDED], ids=name)
@torch.no_grad()
def test_law_2_a_sample_is_the_same_alone_and_in_any_pack(family: str, values: dict[str, Any]) -> None:
    model = tiny_model(family, **values)
    expected = {}
    for causal, spans in ((True, CAUSAL), (False, WHOLE)):
        for sample in samples(spans):
            expected[sample.input_ids.tobytes(), causal] = stock_alone(model, sample, causal)
    for kernel in kernels(family):
        backbone = Backbone(model, kernel)
        for spans in (CAUSAL, WHOLE, MIXED):
            if backbone.kernel == "flash" and spans is MIXED:
                spans = {i: span if span == (0, LENGTHS[i]) else (0, 0) for i, span in MIXED.items()}
            pack = make_pack(samples(spans))
            got = by_sample(pack, backbone(pack))
            for sample in pack.samples:
                span = sample.bidirectional
                if span not in ((0, 0), (0, len(sample))):
                    continue
                # stock causal and bidirectional attention agree on a single token
                theirs = expected[sample.input_ids.tobytes(), span == (0, 0)]
                mine = got[sample.input_ids.tobytes()]
                where = f"{backbone.kernel}, {len(sample)} tokens"
                torch.testing.assert_close(mine, theirs, **EXACT, msg=lambda text, where=where: f"{where}: {text}")


@pytest.mark.parametrize(("family", "values"), [*PACKED, *PADDED], ids=name)
def test_stock_attention_follows_is_causal(family: str, values: dict[str, Any]) -> None:
    backbone = Backbone(tiny_model(family, **values), "padded" if (family, values) in PADDED else "sdpa")
    assert not stock_attention_sees_future(backbone, causal=True)
    assert stock_attention_sees_future(backbone, causal=False)
    assert "is_causal" not in backbone.causal_lm.config.__dict__


@pytest.mark.parametrize(("family", "values"), PACKED, ids=name)
@torch.no_grad()
def test_law_2_partial_spans_agree_with_the_familys_own_eager_attention(family: str, values: dict[str, Any]) -> None:
    model, pack = tiny_model(family, **values), make_pack(samples(MIXED))
    expected = Backbone(model, "padded")(pack)
    torch.testing.assert_close(Backbone(model, "sdpa")(pack), expected, **EXACT)
    causal = make_pack(samples(CAUSAL))
    assert not torch.allclose(Backbone(model, "sdpa")(causal), expected)


@pytest.mark.parametrize(("family", "values"), [*PACKED, *PADDED], ids=name)
def test_law_1_a_layer_lets_exactly_the_masks_tokens_through(family: str, values: dict[str, Any]) -> None:
    """Through one layer, token i's state has a gradient to token j's embedding where the mask says so, and only there."""
    model = tiny_model(family, **{**values, "num_hidden_layers": 1, "n_layer": 1, "max_window_layers": 0})
    window = getattr(model.config, "sliding_window", None) or None  # 0 in Qwen2-MoE: none
    spans = [(0, 0), (2, 7), (0, 10), (0, 0)]
    pack = make_pack(
        [
            *(
                Sample(input_ids=np.arange(length) + 3, stream="s", bidirectional=span)
                for length, span in zip((10, 10, 10, 1), spans, strict=True)
            ),
            Sample(input_ids=np.arange(10) + 3, stream="s", blocks=(Block(0, 3), Block(3, 7, bidirectional=True))),
        ]
    )
    expected = pack.plan.dense_mask(window)
    assert window is None or (expected != pack.plan.dense_mask()).any()
    for kernel in [k for k in kernels(family) if not isinstance(k, (FlexKernel, ReferenceKernel, FlashKernel))]:
        backbone = Backbone(model, kernel)
        embedded: list[torch.Tensor] = []
        hook = model.get_input_embeddings().register_forward_hook(lambda *args, seen=embedded: seen.append(args[2]))
        hidden = backbone(pack)
        hook.remove()
        reached = [torch.autograd.grad(row.square().sum(), embedded[0], retain_graph=True)[0] for row in hidden]
        reach = torch.stack(reached).abs().sum(-1).flatten(1)
        if backbone.kernel == "padded":
            longest = pack.plan.max_seqlen
            rows = [i * longest + j for i, length in enumerate(pack.plan.lengths) for j in range(length)]
            reach = reach[:, rows]
        assert torch.equal(reach > 0, expected), f"{backbone.kernel} {family}"


@pytest.mark.parametrize(("family", "values"), [*PACKED, *PADDED], ids=name)
def test_law_1_the_probe_finds_no_leak(family: str, values: dict[str, Any]) -> None:
    model = tiny_model(family, **values)
    for kernel in kernels(family):
        windowed = values or family in ("gemma2", "gemma3_text", "gpt_oss")
        probe_attention(Backbone(model, kernel), partial_spans=not (isinstance(kernel, FlashKernel) and windowed))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("family", "values"), PACKED, ids=name)
def test_gradients_are_those_of_the_familys_own_eager_attention(
    family: str, values: dict[str, Any], checkpointing: bool
) -> None:
    pack = make_pack(samples(MIXED))
    weight = torch.randn(len(pack), 64, generator=torch.Generator().manual_seed(2))

    def gradients(kernel: str, recompute: bool) -> dict[str, torch.Tensor]:
        no_dropout = dict.fromkeys(("attn_pdrop", "resid_pdrop", "embd_pdrop"), 0.0) if family == "gpt2" else {}
        backbone = Backbone(tiny_model(family, **values, **no_dropout), kernel).train()
        if recompute:
            backbone.enable_gradient_checkpointing()
        (backbone(pack) * weight).sum().backward()
        return {name: p.grad for name, p in backbone.named_parameters() if p.grad is not None}

    expected, got = gradients("padded", False), gradients("sdpa", checkpointing)
    assert got.keys() == expected.keys()
    for key, gradient in got.items():
        scale = float(expected[key].abs().max())
        torch.testing.assert_close(
            gradient, expected[key], rtol=1e-4, atol=1e-5 * max(scale, 1), msg=lambda t, k=key: f"{k}: {t}"
        )


@pytest.mark.parametrize("family", MIXTURES)
@torch.no_grad()
def test_router_logits_come_per_token_and_layer(family: str) -> None:
    backbone = Backbone(tiny_model(family), "sdpa")
    pack = make_pack(samples(MIXED))
    hidden, logits = backbone.router_logits(pack)
    torch.testing.assert_close(hidden, backbone(pack))
    assert logits
    assert all(layer.shape == (len(pack), 4) for layer in logits)


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "qwen3_moe", "gpt_oss"])
def test_balanced_families_say_how_many_experts_they_have(family: str) -> None:
    assert Backbone(tiny_model(family, num_experts_per_tok=3), "sdpa").experts() == (4, 3)


def test_router_logits_of_a_dense_model_are_refused() -> None:
    with pytest.raises(ModelError, match="'llama' returns no router logits"):
        Backbone(tiny_model("llama"), "sdpa").router_logits(make_pack(samples(CAUSAL)))


@pytest.mark.parametrize(
    ("family", "values", "kernel", "text"),
    [
        ("gptj", {}, "sdpa", "'gptj'.*attention_kernel=padded"),
        ("falcon", {}, "auto", "'falcon'.*attention_kernel=padded"),
        ("falcon", {"alibi": True}, "padded", "'falcon'.*alibi"),
        ("bloom", {}, "sdpa", "'bloom'.*Kernel padded cannot serve it either.*alibi"),
        ("bloom", {}, "padded", "'bloom'.*alibi"),
        ("llama", {}, "flahs", "unknown attention kernel 'flahs'. Did you mean 'flash'"),
    ],
)
def test_what_a_family_cannot_do_is_refused_by_name(family: str, values: dict[str, Any], kernel: str, text: str) -> None:
    with pytest.raises(ModelError, match=text):
        Backbone(tiny_model(family, **values), kernel)


def test_layers_without_a_mask_and_windows_known_to_masks_only_are_refused() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    tiny: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}
    moe = {"num_key_value_heads": 2, "num_experts": 2, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}
    windowed = AutoConfig.for_model("qwen2_moe", **tiny, **moe, use_sliding_window=True, sliding_window=4, max_window_layers=2)
    with pytest.raises(ModelError, match="'qwen2_moe' applies its sliding window \\(4 tokens\\) only in"):
        Backbone(AutoModelForCausalLM.from_config(windowed))
    model = tiny_model("qwen2")
    model.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(ModelError, match="layers of type linear_attention"):
        Backbone(model)


def test_stock_attention_is_lent_and_taken_back() -> None:
    model = tiny_model("gemma3_text")
    before = model.config._attn_implementation
    backbone = Backbone(model)
    pack = make_pack(samples(MIXED))
    hidden = backbone(pack)
    assert model.config._attn_implementation == ATTENTION_NAME
    with pytest.raises(ModelError, match="without an attention plan"):
        model(input_ids=pack.input_ids[None])
    with backbone.stock_attention() as stock:
        assert stock.config._attn_implementation == before
        assert stock.generate(pack.input_ids[None, :5], max_new_tokens=3, do_sample=False).shape == (1, 8)
    torch.testing.assert_close(backbone(pack), hidden)
    assert Backbone(model)._stock == "sdpa"  # wrapping a wrapped model still knows a way back


def test_padding_is_announced(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        Backbone(tiny_model("gptj"), "padded")
    assert "padded to its longest sample" in caplog.text


@pytest.mark.parametrize(
    ("family", "values"),
    [("gemma2", {"final_logit_softcapping": 3.0}), ("gpt_neox", {}), ("gptj", {}), ("llama", {"tie_word_embeddings": True})],
    ids=name,
)
def test_the_output_head_gives_the_models_own_logits(family: str, values: dict[str, Any]) -> None:
    backbone = Backbone(tiny_model(family, **values), "padded")
    head = backbone.output_head()
    assert (backbone.hidden_size, backbone.vocab_size) == (64, head.weight.shape[0])
    assert head.softcap == values.get("final_logit_softcapping")
    probe_attention(backbone)  # compares logits


def test_a_head_that_is_wrapped_is_refused() -> None:
    model = tiny_model("llama")
    model.lm_head.base_layer = torch.nn.Linear(1, 1)
    with pytest.raises(ModelError, match="no plain linear output head"):
        Backbone(model)
