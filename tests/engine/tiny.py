"""A tiny random model with streams of every kind, for tests of the engine."""

from __future__ import annotations

import numpy as np
import torch

from unified_lm.batch import IGNORE, Sample
from unified_lm.batch.normalization import normalize
from unified_lm.engine.coupled import CoupledTerm
from unified_lm.engine.embedding_term import EmbeddingTerm
from unified_lm.engine.training_module import TrainingModule
from unified_lm.models.backbone import Backbone
from unified_lm.models.tiny import tiny_model
from unified_lm.objectives import ContrastiveConfig, NextTokenConfig, build_objective

CONTRASTIVE = ContrastiveConfig(temperature=0.1)
NEXT_TOKEN = NextTokenConfig()
WEIGHTS = {"embedding": 1.0, "generation": 0.7}


def make_trainable(seed: int = 0, dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> TrainingModule:
    """A tiny llama, optionally with attention dropout."""
    model = tiny_model("llama", seed=seed, dtype=dtype)
    model.config.attention_dropout = dropout
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = dropout
    return TrainingModule(Backbone(model, "sdpa"), "mean", {"generation": build_objective(NEXT_TOKEN)})


def embedding_objectives() -> dict:
    return {"embedding": build_objective(CONTRASTIVE)}


def embedding_terms() -> list[CoupledTerm]:
    return [EmbeddingTerm(embedding_objectives(), WEIGHTS)]


def make_samples(num_groups: int = 6, num_chats: int = 4, seed: int = 0, normalization: str = "token"):
    """Bidirectional pairs and causal chats of uneven lengths; returns the samples and the counts of the step."""
    random = np.random.default_rng(seed)

    def ids() -> np.ndarray:
        return random.integers(3, 200, size=random.integers(4, 20))

    pairs = []
    for group in range(num_groups):
        for slot in range(3):
            tokens = ids()
            pairs.append(
                Sample(
                    input_ids=tokens,
                    stream="embedding",
                    bidirectional=(0, len(tokens)),
                    pool=(1, len(tokens)),
                    group=group,
                    slot=slot,
                )
            )
    chats = []
    for group in range(num_chats):
        tokens = ids()
        labels = np.where(np.arange(len(tokens)) >= len(tokens) // 2, tokens, IGNORE)
        chats.append(Sample(input_ids=tokens, stream="generation", labels=labels, group=group))
    chats, count = normalize(chats, normalization, 3 if normalization == "mixed" else None)
    return [*pairs, *chats], {"generation": count}
