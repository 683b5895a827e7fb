"""Loading an export, or a plain causal language model, for inference."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from unified_lm.checkpoint.store import list_checkpoints
from unified_lm.core.distributed import find_device, local_device
from unified_lm.core.errors import CheckpointError, ConfigError, UserError
from unified_lm.core.user_files import user_path
from unified_lm.data.prompts.templates import Template
from unified_lm.export.directory import template_of
from unified_lm.export.manifest import FILE_NAME, Manifest
from unified_lm.export.standardizer_files import load_standardizer
from unified_lm.export.verify import load_projection
from unified_lm.models.adapters import CONFIG_FILE, Adapter, find_adapter, has_tokenizer, merge_adapter
from unified_lm.models.load_errors import check_complete, check_special_tokens, explain, tried
from unified_lm.models.monet.masks import ExpertMask, leave_out
from unified_lm.models.pooling import Projection
from unified_lm.models.precision import AUTO, auto_inference_dtype
from unified_lm.models.quiet import quiet_loading
from unified_lm.models.standardizer import Standardizer
from unified_lm.models.weights_hash import check_weights_hash

_log = logging.getLogger(__name__)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_RUN_CONFIG = "config.yaml"
"""The file by which the folder of a run is recognized."""


@dataclass(frozen=True)
class Parts:
    """The content of a model folder.

    Attributes:
        causal_lm: the model, on its device, in evaluation mode.
        tokenizer: its tokenizer.
        manifest: None if the folder is not an export.
        template: the export's template, or None.
        projection: the export's linear head, or None.
        standardizer: the export's statistics, or None.
    """

    causal_lm: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    manifest: Manifest | None
    template: Template | None
    projection: Projection | None
    standardizer: Standardizer | None


def load_parts(
    name_or_path: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
    needs_manifest: bool = True,
    needs_head: bool = False,
    check_weights: bool | None = None,
    expert_mask: str | Path | None = None,
) -> Parts:
    """Load a folder or a Hub repository. Code that it contains is never run.

    Args:
        name_or_path: a folder (for a run, its export is loaded), or a Hub name.
        device: None takes the accelerator if there is one.
        dtype: None takes the stored dtype; "auto" too, or float32 where the device would only emulate it.
        revision: Hub revision.
        needs_manifest: whether to refuse a folder that is not an export.
        needs_head: whether to refuse a bare decoder (`models.headless`); an export that generates needs its head in any case.
        check_weights: whether to compare the weights of an export with the hash it records, see `check_weights_hash`.
        expert_mask: a file of experts that a MONET model leaves out, see `models.monet.masks`.

    Raises:
        CheckpointError: no such folder, not an export, or files that cannot be loaded.
        ConfigError: unknown dtype.
        UserError: the device cannot be used.
        ModelError: weights are missing from the files, or are not those that were exported.
    """
    target = local_device() if device is None else find_device(device)
    folder = model_folder(name_or_path, revision)
    manifest = Manifest.load(folder) if needs_manifest or (folder / FILE_NAME).is_file() else None
    if manifest is not None:
        check_weights_hash(folder, manifest.weights_hash, always=check_weights)
    adapter = find_adapter(str(folder))
    base = folder if adapter is None else _base_folder(adapter, check_weights)
    try:
        with quiet_loading(reports=False):
            holder = folder if adapter is None or has_tokenizer(adapter) else base
            tokenizer = tried(AutoTokenizer.from_pretrained(holder, local_files_only=True))
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                base, dtype=weights_dtype(dtype), local_files_only=True, output_loading_info=True
            )
            check_special_tokens(loaded[0])
    except UserError:
        raise
    except Exception as error:  # a damaged file can make the libraries raise anything, bare Exception included
        said = " ".join(str(error).split())[:300]
        raise CheckpointError(f"cannot load the model in {folder}: {type(error).__name__}: {said}") from error
    causal_lm, info = loaded
    generates = manifest is not None and manifest.can_generate
    check_complete(info, str(base), causal_lm, needs_head=needs_head or generates)
    if adapter is not None:
        causal_lm = merge_adapter(causal_lm, adapter)
    if expert_mask is not None:
        leave_out(causal_lm, ExpertMask.load(user_path(expert_mask)))
    if dtype == AUTO and (wider := _auto_dtype(causal_lm.dtype, target)) is not causal_lm.dtype:
        causal_lm.to(wider)  # not the stored type again: that would round buffers which are always float32 (rotary frequencies)
    hidden_size = causal_lm.config.get_text_config().hidden_size
    causal_lm.to(target)
    return Parts(
        causal_lm=causal_lm.eval(),
        tokenizer=tokenizer,
        manifest=manifest,
        template=None if manifest is None else template_of(manifest),
        projection=None if manifest is None else load_projection(folder, manifest, hidden_size),
        standardizer=None if manifest is None else load_standardizer(folder, manifest),
    )


def stock_dtype(folder: Path, dtype: str | None, device: str | None = None) -> str:
    """The type in which another library shall load a folder by itself, after a check of all but the values of its weights.

    Args:
        folder: of a causal language model.
        dtype: as in `load_parts`; other libraries take "auto" for the stored type.
        device: where it will run.

    Returns:
        The name of a dtype of torch.

    Raises:
        ConfigError: unknown dtype.
        ModelError: it cannot be read, or weights are missing (the head, for example), which the library would draw at random.
    """
    with explain(str(folder), "weights", False), quiet_loading(reports=False):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=weights_dtype(dtype), local_files_only=True, output_loading_info=True, device_map="meta"
        )
    causal_lm, info = loaded
    check_complete(info, str(folder), causal_lm)
    target = local_device() if device is None else find_device(device)
    found = _auto_dtype(causal_lm.dtype, target) if dtype == AUTO else causal_lm.dtype
    return str(found).removeprefix("torch.")


def _auto_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    found = auto_inference_dtype(stored, device)
    if found is not stored:
        _say_widened(stored, device.type)
    return found


@lru_cache  # once for a process
def _say_widened(stored: torch.dtype, device: str) -> None:
    name = str(stored).removeprefix("torch.")
    _log.warning(
        f"note: weights stored as {name} are held as float32, which takes twice the memory: this machine ({device}) would only "
        f"emulate products of {name}. dtype={name} keeps them as they are."
    )


def _base_folder(adapter: Adapter, check_weights: bool | None) -> Path:
    """The folder of an adapter's base.

    Raises:
        CheckpointError: there is none, or it is an adapter itself.
        ModelError: its weights are not those that were exported.
    """
    try:
        base = model_folder(adapter.base, adapter.base_revision)
    except CheckpointError as error:
        raise CheckpointError(
            f"the base of the adapter in {adapter.location} ({CONFIG_FILE}: base_model_name_or_path): {error}"
        ) from error
    if find_adapter(str(base)) is not None:
        raise CheckpointError(
            f"the base of the adapter in {adapter.location} is an adapter itself: {base}. Merge that one first."
        )
    if (base / FILE_NAME).is_file():
        check_weights_hash(base, Manifest.load(base).weights_hash, always=check_weights)
    return base


def model_folder(name_or_path: str | Path, revision: str | None) -> Path:
    """The local folder of a model: the given one, the export of the given run, or the download of a Hub repository.

    Args:
        name_or_path: a folder, or a Hub name.
        revision: Hub revision.

    Raises:
        CheckpointError: no such folder and no accessible Hub repository, or a run without an export.
    """
    path = user_path(name_or_path)
    if path.is_dir():
        return _export_of(path)
    # A mistyped path must not become a request to the Hub.
    name = str(name_or_path)
    if name.count("/") > 1 or name.startswith((".", "/", "~")) or isinstance(name_or_path, Path):
        raise CheckpointError(f"there is no folder {name_or_path}. Give a run, its 'export' folder, or a Hub name (org/name).")
    try:
        return Path(snapshot_download(name, revision=revision))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"'{name}' is neither a folder nor a model that can be loaded from the Hub: {error}") from error


def _export_of(folder: Path) -> Path:
    """The export inside the folder of a run; any other folder is returned unchanged.

    Raises:
        CheckpointError: the folder is a run, a chain or an ablation, and has no export itself.
    """
    if (folder / FILE_NAME).is_file() or (folder / "config.json").is_file():
        return folder
    export = folder / "export"
    if (export / FILE_NAME).is_file():
        return export
    runs = sorted(path.parent for path in folder.glob(f"*/{_RUN_CONFIG}"))
    if (folder / _RUN_CONFIG).is_file():
        if list_checkpoints(folder / "checkpoints"):
            fix = f"`unified-lm export {folder}` writes one from its newest checkpoint."
        else:
            fix = "It has no checkpoint to write one from either: train it again with export.enabled=true."
        raise CheckpointError(
            f"{folder} is a run without an export: export.enabled was false, or the run is not finished. {fix}"
        )
    if runs:
        raise CheckpointError(f"{folder} holds several runs; name one of them: {', '.join(map(str, runs))}.")
    return folder


def weights_dtype(dtype: str | torch.dtype | None) -> str | torch.dtype:
    """A dtype as transformers takes it; "auto", its word for the stored type, for None and "auto".

    Raises:
        ConfigError: no type of weights.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype in (None, AUTO):
        return "auto"  # transformers' word for the stored type
    resolved = getattr(torch, dtype, None)
    if resolved not in _DTYPES:
        raise ConfigError(f"unknown dtype '{dtype}'; expected auto, float32, bfloat16 or float16.")
    return resolved
