"""Length of the hidden states by layer and position: where attention sinks and massive activations sit.

Decoders park attention on the first token, whose state grows far beyond the others' (Xiao et al. 2024, arXiv:2309.17453; Sun
et al. 2024, arXiv:2402.17762). Such a token dominates a mean over tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from unified_lm.evaluation.analyses.base import Analysis, Material, Numbers, rounded
from unified_lm.evaluation.analyses.figure import HEAT, MARKERS, PALETTE, arm_legend, finish, heat_legend, save, subplots
from unified_lm.evaluation.analyses.layers import window_material
from unified_lm.evaluation.analyses.states import layer_states, token_windows
from unified_lm.evaluation.result_table import ResultTable
from unified_lm.inference.unified import UnifiedLM

SINK_RATIO = 10.0
"""A position is called a sink where its state is that many times as long as the layer's median."""


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

    figure, axes = subplots(1, len(arms) + 1, 4.0 * (len(arms) + 1) + 0.8, 4.2)
    values = [np.asarray(numbers["norm"]) for numbers in arms.values()]
    scale = LogNorm(min(float(v.min()) for v in values), max(float(v.max()) for v in values))
    for axis, (label, numbers) in zip(axes[0], arms.items(), strict=False):
        image = axis.imshow(numbers["norm"], aspect="auto", origin="lower", cmap=HEAT, norm=scale, interpolation="nearest")
        attention = numbers["attention"]
        finish(axis, label if attention in label else f"{label} ({attention})", "token position", "layer (0: embeddings)")
        axis.grid(False)
    heat_legend(figure, image, list(axes[0][: len(arms)]), "L2 norm of the state (log scale)")
    axis = axes[0][-1]
    for index, numbers in enumerate(arms.values()):
        colour, marker = PALETTE[index % len(PALETTE)], MARKERS[index % len(MARKERS)]
        layers = range(len(numbers["median_by_layer"]))
        every = max(1, len(layers) // 10)
        axis.plot(layers, numbers["median_by_layer"], color=colour, marker=marker, markevery=every, markersize=4, linewidth=1.8)
        axis.plot(layers, numbers["first_by_layer"], color=colour, linewidth=1.2, linestyle=":")
    for name, style in (("median position", "-"), ("position 0", ":")):
        axis.plot([], [], color="#333333", linestyle=style, label=name)
    axis.set_yscale("log")
    axis.legend(fontsize=8, frameon=False)
    finish(axis, "first token against the others", "layer (0: embeddings)", "L2 norm (log scale)")
    arm_legend(figure, list(arms))
    return save(figure, path)


def _tabulate(arms: Mapping[str, Numbers], material: Mapping[str, Any]) -> ResultTable:
    rows = []
    for label, numbers in arms.items():
        largest = numbers["largest_ratio"]
        sinks = ", ".join(str(sink["position"]) for sink in numbers["sinks"])
        place = (largest["ratio"], largest["layer"], largest["position"])
        rows.append([label, numbers["attention"], sinks or "none", *place, numbers["last_layer_first_ratio"]])
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
