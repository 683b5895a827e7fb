"""Norm of the hidden states by layer and position, which shows attention sinks and massive activations.

Decoders put excess attention on the first token, whose state grows far larger than the others (Xiao et al. 2024,
arXiv:2309.17453; Sun et al. 2024, arXiv:2402.17762). Such a token dominates a mean over tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from unified_lm.evaluation.analyses.base import Analysis, Material, Numbers, rounded
from unified_lm.evaluation.analyses.by_layer import Curve, draw_by_layer, finish_curves, window_material
from unified_lm.evaluation.analyses.figure import save
from unified_lm.evaluation.analyses.states import layer_states, token_windows
from unified_lm.evaluation.result_table import ResultTable
from unified_lm.inference.unified import UnifiedLM

SINK_RATIO = 10.0
"""A position is a sink if the norm of its state is at least this many times the layer's median."""


def _measure(model: UnifiedLM, material: Material, show_progress: bool) -> Numbers:
    texts, count, positions = material.content
    windows = token_windows(model, texts, positions, count)
    total = np.zeros(0)
    for _, states in layer_states(model, windows, model.attention, show_progress=show_progress):
        norms = states.double().norm(dim=-1).T.numpy()
        total = norms if not total.size else total + norms
    mean_LP = total / len(windows)
    median_L = np.median(mean_LP, axis=1)
    ratio_LP = mean_LP / median_L[:, None]
    layer, position = np.unravel_index(int(ratio_LP.argmax()), ratio_LP.shape)
    return {
        "attention": model.attention,
        "num_windows": len(windows),
        "norm": rounded(mean_LP, 4),
        "median_by_layer": rounded(median_L),
        "first_by_layer": rounded(mean_LP[:, 0]),
        "largest_ratio": {"ratio": rounded(float(ratio_LP.max())), "layer": int(layer), "position": int(position)},
        "sinks": [
            {"position": int(p), "layers": [int(layer) for layer in np.flatnonzero(ratio_LP[:, p] >= SINK_RATIO)]}
            for p in np.flatnonzero((ratio_LP >= SINK_RATIO).any(axis=0))
        ],
        "last_layer_first_ratio": rounded(float(ratio_LP[-1, 0])),
    }


def _draw(arms: Mapping[str, Numbers], material: Mapping[str, Any], path: Path) -> Path:
    from matplotlib.colors import LogNorm

    values = [np.asarray(numbers["norm"]) for numbers in arms.values()]
    scale = LogNorm(min(float(v.min()) for v in values), max(float(v.max()) for v in values))
    attentions = [numbers["attention"] for numbers in arms.values()]
    titles = [label if name in label else f"{label} ({name})" for label, name in zip(arms, attentions, strict=True)]
    curves = (Curve("median_by_layer", "median position", "-", 1.8), Curve("first_by_layer", "position 0", ":", 1.2))
    figure, axis = draw_by_layer(arms, "norm", titles, scale, "L2 norm of the state (log scale)", curves)
    axis.set_yscale("log")
    finish_curves(axis, "first token against the others", "L2 norm (log scale)")
    return save(figure, path)


def _tabulate(arms: Mapping[str, Numbers], material: Mapping[str, Any]) -> ResultTable:
    rows = []
    for label, numbers in arms.items():
        largest = numbers["largest_ratio"]
        sinks = ", ".join(str(sink["position"]) for sink in numbers["sinks"])
        peak = (largest["ratio"], largest["layer"], largest["position"])
        rows.append([label, numbers["attention"], sinks or "none", *peak, numbers["last_layer_first_ratio"]])
    return ResultTable(
        title="Attention sinks: length of the states",
        columns=("model", "attention", "sinks at", "largest ratio", "in layer", "at position", "position 0, last layer"),
        rows=rows,
        note=f"Ratios to the layer's median length; a sink has {SINK_RATIO:g} or more. First {material['positions']} tokens of "
        f"{material['num_windows']} texts of {material['texts']}.",
    )


NORMS = Analysis(
    name="norms",
    summary="length of the states by layer and position: attention sinks",
    version=1,
    prepare=window_material,
    measure=_measure,
    draw=_draw,
    tabulate=_tabulate,
)
