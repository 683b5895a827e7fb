"""How much do a model's states differ between causal and bidirectional attention? LLM2Vec (arXiv:2404.05961), section 5.

Bidirectional is what the model embeds with, if that is not causal: also with the first token alone.

The same tokens pass through the model twice, and the cosine between the two states is measured at every layer and position. The
paper finds that Mistral-7B's states stay close while LLaMA's diverge ("why Mistral works" without training).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from unified_lm.batch import seeing_attention
from unified_lm.evaluation.analyses.base import Analysis, Material, Numbers, rounded
from unified_lm.evaluation.analyses.by_layer import Curve, draw_by_layer, finish_curves, window_material
from unified_lm.evaluation.analyses.figure import save
from unified_lm.evaluation.analyses.states import layer_states, token_windows
from unified_lm.evaluation.result_table import ResultTable
from unified_lm.inference.unified import UnifiedLM


def _measure(model: UnifiedLM, material: Material, show_progress: bool) -> Numbers:
    texts, count, positions = material.content
    windows = token_windows(model, texts, positions, count)
    both = [window for window in windows for _ in range(2)]
    attentions = ["causal", seeing_attention(model.attention)] * len(windows)
    waiting: dict[int, torch.Tensor] = {}
    total = np.zeros(0)
    for index, states in layer_states(model, both, attentions, show_progress=show_progress):
        other = waiting.pop(index ^ 1, None)  # sequences 2 i and 2 i + 1 hold the same window, causal and bidirectional
        if other is None:
            waiting[index] = states
            continue
        cosine = F.cosine_similarity(states.double(), other.double(), dim=-1).T.numpy()
        total = cosine if not total.size else total + cosine
    mean_LP = total / len(windows)
    return {
        "attention": seeing_attention(model.attention),
        "num_windows": len(windows),
        "cosine": rounded(mean_LP, 4),
        "by_layer": rounded(mean_LP.mean(axis=1)),
        "by_layer_inner": rounded(mean_LP[:, 1:-1].mean(axis=1)),
        "by_layer_first": rounded(mean_LP[:, 0]),
        "by_layer_last": rounded(mean_LP[:, -1]),
        "mean": rounded(float(mean_LP[1:].mean())),
    }


def _draw(arms: Mapping[str, Numbers], material: Mapping[str, Any], path: Path) -> Path:
    from matplotlib.colors import Normalize

    low = min(float(np.min(numbers["cosine"])) for numbers in arms.values())
    curves = (
        Curve("by_layer_inner", "inner positions", "-", 1.8),
        Curve("by_layer_first", "position 0", ":"),
        Curve("by_layer_last", "last position", "--"),
    )
    label = "cosine of the states under causal attention and its own"
    figure, axis = draw_by_layer(arms, "cosine", list(arms), Normalize(low, 1), label, curves, legend="lower left")
    axis.set_ylim(min(low, 0) - 0.05, 1.03)
    finish_curves(axis, "mean over positions", "cosine")
    return save(figure, path)


def _tabulate(arms: Mapping[str, Numbers], material: Mapping[str, Any]) -> ResultTable:
    rows = []
    for label, numbers in arms.items():
        inner = numbers["by_layer_inner"]
        lowest = int(np.argmin(inner))
        rows.append([label, numbers["attention"], numbers["mean"], inner[-1], inner[lowest], lowest])
    return ResultTable(
        title="Causal against bidirectional states of the same tokens",
        columns=("model", "attention", "mean cosine", "last layer", "lowest layer's", "lowest layer"),
        rows=rows,
        note=f"Cosines over the first {material['positions']} tokens of {material['num_windows']} texts of "
        f"{material['texts']}: the mean over layers (without the embeddings) and positions; the others without the first and "
        "the last position.",
    )


LAYERS = Analysis(
    name="layers",
    summary="cosine between causal and bidirectional states of the same tokens, by layer and position",
    version=2,
    prepare=window_material,
    measure=_measure,
    draw=_draw,
    tabulate=_tabulate,
)
