"""Checkpoints of a run in progress: all that a bit-exact resume needs, written by all ranks, whole or not at all.

A checkpoint is `run_dir/checkpoints/step-00000050/` with

- `optimizer-00001-of-00002.safetensors`, ...: float32 trained weights (adapters among them) and AdamW's moments, shared out
  among the ranks that wrote it (`checkpoint.tensor_shards`),
- `rng.safetensors`: the random state of every rank,
- `state.json`: step, data cursors, metrics position, identity of what is trained, and every file with its size.

The same tensors whatever the backend and the number of ranks, so it resumes on any other. Which checkpoints there are, and
which one to resume, is `checkpoint.store`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from unified_lm.checkpoint.tensor_shards import ShardReader, shard_name, write_share
from unified_lm.core import distributed
from unified_lm.core.agreement import failures
from unified_lm.core.errors import CheckpointError
from unified_lm.core.files import commit_directory, write_json, write_text
from unified_lm.core.random import RngState

FORMAT = 2
"""Version of the folder's content."""

PREFIX = "step-"
"""A checkpoint's folder is this and the number of steps, eight digits."""

LATEST = "latest"
"""The pointer: a text file beside the checkpoints with the name of the newest one."""

_RNG = "rng.safetensors"
_STATE = "state.json"
_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What a checkpoint belongs to; a resume into anything else is refused.

    Attributes:
        recipe: name of the recipe.
        model: name and content of the starting weights.
        tokenizer: hash of the tokenizer.
        trained: name -> shape of every trained parameter (tells LoRA from full, and one rank from another).
    """

    recipe: str
    model: str
    tokenizer: str
    trained: Mapping[str, tuple[int, ...]]

    def differences(self, found: Mapping[str, Any]) -> list[str]:
        """What a saved identity (as JSON) has otherwise, in words."""
        texts = [
            f"{name}: the checkpoint has {found.get(name)!r}, this run {getattr(self, name)!r}"
            for name in ("recipe", "model", "tokenizer")
            if found.get(name) != getattr(self, name)
        ]
        saved = {name: tuple(shape) for name, shape in found.get("trained", {}).items()}
        different = [name for name in {**saved, **self.trained} if saved.get(name) != self.trained.get(name)]
        if different:
            shapes = [(name, _shape(saved.get(name)), _shape(self.trained.get(name))) for name in different[:_SHOWN]]
            examples = ", ".join(f"{name} ({there} there, {here} here)" for name, there, here in shapes)
            texts.append(f"trained: {len(different)} parameters differ, e.g. {examples}")
        return texts


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else str(list(shape))


@dataclass(frozen=True, kw_only=True)
class RunState:
    """A run between two optimizer steps, but for its tensors.

    Attributes:
        step: optimizer steps taken, skipped ones included.
        skipped: steps whose update was skipped because it was not finite, in all.
        skipped_in_a_row: of those, the ones without a good step since.
        loader: cursors of every stream, as JSON values.
        metrics_bytes: length of metrics.jsonl; what was written after it is cut off on resume.
        num_ranks: processes of the run that wrote it.
        backend: name of the backend of that run; for information.
        identity: what the state belongs to.
    """

    step: int
    skipped: int = 0
    skipped_in_a_row: int = 0
    loader: dict[str, Any]
    metrics_bytes: int
    num_ranks: int
    backend: str
    identity: Identity


def save_state(state: RunState, rng: RngState, tensors: Iterable[tuple[str, torch.Tensor]], folder: Path) -> Path:
    """Write a checkpoint under `folder`, and the pointer to it. Collective; `folder` is one that all ranks share.

    Args:
        state: the run; rank 0's counts.
        rng: this rank's random state.
        tensors: whole tensors by name, the same on every rank in the same order; each may be overwritten by the next.
        folder: where the checkpoints of the run are.

    Returns:
        The folder of the checkpoint.

    Raises:
        CheckpointError: the disk refused, on any rank; raised on every rank. Earlier checkpoints are untouched.
    """
    target = folder / f"{PREFIX}{state.step:08d}"
    building = folder / f".{target.name}.building"
    _raise_together(_start(building), building, target)
    names, failure = write_share(tensors, building)
    _raise_together(failure, building, target)
    shares = distributed.all_gather_objects(names)
    rngs = distributed.all_gather_objects(rng)
    _raise_together(_finish(state, shares, rngs, building, target) if distributed.is_rank0() else None, building, target)
    return target


def _raise_together(failure: Exception | None, building: Path, target: Path) -> None:
    found = failures(failure)
    if found is None:
        return
    if distributed.is_rank0():
        shutil.rmtree(building, ignore_errors=True)
    raise CheckpointError(f"could not write {target}: {found}. What was there before is untouched.") from failure


def _start(building: Path) -> OSError | None:
    if not distributed.is_rank0():
        return None
    try:
        if building.exists():
            shutil.rmtree(building)
        building.mkdir(parents=True)
    except OSError as error:
        return error
    return None


def _finish(state: RunState, shares: list[list[str]], rngs: list[RngState], building: Path, target: Path) -> Exception | None:
    """Rank 0's part: what is not shared out, the rename, the pointer."""
    try:
        save_file(_rng_tensors(rngs), building / _RNG)
        files = {path.name: path.stat().st_size for path in sorted(building.iterdir())}
        tensors = _by_file(shares)
        missing = sorted(set(tensors) - set(files))
        if missing:
            raise OSError(f"rank 0 does not see {missing[0]}: run_dir must be on a file system that all nodes share")
        content = {"format": FORMAT, **asdict(state), "files": files, "tensors": tensors}
        write_json(building / _STATE, content)
        commit_directory(building, target)
        write_text(target.parent / LATEST, f"{target.name}\n")
    except (OSError, SafetensorError) as error:  # a full disk arrives as either
        return error
    return None


def _by_file(shares: list[list[str]]) -> dict[str, list[str]]:
    return {shard_name(rank, len(shares)): names for rank, names in enumerate(shares) if names}


def _rng_tensors(rngs: list[RngState]) -> dict[str, torch.Tensor]:
    tensors = {f"cpu/{rank}": rng.cpu for rank, rng in enumerate(rngs)}
    return tensors | {f"device/{rank}": rng.device for rank, rng in enumerate(rngs) if rng.device is not None}


def torn(path: Path) -> str | None:
    """Why a folder is no complete checkpoint, or None where it is one: its index is read and its files are measured."""
    try:
        content = _read_index(path)
        for name, size in content["files"].items():
            found = (path / name).stat().st_size
            if found != size:
                return f"{name} has {found:,} bytes instead of {size:,}"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, AttributeError) as error:
        return f"{_STATE} cannot be read ({error})"
    return None


def _read_index(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((path / _STATE).read_text(encoding="utf-8"))
    if content.get("format") != FORMAT:
        raise ValueError(f"format {content.get('format')}, expected {FORMAT}")
    return content


def load_state(path: Path, identity: Identity) -> RunState:
    """Read all of a checkpoint but its tensors, and check that it belongs to this run.

    Raises:
        CheckpointError: it is torn, or of another recipe, model or tokenizer (every difference is named).
    """
    reason = torn(path)
    if reason is not None:
        raise CheckpointError(f"checkpoint {path} is not complete: {reason}. Remove it to resume from an earlier one.")
    content = _read_index(path)
    differences = identity.differences(content["identity"])
    if differences:
        raise CheckpointError(
            f"checkpoint {path} belongs to another run. " + "; ".join(differences) + ". Use another run_dir, or resume=none."
        )
    fields = {name: content[name] for name in RunState.__dataclass_fields__ if name != "identity"}
    return RunState(**fields, identity=identity)


def open_tensors(path: Path) -> ShardReader:
    """The tensors of a complete checkpoint."""
    return ShardReader(path, _read_index(path)["tensors"])


def load_rng(path: Path, rank: int) -> RngState:
    """The random state of one rank of the run that wrote a checkpoint.

    Raises:
        CheckpointError: the file cannot be read.
    """
    try:
        tensors = load_file(path / _RNG)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"checkpoint {path}: {_RNG} cannot be read: {error}. Remove the checkpoint to resume from an earlier one."
        ) from error
    return RngState(tensors[f"cpu/{rank}"], tensors.get(f"device/{rank}"))
