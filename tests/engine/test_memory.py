"""GradCache's memory does not grow with the number of pairs."""

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.engine.tiny import CONTRASTIVE, WEIGHTS
from unified_lm.batch import Sample, make_batch
from unified_lm.engine.accounting.live_tensors import LiveTensors
from unified_lm.engine.embedding_term import EmbeddingTerm
from unified_lm.engine.step import GradCacheStep
from unified_lm.engine.training_module import TrainingModule
from unified_lm.models.backbone import Backbone
from unified_lm.objectives.contrastive import Contrastive


def test_live_tensors_counts_what_is_alive_and_what_was():
    with LiveTensors() as live:
        first = torch.zeros(1000)
        view = first[10:].view(-1, 10)
        second = torch.ones(500) + 1  # the ones are dead after the sum
        del second
        assert live.now == 4000
        del first
        assert live.now == 4000  # the view keeps it
        del view
    assert live.now == 0
    assert live.peak == 8000


def test_live_tensors_sees_backwards():
    weight = torch.ones(1000, requires_grad=True)
    with LiveTensors() as live:
        (weight * weight).sum().backward()
    assert live.now == 4000  # the gradient
    assert live.peak >= 8000


def peak_of_a_step(num_pairs: int, num_retained: int = 1) -> int:
    """The most bytes of tensors that a step of pairs of 8 tokens holds, in packs of 256 tokens.

    Scores are cut into chunks of 8 KiB, as much smaller than `SCORE_BYTES` as this model is than a real one.
    """
    random = np.random.default_rng(0)
    samples = [
        Sample(
            input_ids=random.integers(3, 200, size=8), stream="embedding", bidirectional=(0, 8), pool=(0, 8), group=i, slot=j
        )
        for i in range(num_pairs)
        for j in range(2)
    ]
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=256, hidden_size=8, intermediate_size=256, num_hidden_layers=8, num_attention_heads=2)
    trainable = TrainingModule(Backbone(LlamaForCausalLM(config), "sdpa"), "mean", {}).train()
    objective = Contrastive(CONTRASTIVE, score_bytes=2**13)
    step = GradCacheStep(
        trainable, torch.Tensor.backward, WEIGHTS, [EmbeddingTerm({"embedding": objective}, WEIGHTS)], num_retained
    )
    with LiveTensors() as live:
        step(make_batch(samples, 256, {}))
    return live.peak


def test_memory_is_flat_in_the_number_of_pairs():
    few, many = peak_of_a_step(16), peak_of_a_step(256)
    assert abs(many / few - 1) < 0.05
    assert peak_of_a_step(64, num_retained=4) > 1.5 * few  # the measure sees graphs that are kept


def test_scores_of_a_large_batch_take_little():
    """1,024 pairs: the whole score matrix would be 4 MiB, and several of them would be alive at once."""
    embeddings = torch.randn(1024, 2, 16, requires_grad=True)
    text_ids = torch.arange(1, 2049).reshape(1024, 2)
    peaks = []
    for score_bytes in (None, 2**30):
        with LiveTensors() as live:
            term = Contrastive(CONTRASTIVE, score_bytes=score_bytes)(embeddings, text_ids)
            torch.autograd.grad(term.sum, embeddings)
        peaks.append(live.peak)
    assert peaks[0] < 8 * 2**20 < 16 * 2**20 < peaks[1]
