"""Whether a folder's weights are those that were exported: the hash of its files, and that none is missing."""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

from unified_lm.core.errors import CheckpointError, ModelError, UserError
from unified_lm.models.load_errors import check_complete
from unified_lm.models.quiet import quiet_loading

CHECKED_BYTES = 2 << 30
"""Weights up to this size, in bytes, are compared at every load, which takes at most about three seconds. Those of a 7B model
take twenty, longer than loading them: they are compared before training, and on request."""

_READ_BYTES = 1 << 24


def hash_weights(directory: Path) -> str:
    """BLAKE2b (128 bits, hexadecimal) of names and contents of a folder's `*.safetensors` files, subfolders included."""
    digest = blake2b(digest_size=16)
    for path in _weight_files(directory):
        digest.update(f"{path.relative_to(directory).as_posix()}\x1f{path.stat().st_size}\x1e".encode())
        with open(path, "rb") as handle:
            while block := handle.read(_READ_BYTES):
                digest.update(block)
    return digest.hexdigest()


def check_weights_hash(directory: Path, recorded: str, *, always: bool | None = None) -> None:
    """Compare a folder's weights with the hash that its manifest records.

    Args:
        directory: the export.
        recorded: the manifest's `weights_hash`; "" records none, and nothing is compared.
        always: whether to compare; None does up to `CHECKED_BYTES`.

    Raises:
        ModelError: the files are not those that were exported.
    """
    if always is None:
        always = sum(path.stat().st_size for path in _weight_files(directory)) <= CHECKED_BYTES
    if not recorded or not always:
        return
    found = hash_weights(directory)
    if found != recorded:
        raise ModelError(
            f"the weights in {directory} are not those that were exported: their hash is {found}, its unified_lm.json records "
            f"{recorded}. The files are damaged or were replaced: copy them again, or export the run again. If you changed "
            'them on purpose, set "weights_hash" to "" in unified_lm.json.'
        )


def check_weights(directory: Path, recorded: str) -> None:
    """Check weights that are read by others than us, or passed on as they are: compared, whatever their size, and none missing.

    Args:
        directory: a model, or an adapter, whose base is not looked at.
        recorded: the manifest's `weights_hash`; "" records none.

    Raises:
        ModelError: the files are not those that were exported, or weights are missing from them.
        CheckpointError: no model can be made of the folder.
    """
    check_weights_hash(directory, recorded, always=True)
    if (directory / "adapter_config.json").is_file():
        return
    try:
        with quiet_loading(reports=False):  # on no device: names and shapes are compared, and no value is read
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                directory, device_map="meta", local_files_only=True, output_loading_info=True
            )
    except UserError:
        raise
    except Exception as error:  # a damaged file can make the libraries raise anything, bare Exception included
        said = " ".join(str(error).split())[:300]
        raise CheckpointError(f"cannot load the model in {directory}: {type(error).__name__}: {said}") from error
    causal_lm, info = loaded
    check_complete(info, str(directory), causal_lm)


def _weight_files(directory: Path) -> list[Path]:
    return sorted(directory.rglob("*.safetensors"))
