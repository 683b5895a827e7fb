"""The files that make an export a stock sentence-transformers model: its modules, pooling, prompts, and the linear head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from unified_lm.core.errors import CheckpointError
from unified_lm.core.files import write_json
from unified_lm.core.typed import require_typed
from unified_lm.core.user_files import read_json
from unified_lm.export.manifest import Manifest
from unified_lm.export.standardizer_files import standardizer_folder
from unified_lm.export.verify import PROJECTION_FOLDER
from unified_lm.models.pooling import Projection

PROMPTS_FILE = "config_sentence_transformers.json"
"""The file with an export's prompts."""
POOLING_MODES = {"mean": "mean", "weighted_mean": "weightedmean", "last_token": "lasttoken", "cls": "cls"}
"""Our name of a pooling -> its name in sentence-transformers."""

_REFUSAL = "unified_lm.inference.interop.UseUnifiedLM"

_OLDER_KEYS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""Key of a pooling in sentence-transformers before version 6 -> its name now."""


def write_projection(projection: Projection, dtype: torch.dtype, building: Path) -> None:
    """Write the linear head as a `Dense` module.

    Args:
        projection: the head.
        dtype: of the stored weights.
        building: the export.
    """
    folder = building / PROJECTION_FOLDER
    folder.mkdir()
    tensors = {name: value.detach().to("cpu", dtype).contiguous() for name, value in projection.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")
    write_json(
        folder / "config.json",
        {
            "in_features": projection.linear.in_features,
            "out_features": projection.linear.out_features,
            "bias": projection.linear.bias is not None,
            "activation_function": "torch.nn.modules.linear.Identity",
        },
    )


def sentence_transformers_modules(manifest: Manifest) -> list[dict[str, Any]]:
    """The content of modules.json: the stock modules that process a text, in order."""
    modules = [("Transformer", ""), ("Pooling", "1_Pooling")]
    if manifest.projection_dim is not None:
        modules.append(("Dense", PROJECTION_FOLDER))
    if manifest.standardizer is not None:
        modules.append(("Dense", standardizer_folder(manifest)))
    if manifest.normalize:
        modules.append(("Normalize", f"{len(modules)}_Normalize"))
    return [
        {"idx": index, "name": str(index), "path": folder, "type": f"sentence_transformers.models.{kind}"}
        for index, (kind, folder) in enumerate(modules)
    ]


def write_refusal(building: Path) -> None:
    """Write a modules.json that sentence-transformers refuses, where its own modules would compute other vectors.

    Args:
        building: the export.
    """
    write_json(building / "modules.json", [{"idx": 0, "name": "0", "path": "", "type": _REFUSAL}])


def write_sentence_transformers(
    manifest: Manifest,
    prompt_strings: dict[str, str],
    hidden_size: int,
    overlay: dict[str, Any],
    tokenizer_settings: dict[str, Any],
    building: Path,
) -> None:
    """Write the JSON files that sentence-transformers reads.

    Args:
        manifest: of the export.
        prompt_strings: prompt name -> string that precedes a text.
        hidden_size: D.
        overlay: what differs from config.json when the model embeds.
        tokenizer_settings: arguments with which the tokenizer is read (`export.tokenizer_files`).
        building: the export.
    """
    write_json(building / "modules.json", sentence_transformers_modules(manifest))
    write_json(
        building / "sentence_bert_config.json",
        {
            "max_seq_length": manifest.max_tokens,
            "do_lower_case": False,
            "config_kwargs": overlay,
            "processor_kwargs": tokenizer_settings,
        },
    )
    write_json(
        building / "1_Pooling" / "config.json",
        {
            "embedding_dimension": hidden_size,
            "pooling_mode": POOLING_MODES[manifest.pooling],
            # The older spelling, without which Text Embeddings Inference does not start.
            **{key: mode == POOLING_MODES[manifest.pooling] for key, mode in _OLDER_KEYS.items()},
            # prompts are read but not pooled, unless training pooled them
            "include_prompt": bool(manifest.template_fields.get("pools_prompt", False)),
        },
    )
    versions = {
        "sentence_transformers": manifest.versions.get("sentence-transformers", ""),
        "transformers": manifest.versions.get("transformers", ""),
        "pytorch": manifest.versions.get("torch", ""),
    }
    write_json(
        building / PROMPTS_FILE,
        {
            "model_type": "SentenceTransformer",
            "__version__": {name: value for name, value in versions.items() if value},
            "prompts": prompt_strings,
            "default_prompt_name": "document",
            "similarity_fn_name": "cosine",
        },
    )


def read_prompts(folder: Path) -> dict[str, str]:
    """Prompt name -> string of an export; nothing for one without these files.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = folder / PROMPTS_FILE
    if not path.is_file():
        return {}
    return dict(require_typed(_Prompts, read_object(path), path, CheckpointError, fix=_AGAIN, open_ended=True).prompts)


@dataclass(frozen=True)
class _Prompts:
    """What is read of the file of prompts."""

    prompts: Mapping[str, str]


def read_object(path: Path) -> dict[str, Any]:
    """The content of one of an export's JSON files.

    Raises:
        CheckpointError: it is damaged.
    """
    found = read_json(path, CheckpointError, fix=_AGAIN)
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds {type(found).__name__}, expected an object. {_AGAIN}")
    return found


_AGAIN = "The export is damaged: export the run again."
