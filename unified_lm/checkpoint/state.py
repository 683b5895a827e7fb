"""Checkpoints of a run in progress: everything that a bit-exact resume needs, written atomically by all ranks.

A checkpoint is `run_dir/checkpoints/step-00000050/` with

- `optimizer-00001-of-00002.safetensors`, ...: float32 trained weights (adapters included) and AdamW's moments, distributed
  over the ranks that wrote them (`checkpoint.tensor_shards`),
- `rng.safetensors`: the random state of every rank,
- `state.json`: step, data cursors, length of the metrics file, identity of what is trained, and every file with its size.

The tensors are the same for any backend and number of ranks, so a checkpoint can be resumed on any other. Finding and removing
checkpoints is in `checkpoint.store`.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from unified_lm.checkpoint.tensor_shards import ShardReader, shard_name, write_shard
from unified_lm.core import distributed
from unified_lm.core.agreement import failures
from unified_lm.core.errors import CheckpointError
from unified_lm.core.files import commit_directory, sync, write_json, write_text
from unified_lm.core.random import RngState
from unified_lm.core.tracing import trace_span
from unified_lm.core.typed import read_typed
from unified_lm.core.user_files import parse_json, refusal
from unified_lm.core.watchdog import finish_together

FORMAT = 2
"""Version of the folder's format."""

PREFIX = "step-"
"""A checkpoint's folder is named with this prefix and the number of steps, in eight digits."""

LATEST = "latest"
"""A text file beside the checkpoints with the name of the newest one, for people and scripts; resuming does not trust it."""

_RNG = "rng.safetensors"
STATE = "state.json"
_MAX_EXAMPLES = 3


@dataclass(frozen=True, kw_only=True)
class Identity:
    """The run that a checkpoint belongs to; a run with another identity cannot resume it.

    Attributes:
        recipe: name of the recipe.
        model: name and fingerprint of the starting weights.
        tokenizer: hash of the tokenizer.
        trained: name -> shape of every trained parameter; distinguishes LoRA from full fine-tuning, and LoRA ranks.
        configuration: what the model's configuration says, as dotted key -> JSON value. Keys that only one side has are left
            out of account: versions of transformers write more and fewer, and the first checkpoints none.
    """

    recipe: str
    model: str
    tokenizer: str
    trained: Mapping[str, tuple[int, ...]]
    configuration: Mapping[str, str] = field(default_factory=dict)

    def differences(self, found: Identity) -> list[str]:
        """How a saved identity differs from this one, in words."""
        texts = [
            f"{name}: the checkpoint has {getattr(found, name)!r}, this run {getattr(self, name)!r}"
            for name in ("recipe", "model", "tokenizer")
            if getattr(found, name) != getattr(self, name)
        ]
        texts += [
            f"configuration of the model, {key}: the checkpoint has {value}, this run {self.configuration[key]}"
            for key, value in found.configuration.items()
            if not _same_value(self.configuration.get(key, value), value)
        ]
        saved = found.trained
        different = [name for name in {**saved, **self.trained} if saved.get(name) != self.trained.get(name)]
        if different:
            shapes = [(name, _shape(saved.get(name)), _shape(self.trained.get(name))) for name in different[:_MAX_EXAMPLES]]
            examples = ", ".join(f"{name} ({there} there, {here} here)" for name, there, here in shapes)
            texts.append(f"trained: {len(different)} parameters differ, e.g. {examples}")
        return texts


def _same_value(one: str, other: str) -> bool:
    """Whether two JSON values are equal: 10000 is 10000.0, which versions of transformers write for it."""
    try:
        return one == other or bool(parse_json(one) == parse_json(other))
    except ValueError:
        return False


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else str(list(shape))


@dataclass(frozen=True, kw_only=True)
class RunState:
    """A run between two optimizer steps, without its tensors.

    Attributes:
        step: optimizer steps taken, skipped ones included.
        skipped: total number of steps whose update was skipped because it was not finite.
        skipped_in_a_row: number of skipped steps since the last good one.
        loader: cursors of every stream, as JSON values.
        metrics_bytes: length of metrics.jsonl; a resume cuts off what was written after it.
        num_ranks: processes of the run that wrote it.
        backend: name of the backend of that run, for information only.
        identity: the run that the state belongs to.
        settings: the resolved configuration of the run that wrote it, as JSON values.
    """

    step: int
    skipped: int = 0
    skipped_in_a_row: int = 0
    loader: dict[str, Any]
    metrics_bytes: int
    num_ranks: int
    backend: str
    identity: Identity
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class _Index(RunState):
    """The content of `state.json`.

    Attributes:
        files: name -> bytes of every other file.
        tensors: file name -> names of the tensors in it.
    """

    files: Mapping[str, int]
    tensors: Mapping[str, tuple[str, ...]]


def save_state(state: RunState, rng: RngState, tensors: Iterable[tuple[str, torch.Tensor]], folder: Path) -> Path:
    """Write a checkpoint under `folder`, and the pointer to it. Collective; all ranks must see the same `folder`.

    All ranks write into a temporary folder; rank 0 then adds the index and renames it. After each phase the ranks exchange
    their errors, so that none waits for a rank that has failed, and a folder under its final name is always complete.

    Args:
        state: the run; that of rank 0 is written.
        rng: this rank's random state.
        tensors: whole tensors by name, the same on every rank in the same order; each may be overwritten by the next.
        folder: contains the checkpoints of the run.

    Returns:
        The folder of the checkpoint.

    Raises:
        CheckpointError: a rank could not write; raised on every rank. Earlier checkpoints are unchanged.
    """
    target = folder / f"{PREFIX}{state.step:08d}"
    building = folder / f".{target.name}.building"
    # Also a barrier: no rank writes before the folder exists.
    _raise_together(_start(building), building, target)
    names, failure = write_shard(tensors, building)
    _raise_together(failure, building, target)
    names_by_rank = distributed.all_gather_objects(names)
    rngs = distributed.all_gather_objects(rng)
    failure_of_finish = _finish(state, names_by_rank, rngs, building, target) if distributed.is_rank0() else None
    _raise_together(failure_of_finish, building, target)
    return target


def _raise_together(failure: Exception | None, building: Path, target: Path) -> None:
    """Raise an error on every rank if any rank has one, and remove the temporary folder. Collective."""
    finish_together("files")
    found = failures(failure)
    if found is None:
        return
    if distributed.is_rank0():
        shutil.rmtree(building, ignore_errors=True)
    raise CheckpointError(f"could not write {target}: {found}. What was there before is untouched.") from failure


def _start(building: Path) -> OSError | None:
    """Create the temporary folder on rank 0, in place of one that a killed run left."""
    if not distributed.is_rank0():
        return None
    try:
        if building.exists():
            with trace_span("remove what a killed run left", waits=False):
                shutil.rmtree(building)
        building.mkdir(parents=True)
    except OSError as error:
        return error
    return None


def _finish(
    state: RunState, names_by_rank: list[list[str]], rngs: list[RngState], building: Path, target: Path
) -> Exception | None:
    """Write what only rank 0 writes, rename the folder, and update the pointer; returns an error instead of raising it."""
    try:
        save_file(_rng_tensors(rngs), building / _RNG)
        files = {path.name: path.stat().st_size for path in sorted(building.iterdir())}
        tensors = {shard_name(rank, len(names_by_rank)): names for rank, names in enumerate(names_by_rank) if names}
        # Ranks on other nodes may have written to a local disk, without an error.
        missing = sorted(set(tensors) - set(files))
        if missing:
            raise OSError(f"rank 0 does not see {missing[0]}: run_dir must be on a file system that all nodes share")
        content = {"format": FORMAT, **asdict(state), "files": files, "tensors": tensors}
        # The index comes last: a folder without it is not a checkpoint, and it records the sizes of all other files.
        write_json(building / STATE, content)
        commit_directory(building, target, _flush)
        write_text(target.parent / LATEST, f"{target.name}\n")
    except Exception as error:
        if refusal(error) is None:
            raise
        return error
    return None


def _flush(path: Path) -> None:
    with trace_span(f"flush {path.name}", waits=False):  # the watchdog sees progress file by file
        sync(path)


def _rng_tensors(rngs: list[RngState]) -> dict[str, torch.Tensor]:
    tensors = {f"cpu/{rank}": rng.cpu for rank, rng in enumerate(rngs)}
    return tensors | {f"device/{rank}": rng.device for rank, rng in enumerate(rngs) if rng.device is not None}


def torn(path: Path) -> str | None:
    """Why a folder is not a complete checkpoint, or None if it is one, judged by its index and the sizes of its files."""
    try:
        for name, size in _read_index(path).files.items():
            # Sizes, not hashes: reading a large checkpoint takes minutes, and incomplete files are short.
            found = (path / name).stat().st_size
            if found != size:
                return f"{name} has {found:,} bytes instead of {size:,}"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError) as error:
        return f"{STATE} cannot be read ({error})"
    return None


def _read_index(path: Path) -> _Index:
    """The index of a checkpoint.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged or of another version; the text says how.
    """
    content = parse_json((path / STATE).read_bytes())
    if isinstance(content, Mapping) and content.get("format") != FORMAT:
        raise ValueError(f"format {content.get('format')!r:.60}, expected {FORMAT}")
    problems: list[str] = []
    found: _Index = read_typed(_Index, content, "", problems, open_ended=True)
    if problems:
        raise ValueError(" ".join(problems))
    return found


def load_state(path: Path, identity: Identity) -> RunState:
    """Read everything of a checkpoint except its tensors, and check that it belongs to this run.

    Args:
        path: the checkpoint.
        identity: of this run.

    Raises:
        CheckpointError: it is incomplete, or belongs to another recipe, model or tokenizer; the text names every difference.
    """
    reason = torn(path)
    if reason is not None:
        raise CheckpointError(f"checkpoint {path} is not complete: {reason}. Remove it to resume from an earlier one.")
    found = _read_index(path)
    differences = identity.differences(found.identity)
    if differences:
        raise CheckpointError(
            f"checkpoint {path} belongs to another run. " + "; ".join(differences) + ". Use another run_dir, or resume=none."
        )
    fields = {name: getattr(found, name) for name in RunState.__dataclass_fields__ if name != "identity"}
    return RunState(**fields, identity=identity)


def saved_settings(path: Path) -> dict[str, Any] | None:
    """The configuration of the run that wrote a complete checkpoint; None if it was written before checkpoints kept it."""
    return _read_index(path).settings or None


def saved_metrics(path: Path) -> int:
    """The length in bytes that the metrics of its run had at a complete checkpoint."""
    return _read_index(path).metrics_bytes


def open_tensors(path: Path) -> ShardReader:
    """The tensors of a complete checkpoint."""
    return ShardReader(path, _read_index(path).tensors)


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
