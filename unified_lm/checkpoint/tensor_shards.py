"""The tensors of a checkpoint, one file per writing rank, streamed through memory one tensor at a time.

Every rank sees the same tensors in the same order (`engine.backends.backend.Backend.optimizer_state`), so the ranks agree on
who writes which without communication: each tensor goes to the rank with the fewest bytes so far. Readers do not depend on
which rank wrote a tensor, so a checkpoint is the same set of tensors for any number of ranks.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from unified_lm.core import distributed
from unified_lm.core.errors import CheckpointError
from unified_lm.core.raw_tensors import DTYPE_NAMES, raw_bytes
from unified_lm.core.tracing import trace_span

_HEADER_BYTES = 2**20  # enough for about 8,000 tensors; a longer header costs one more copy of the file
_COPIED_BYTES = 2**26


class ShardWriter:
    """Writes a safetensors file tensor by tensor, with only the current tensor in memory.

    The format starts with a header that is only known at the end. So space is reserved for it, and the unused rest is filled
    with space characters, which the format allows.

    Args:
        path: the file to create.

    Raises:
        OSError: the file could not be written (from every method).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._entries: dict[str, Any] = {}
        self._end = 0
        self._handle = open(path, "w+b")  # noqa: SIM115 - closed by `close`
        self._handle.seek(_HEADER_BYTES)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Append one tensor; the caller may overwrite it afterwards."""
        # offsets are relative to the end of the header, wherever that is
        start, self._end = self._end, self._end + tensor.nbytes
        dtype = DTYPE_NAMES[tensor.dtype]
        self._entries[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, self._end]}
        self._handle.write(raw_bytes(tensor))

    def close(self) -> None:
        """Write the header and flush the file to disk."""
        with self._handle:
            header = json.dumps(self._entries, separators=(",", ":")).encode()
            if len(header) + 8 > _HEADER_BYTES:
                self._make_room(len(header) + 8)
            self._handle.seek(0)
            room = max(_HEADER_BYTES, len(header) + 8) - 8
            self._handle.write(struct.pack("<Q", room) + header.ljust(room))
            self._handle.flush()
            os.fsync(self._handle.fileno())

    def discard(self) -> None:
        """Close the incomplete file without a header."""
        self._handle.close()

    def _make_room(self, num_bytes: int) -> None:
        """Move the tensors behind a longer header, by copying the file."""
        self._handle.close()
        moved = self.path.with_suffix(".moved")
        with open(self.path, "rb") as source, open(moved, "wb") as target:
            source.seek(_HEADER_BYTES)
            target.seek(num_bytes)
            while block := source.read(_COPIED_BYTES):
                with trace_span("make room for the header", waits=False):
                    target.write(block)
        moved.rename(self.path)
        self._handle = open(self.path, "r+b")  # noqa: SIM115 - closed by `close`


def write_shard(tensors: Iterable[tuple[str, torch.Tensor]], folder: Path) -> tuple[list[str], OSError | None]:
    """Write the tensors that are assigned to this rank into one file of `folder`. Collective if iterating over `tensors` is.

    An error does not end the iteration, because every step of it may be a collective that the other ranks wait in.

    Args:
        tensors: whole tensors by name, the same on every rank in the same order.
        folder: an existing folder, the same for every rank.

    Returns:
        The names of the tensors written by this rank, and the error of the operating system, or None.
    """
    rank, num_bytes = distributed.rank(), [0] * distributed.world_size()
    names: list[str] = []
    failure: OSError | None = None
    writer: ShardWriter | None = None
    for name, tensor in _traced(tensors):
        owner = num_bytes.index(min(num_bytes))
        num_bytes[owner] += tensor.nbytes
        if owner != rank or failure is not None:
            continue
        try:
            writer = writer or ShardWriter(folder / shard_name(rank, len(num_bytes)))
            with trace_span(f"write {name}", waits=False):  # the watchdog sees progress tensor by tensor
                writer.add(name, tensor)
            names.append(name)
        except OSError as error:
            failure = error
    if writer is not None:
        failure = _finish(writer, failure)
    return names, failure


def _traced(tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors, each in a span: a rank that writes none of them makes progress with the others."""
    rest = iter(tensors)
    while True:
        with trace_span("gather a tensor"):
            item = next(rest, None)
        if item is None:
            return
        yield item


def _finish(writer: ShardWriter, failure: OSError | None) -> OSError | None:
    try:
        if failure is None:
            with trace_span(f"flush {writer.path.name}", waits=False):
                writer.close()
        else:
            writer.discard()
    except OSError as error:  # buffered data is only written now
        return failure or error
    return failure


def shard_name(rank: int, world_size: int) -> str:
    """Name of the file of one writing rank: `optimizer-00001-of-00002.safetensors` for rank 0 of 2."""
    return f"optimizer-{rank + 1:05d}-of-{world_size:05d}.safetensors"


class ShardReader:
    """Reads single tensors from a checkpoint's files; use it as a context manager.

    Args:
        folder: the checkpoint.
        tensors: file name -> names of the tensors in it.
    """

    def __init__(self, folder: Path, tensors: Mapping[str, Iterable[str]]) -> None:
        self.folder = folder
        self._files = {name: file for file, names in tensors.items() for name in names}
        self._open: dict[str, Any] = {}

    @property
    def names(self) -> frozenset[str]:
        """Names of all tensors."""
        return frozenset(self._files)

    def __call__(self, name: str) -> torch.Tensor:
        """Read one tensor, whole.

        Raises:
            CheckpointError: the file cannot be read.
        """
        with self._reading(name) as file:
            value: torch.Tensor = file.get_tensor(name)
        return value

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, from its file's header.

        Raises:
            CheckpointError: the file cannot be read.
        """
        with self._reading(name) as file:
            return tuple(file.get_slice(name).get_shape())

    def part(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Read `[stop - start]` elements of a flattened tensor, and nothing of the file but the rows that hold them.

        Raises:
            CheckpointError: the file cannot be read.
        """
        width = math.prod(self.shape(name)[1:])
        first, last = start // width, -(-stop // width)
        with self._reading(name) as file:
            rows: torch.Tensor = file.get_slice(name)[first:last]
        return rows.reshape(-1)[start - first * width : stop - first * width]

    @contextmanager
    def _reading(self, name: str) -> Iterator[Any]:
        """The open file of a tensor; an error of reading it becomes ours."""
        file = self._files[name]
        try:
            with trace_span(f"read {name}", waits=False):
                if file not in self._open:
                    self._open[file] = safe_open(self.folder / file, framework="pt")
                yield self._open[file]
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"checkpoint {self.folder}: {file} cannot be read: {error}. Remove it to resume from an earlier one."
            ) from error

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._open.clear()
