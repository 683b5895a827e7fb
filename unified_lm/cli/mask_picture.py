"""The attention mask of a pack as a picture."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np

from unified_lm.batch import AttentionMode, Pack
from unified_lm.core.outputs import write_file

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

COLORS = {AttentionMode.CAUSAL: "#3b6fb6", AttentionMode.SPAN: "#e08a2e", AttentionMode.BIDIRECTIONAL: "#3a9a5b"}
"""The color of each attention mode."""


def mask_image(pack: Pack) -> np.ndarray:
    """The mask of a pack, int64 `[T, T]`: 0 if masked, else 1 + the index in `COLORS` of the sample's attention mode."""
    image = pack.plan.dense_mask().numpy().astype(np.int64)
    modes, offsets = list(COLORS), pack.plan.offsets
    for index in range(len(pack.plan.lengths)):
        image[offsets[index] : offsets[index + 1]] *= 1 + modes.index(pack.plan.mode(index))
    return image


def save_mask_picture(pack: Pack, path: Path) -> None:
    """Draw the mask of a pack: rows are queries, columns keys, with one color per attention mode and lines between samples.

    Args:
        pack: the pack.
        path: the PNG to write; its folder is created.
    """
    figure, axes = plt.subplots(figsize=(9, 9), layout="constrained")
    colors = ListedColormap(["#ffffff", *COLORS.values()])
    axes.imshow(mask_image(pack), cmap=colors, vmin=0, vmax=len(COLORS), interpolation="nearest")
    borders = [offset - 0.5 for offset in pack.plan.offsets]
    axes.hlines(borders, -0.5, len(pack) - 0.5, color="#999999", linewidth=0.4)
    axes.vlines(borders, -0.5, len(pack) - 0.5, color="#999999", linewidth=0.4)
    axes.set_xlabel("key: token attended to")
    axes.set_ylabel("query: attending token")
    axes.set_title(f"one pack: {len(pack.samples)} samples, {len(pack):,} tokens, no padding")
    used = {pack.plan.mode(index) for index in range(len(pack.plan.lengths))}
    axes.legend(handles=[Patch(color=c, label=mode.value) for mode, c in COLORS.items() if mode in used], loc="upper right")
    write_file(path, lambda building: figure.savefig(building, dpi=130))
    plt.close(figure)
