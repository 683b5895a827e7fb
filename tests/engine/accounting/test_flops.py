"""Operations are counted, not guessed: against PyTorch's own counter, and against the mask itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.engine.tiny import NEXT_TOKEN, make_samples
from unified_lm.batch import Block, Sample, make_batch, make_pack
from unified_lm.config.schema import LoraConfig
from unified_lm.engine.accounting.flops import ModelFlops, visible_pairs
from unified_lm.engine.accounting.peaks import device_peak, listed_peak, measured_gemm
from unified_lm.engine.training_module import TrainingModule
from unified_lm.models.backbone import Backbone
from unified_lm.models.lora import apply_lora
from unified_lm.models.tiny import tiny_model
from unified_lm.objectives import build_objective


def trainable_of(family: str, lora: LoraConfig | None = None) -> TrainingModule:
    model = tiny_model(family, seed=0)
    if lora is not None:
        apply_lora(model, lora, 0)
    return TrainingModule(Backbone(model, "sdpa"), "mean", {"generation": build_objective(NEXT_TOKEN)})


def sequence(length: int, span: tuple[int, int] = (0, 0)) -> Sample:
    return Sample(input_ids=np.arange(length), stream="s", bidirectional=span)


@pytest.mark.parametrize("window", [None, 1, 3, 5, 40])
def test_visible_pairs_are_those_of_the_mask(window: int | None) -> None:
    samples = [sequence(1), sequence(9), sequence(9, (0, 9)), sequence(12, (2, 9)), sequence(7, (0, 1))]
    blocks = (Block(0, 5), Block(5, 9, bidirectional=True), Block(11, 14, bidirectional=True))
    pack = make_pack([*samples, replace(sequence(16), blocks=blocks)])
    assert visible_pairs(pack, window) == int(pack.plan.dense_mask(window).sum())


def counted_by_torch(compute: Callable[[], torch.Tensor]) -> tuple[int, int]:
    """Operations of matrix products, and of batched ones (attention), in a forward and backward."""
    with FlopCounterMode(display=False) as counter:
        compute().backward()
    counts = {str(name): value for name, value in counter.get_flop_counts()["Global"].items()}
    batched = counts.pop("aten.bmm", 0)
    return sum(counts.values()), batched


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_weights_and_head_agree_with_pytorchs_counter(family: str) -> None:
    trainable = trainable_of(family)
    pack = make_batch(make_samples()[0], 10_000).packs[0]

    def loss() -> torch.Tensor:
        output = trainable(pack)
        return output.embeddings.sum() + output.terms["generation"].sum

    flops = ModelFlops.of(trainable)
    attention = 3 * flops.pair * visible_pairs(pack) * sum(flops.windows.values())
    assert flops.training(pack) - attention == counted_by_torch(loss)[0]


def test_attention_agrees_with_pytorchs_counter() -> None:
    """One bidirectional sequence through transformers' eager attention, which multiplies the whole square."""
    trainable = trainable_of("llama")
    pack = make_pack([sequence(60, (0, 60))])
    flops = ModelFlops.of(trainable)
    with trainable.backbone.stock_attention() as model:
        model.set_attn_implementation("eager")
        _, batched = counted_by_torch(lambda: model.get_decoder()(pack.input_ids[None]).last_hidden_state.sum())
    assert 3 * flops.pair * visible_pairs(pack) * sum(flops.windows.values()) == pytest.approx(batched, rel=0.001)


def test_frozen_weights_cost_two_thirds_of_trained_ones() -> None:
    full, lora = (ModelFlops.of(trainable_of("llama", config)) for config in (None, LoraConfig(r=4, dropout=0.0)))
    assert full.frozen == 0
    assert lora.frozen == full.trained
    assert 0 < lora.trained < full.trained
    assert not lora.head_trained
    pack = make_pack([sequence(8)])
    attention = 3 * lora.pair * visible_pairs(pack) * sum(lora.windows.values())
    assert lora.training(pack) == (4 * lora.frozen + 6 * lora.trained) * 8 + attention
    assert lora.training(pack) < full.training(pack)


def test_a_token_visits_only_its_experts() -> None:
    trainable = trainable_of("mixtral")
    config = trainable.backbone.causal_lm.config
    experts = sum(p.numel() for n, p in trainable.named_parameters() if ".experts." in n)
    others = sum(
        p.numel() for n, p in trainable.named_parameters() if p.ndim == 2 and ".experts." not in n and "embed" not in n
    ) - ModelFlops.of(trainable).head * (not config.tie_word_embeddings)
    assert ModelFlops.of(trainable).trained == others + experts * config.num_experts_per_tok / config.num_local_experts


def test_layers_with_a_window_are_counted_apart() -> None:
    trainable = trainable_of("mistral")
    trainable.backbone.causal_lm.config.sliding_window = 4
    flops = ModelFlops.of(trainable)
    assert flops.windows == {4: trainable.backbone.causal_lm.config.num_hidden_layers}
    long = make_pack([sequence(100)])
    assert flops.forward(long) < ModelFlops.of(trainable_of("llama")).forward(long)


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100-PCIE-40GB", 312.0),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.4),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA B200", 2250.0),
    ],
)
def test_the_table_knows_devices_by_the_names_that_cuda_gives_them(name: str, teraflops: float) -> None:
    peak = listed_peak(name)
    assert peak is not None
    assert peak.flops == teraflops * 1e12


def test_an_unknown_device_and_a_cpu_are_measured_once() -> None:
    assert listed_peak("NVIDIA A1000") is None
    peak = device_peak(torch.device("cpu"), torch.float32)
    assert peak.source == "measured"
    assert 1e8 < peak.flops < 1e14
    assert measured_gemm(torch.device("cpu"), torch.float32) == peak.flops
