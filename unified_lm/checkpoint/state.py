"""Checkpoints of a run in progress: all that a bit-exact resume needs, written whole or not at all.

A checkpoint is `run_dir/checkpoints/step-00000050/` with

- `optimizer.safetensors`: float32 trained weights and AdamW's moments,
- `rng.safetensors`: the random state of every rank,
- `state.json`: step, data cursors, metrics position, and the identity of what is trained.

A folder under its final name is complete (`core.files.write_directory`), so the newest one is the one to resume.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from unified_lm.core.errors import CheckpointError
from unified_lm.core.files import write_directory
from unified_lm.core.random import RngState

_PREFIX = "step-"


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What a checkpoint belongs to; a resume into anything else is refused.

    Attributes:
        recipe: name of the recipe.
        model: name and content of the starting weights.
        tokenizer: hash of the tokenizer.
        trained: hash of the names and shapes of the trained parameters (tells LoRA from full, and one rank from another).
    """

    recipe: str
    model: str
    tokenizer: str
    trained: str


@dataclass(frozen=True, kw_only=True)
class RunState:
    """A run between two optimizer steps.

    Attributes:
        step: optimizer steps taken.
        optimizer: float32 weights and moments, by name.
        loader: cursors of every stream, as JSON values.
        rng: the random state of every rank, by rank.
        metrics_bytes: length of metrics.jsonl; what was written after it is cut off on resume.
        identity: what the state belongs to.
    """

    step: int
    optimizer: dict[str, torch.Tensor]
    loader: dict[str, Any]
    rng: tuple[RngState, ...]
    metrics_bytes: int
    identity: Identity


def save_state(state: RunState, folder: Path, keep_last: int) -> Path:
    """Write a checkpoint under `folder`, then remove all but the newest `keep_last`.

    Raises:
        CheckpointError: the disk refused; earlier checkpoints are untouched.
    """
    target = folder / f"{_PREFIX}{state.step:08d}"
    write_directory(target, lambda building: _fill(state, building))
    for old in list_checkpoints(folder)[: -max(1, keep_last)]:
        shutil.rmtree(old)
    return target


def _fill(state: RunState, building: Path) -> None:
    rng = {}
    for rank, captured in enumerate(state.rng):
        rng[f"cpu/{rank}"] = captured.cpu
        if captured.device is not None:
            rng[f"device/{rank}"] = captured.device
    try:
        save_file({name: t.detach().contiguous() for name, t in state.optimizer.items()}, building / "optimizer.safetensors")
        save_file(rng, building / "rng.safetensors")
    except SafetensorError as error:  # a full disk arrives as this type, not as OSError
        raise OSError(str(error)) from error
    content = {
        "step": state.step,
        "loader": state.loader,
        "metrics_bytes": state.metrics_bytes,
        "num_ranks": len(state.rng),
        "identity": asdict(state.identity),
    }
    (building / "state.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints under `folder`, oldest first."""
    return sorted(path for path in folder.glob(f"{_PREFIX}*") if (path / "state.json").is_file())


def find_checkpoint(resume: str, folder: Path) -> Path | None:
    """The checkpoint that `resume` names.

    Args:
        resume: "none", "auto" (the newest under `folder`, None when there is none) or a path.
        folder: where this run keeps its checkpoints.

    Raises:
        CheckpointError: a path was given that is no checkpoint.
    """
    if resume == "none":
        return None
    if resume == "auto":
        found = list_checkpoints(folder)
        return found[-1] if found else None
    path = Path(resume)
    if (path / "state.json").is_file():
        return path
    inside = list_checkpoints(path / "checkpoints") or list_checkpoints(path)
    if inside:
        return inside[-1]
    raise CheckpointError(
        f"resume={resume} is no checkpoint: expected a folder with state.json, or a run with checkpoints/. "
        "Use resume=auto to continue the newest checkpoint of run_dir."
    )


def check_identity(path: Path, identity: Identity) -> dict[str, Any]:
    """Check that a checkpoint belongs to this run, without reading its tensors; returns the content of state.json.

    Raises:
        CheckpointError: it is torn, or of another recipe, model or tokenizer (every difference is named).
    """
    try:
        content: dict[str, Any] = json.loads((path / "state.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise _unreadable(path, error) from error
    found = content["identity"]
    differences = [
        f"{name}: the checkpoint has {found.get(name)!r}, this run {value!r}"
        for name, value in asdict(identity).items()
        if found.get(name) != value
    ]
    if differences:
        raise CheckpointError(
            f"checkpoint {path} belongs to another run. " + "; ".join(differences) + ". Use another run_dir, or resume=none."
        )
    return content


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"checkpoint {path} cannot be read: {error}. Remove it to resume from an earlier one.")


def load_state(path: Path, identity: Identity) -> RunState:
    """Read a checkpoint of this run.

    Raises:
        CheckpointError: see `check_identity`.
    """
    content = check_identity(path, identity)
    try:
        optimizer = load_file(path / "optimizer.safetensors")
        rng = load_file(path / "rng.safetensors")
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from error
    return RunState(
        step=content["step"],
        optimizer=optimizer,
        loader=content["loader"],
        rng=tuple(RngState(rng[f"cpu/{rank}"], rng.get(f"device/{rank}")) for rank in range(content["num_ranks"])),
        metrics_bytes=content["metrics_bytes"],
        identity=identity,
    )
