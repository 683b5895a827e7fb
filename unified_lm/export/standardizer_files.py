"""A standardizer inside an export, as a stock sentence-transformers module.

sentence-transformers 6.2 has no module for per-dimension statistics. Its `LayerNorm` normalizes each vector over its own
dimensions, which is different. `Dense` with a diagonal weight, a bias and no activation is exactly `x * scale + shift`, because
products with the zeros add nothing. The price is a file of D x D float32 numbers (1.3 MB for D = 576, 64 MB for 4,096).
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from unified_lm.core.errors import CheckpointError
from unified_lm.core.files import write_json
from unified_lm.export.manifest import Manifest
from unified_lm.models.standardizer import Standardizer

_WEIGHT, _BIAS = "linear.weight", "linear.bias"


def standardizer_folder(manifest: Manifest) -> str:
    """Name of the module's folder; sentence-transformers numbers modules in their order."""
    return f"{2 if manifest.projection_dim is None else 3}_Standardizer"


def save_standardizer(standardizer: Standardizer, folder: Path) -> None:
    """Write it as a `Dense` module, always in float32, because rounding would change its large shifts."""
    folder.mkdir(parents=True)
    tensors = {_WEIGHT: torch.diag(standardizer.scale.cpu()), _BIAS: standardizer.shift.cpu().contiguous()}
    save_file(tensors, folder / "model.safetensors")
    write_json(
        folder / "config.json",
        {
            "in_features": standardizer.dim,
            "out_features": standardizer.dim,
            "bias": True,
            "activation_function": "torch.nn.modules.linear.Identity",
        },
    )


def load_standardizer(folder: Path, manifest: Manifest) -> Standardizer | None:
    """The standardizer of an export, or None if it has none.

    Raises:
        CheckpointError: the manifest lists one, and its file is missing, damaged, or not diagonal.
    """
    if manifest.standardizer is None:
        return None
    path = folder / standardizer_folder(manifest) / "model.safetensors"
    try:
        tensors = load_file(path)
        weight, bias = tensors[_WEIGHT], tensors[_BIAS]
        if weight.dim() != 2 or bias.dim() != 1 or set(weight.shape) != set(bias.shape):
            raise ValueError(f"its weight is {list(weight.shape)} and its bias {list(bias.shape)}")
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot read the export's standardizer, {path}: {error}. Run unified-lm standardize again."
        ) from error
    scale = weight.diagonal()
    if int(weight.count_nonzero()) != int(scale.count_nonzero()):
        raise CheckpointError(
            f"{path} is not a diagonal matrix: it does more than standardize. Run unified-lm standardize again."
        )
    return Standardizer(scale, bias)
