"""The leak probe finds what it is for, and leaves no trace."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.models.test_positions import FOLLOW_THE_PACK
from unified_lm.batch import AttentionPlan, OutputHead
from unified_lm.core.errors import ModelError
from unified_lm.models.attention import Heads, ReferenceKernel
from unified_lm.models.backbone import Backbone
from unified_lm.models.probe import probe_attention
from unified_lm.models.tiny import tiny_model


class Sabotaged:
    """The reference kernel under another plan than it was given."""

    name = "sabotaged"

    def __init__(self, change: Callable[[AttentionPlan], AttentionPlan]) -> None:
        self._change = change

    def __call__(self, heads: Heads) -> torch.Tensor:
        return ReferenceKernel()(replace(heads, plan=self._change(heads.plan)))


def all_causal(plan: AttentionPlan) -> AttentionPlan:
    return AttentionPlan.build(plan.lengths, [(0, 0)] * len(plan.lengths))


def all_bidirectional(plan: AttentionPlan) -> AttentionPlan:
    return AttentionPlan.build(plan.lengths, [(0, length) for length in plan.lengths])


def one_sequence(plan: AttentionPlan) -> AttentionPlan:
    return AttentionPlan.build([plan.num_tokens], [(0, 0)])


def wide_spans(plan: AttentionPlan) -> AttentionPlan:
    spans = [(0, stop) if stop else (0, 0) for _, stop in plan.spans]
    return AttentionPlan.build(plan.lengths, spans)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("change", "text"),
    [
        (all_causal, "not bidirectional where it was asked to be"),
        (all_bidirectional, "a causal token saw its future"),
        (one_sequence, "changed another sample"),
        (wide_spans, "a causal token saw its future"),
    ],
)
def test_a_wrong_mask_is_found(change: Callable[[AttentionPlan], AttentionPlan], text: str, dtype: torch.dtype) -> None:
    backbone = Backbone(tiny_model("llama", dtype=dtype), Sabotaged(change))
    with pytest.raises(ModelError, match=f"(?s)'sabotaged'.*{text}"):
        probe_attention(backbone)
    probe_attention(Backbone(tiny_model("llama", dtype=dtype), Sabotaged(lambda plan: plan)))


def test_a_head_that_is_not_what_it_says_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = Backbone(tiny_model("llama"), "sdpa")
    head = OutputHead(backbone.causal_lm.lm_head.weight, scale=0.5)
    monkeypatch.setattr(backbone, "output_head", lambda: head)
    with pytest.raises(ModelError, match="output head of LlamaForCausalLM is not linear as assumed"):
        probe_attention(backbone)


@pytest.mark.parametrize("training", [True, False])
def test_training_mode_and_random_state_are_restored(training: bool) -> None:
    backbone = Backbone(tiny_model("gpt2"), "sdpa").train(training)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    probe_attention(backbone)
    assert torch.equal(torch.get_rng_state(), before)
    assert backbone.training is training
    assert backbone.causal_lm.training is training
    assert all(p.grad is None for p in backbone.parameters())


def test_an_evaluating_model_stays_one_inside_a_new_wrapper() -> None:
    backbone = Backbone(tiny_model("gpt2").eval(), "sdpa")
    assert backbone.training, "torch's default for a new module, and the reason why each mode is restored by itself"
    probe_attention(backbone)
    assert not any(module.training for module in backbone.causal_lm.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("family", "values", "limit"), FOLLOW_THE_PACK)
def test_frequencies_that_follow_the_pack_are_found(
    family: str, values: dict[str, Any], limit: int, dtype: torch.dtype
) -> None:
    backbone = Backbone(tiny_model(family, dtype=dtype, **values), "sdpa")
    probe_attention(backbone, longest=limit)
    with pytest.raises(ModelError, match=f"a sample of {4 * limit} tokens changed the positions of another one"):
        probe_attention(backbone, longest=4 * limit)
    probe_attention(Backbone(tiny_model("llama", dtype=dtype), "sdpa"), longest=4 * limit)


@pytest.mark.parametrize("family", ["mixtral", "llama"])
def test_a_token_that_chooses_another_expert_is_no_leak_of_positions(family: str) -> None:
    """Rounding does that now and then; a leak would change all tokens. A dense model has no such choice."""
    backbone = Backbone(tiny_model(family), "sdpa")
    calls = 0

    def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        changed = output[0] if isinstance(output, tuple) else output
        if module.far:  # type: ignore[attr-defined]
            changed = changed.clone()
            changed[:, -1] *= 1.02
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    decoder = backbone.causal_lm.get_decoder()
    last = decoder.layers[-1].mlp
    handle = last.register_forward_hook(hook)

    def mark(module: torch.nn.Module, inputs: Any, options: dict[str, Any]) -> None:
        ids = options.get("position_ids")
        last.far = ids is not None and ids.diff().abs().max() > 400

    marking = decoder.register_forward_pre_hook(mark, with_kwargs=True)
    try:
        if family == "mixtral":
            probe_attention(backbone, longest=512)
        else:
            with pytest.raises(ModelError, match="changed the positions of another one"):
                probe_attention(backbone, longest=512)
    finally:
        handle.remove()
        marking.remove()
    assert calls


def test_a_vocabulary_smaller_than_the_probe_is_enough() -> None:
    probe_attention(Backbone(tiny_model("llama", vocab_size=4, pad_token_id=0, eos_token_id=2, bos_token_id=1), "sdpa"))


def test_experts_that_round_by_how_many_tokens_they_get_are_no_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product of more rows may round differently: in mixtures other samples' tokens change that, and are not seen."""
    backbone = Backbone(tiny_model("mixtral"), "sdpa").eval()
    experts = [layer.mlp.experts for layer in backbone.causal_lm.model.layers]

    def probe(error: float) -> None:
        def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            return output * (1 + error * float(inputs[1].sum() % 7))

        handles = [module.register_forward_hook(hook) for module in experts]
        try:
            probe_attention(backbone)
        finally:
            for handle in handles:
                handle.remove()

    leaks = "leaks: a token of one packed sample changed another"
    probe(4e-6)
    with pytest.raises(ModelError, match=leaks):
        probe(2e-3)
    monkeypatch.setattr("unified_lm.models.probe._MIXTURE_ROUNDING", 0.0)
    with pytest.raises(ModelError, match=leaks):
        probe(4e-6)
