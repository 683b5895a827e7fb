"""Keys and values on disk: one file per text that was read, and a ledger of them.

    folder/ledger.sqlite                 what there is, its size and checksum, the order of use (`retrieval.ledger`)
    folder/entries/3f/3f0a...-9c.safetensors   one entry; the name is a hash of id and states, and the checksum

A file is complete before it has its name, and its name holds its checksum, so no file ever changes: a reader has a whole entry
in its hands, whatever a writer does meanwhile. The row in the ledger decides: it is written after the file and removed before
it. What lies between, after a kill, is a file without a row, which the next writer removes.

Keys are stored as they are in the cache, rotated at the positions at which they were read, which begin at 0. So the first block
of a prompt comes back bit for bit and needs no computation, each other one a rotation. Stored before rotation every block would
need one: 0.1 s for 1,000 tokens of SmolLM2-135M on one busy core, where reading them takes 0.03 s. In bfloat16 it would also
cost the first block precision (relative error of keys 0.0016 as they are, 0.0023 after turning); for blocks that move the two
are equal. (`benchmarks/stored_key_values.py`)
"""

from __future__ import annotations

import errno
import json
import os
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import astuple
from hashlib import blake2b
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import Any

import safetensors
import safetensors.torch
import torch
import xxhash

from unified_lm.batch import Block
from unified_lm.core.errors import ConfigError, OutputError, did_you_mean
from unified_lm.core.files import replacing, sync
from unified_lm.models.key_values import KeyValueCache
from unified_lm.retrieval.eight_bit import dequantize, quantize
from unified_lm.retrieval.ledger import Ledger, Row

STATES = ("bidirectional", "bidirectional_keep_first", "causal")
"""How a text was read: as it is embedded, or as it is generated from."""

FORMS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8}
"""What keys and values are stored as, by name."""

_ABOUT = "unified_lm"
_FORMAT = "key-values 1"
_ENDING = ".safetensors"
_READ_BYTES = 1 << 20
_PARTS = ("keys", "values")
_SCALED = {"keys": -2, "values": -1}
"""The dimension of `[..., K, T, d]` along which neighbors share a scale in the 8-bit form."""


class _Damaged(Exception):
    """Why a file is not what the ledger says."""


class KeyValueStore:
    """Keys and values of texts on disk, by document and by how it was read.

    One process writes at a time (its owner sees to that), while others read. A file that turns out to be truncated, altered or
    missing is reported by a warning and forgotten: it is computed again, like everything here. Not to be carried over a fork.

    Args:
        folder: created if needed.
        form: what new entries are stored as, a key of `FORMS`. Older entries stay as they are.
        budget_bytes: most bytes of all files, or None for no limit. The least recently used entries make room for new ones.

    Raises:
        ConfigError: the form is unknown, or the budget is not positive.
        OutputError: the folder or its ledger cannot be opened or created.
    """

    def __init__(self, folder: Path, form: str = "bfloat16", budget_bytes: int | None = None) -> None:
        if form not in FORMS:
            raise ConfigError(f"unknown form of key-values '{form}'.{did_you_mean(form, FORMS)}")
        if budget_bytes is not None and budget_bytes <= 0:
            raise ConfigError(
                f"a disk budget of {budget_bytes} bytes stores nothing; give a positive number, or None for no limit."
            )
        self.folder = folder
        self.form = form
        self.budget_bytes = budget_bytes
        self._entries = folder / "entries"
        self._writing = threading.Lock()
        self._swept = False
        self._not_flushed: list[Path] = []
        with suppress(FileExistsError):
            self._entries.mkdir(parents=True)
        self._ledger = Ledger(folder / "ledger.sqlite", self._rows_of_files)

    def __enter__(self) -> KeyValueStore:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def __len__(self) -> int:
        return self._ledger.totals()[0]

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return self._ledger.totals()[1]

    def entries(self) -> Iterator[Row]:
        """What is stored, ordered by id and states."""
        return iter(self._ledger)

    def has(self, id: str, states: str) -> bool:
        """Whether there is an entry. `get` may still find its file damaged."""
        _check_states(states)
        return self._ledger.find(id, states) is not None

    def put(self, id: str, states: str, cache: KeyValueCache) -> None:
        """Store an entry, in place of a former one; it is there for every process when this returns, and durable after `flush`.

        Args:
            id: of the document, any text.
            states: how it was read, one of `STATES`.
            cache: on any device, at any positions.

        Raises:
            ConfigError: unknown states; the entry is larger than the budget; its values are too large for the form.
            OutputError: the disk is full, or nothing can be written there. Whole entries are as they were.
        """
        _check_states(states)
        content = _to_bytes(id, states, self.form, cache)
        if self.budget_bytes is not None and len(content) > self.budget_bytes:
            raise ConfigError(
                f"the key-values of document {_shown(id)} take {len(content):,} bytes ({len(cache)} tokens as {self.form}), "
                f"more than the disk budget of {self.budget_bytes:,} bytes. Raise budget_bytes, split the document, "
                "or choose a smaller form (int8)."
            )
        row = Row(id, states, len(content), xxhash.xxh3_64_hexdigest(content))
        with self._writing:
            self._sweep()
            if self.budget_bytes is not None:
                self._unlink(self._ledger.make_room(row.num_bytes, self.budget_bytes, (id, states)))
            former = self._ledger.find(id, states)
            self._write(self._path(row), content)
            self._ledger.record(row)
            if former is not None and former.checksum != row.checksum:
                self._unlink([former])

    def get(
        self, id: str, states: str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> KeyValueCache | None:
        """Read an entry, and note that it was used.

        Args:
            id: of the document.
            states: how it was read, one of `STATES`.
            device: where keys and values go. On the CPU they are read from the mapped file until they are changed.
            dtype: of keys and values. None: as they are stored, float32 for int8. To move an int8 entry to other positions,
                ask for float32, move it, then convert it.

        Returns:
            The cache, or None if there is no whole entry: it must be computed again.

        Raises:
            ConfigError: unknown states.
            OSError: the file is there and may not be read.
        """
        _check_states(states)
        while (row := self._ledger.find(id, states)) is not None:
            try:
                cache = self._read(row, dtype)
            except _Damaged as problem:
                if self._ledger.find(id, states) != row:
                    continue  # replaced or evicted while it was being read
                warnings.warn(f"{self._path(row)} {problem}; document {_shown(id)} is read again", stacklevel=2)
                self._forget(row)
                return None
            self._ledger.use(id, states)
            return cache.to(device, dtype)
        return None

    def delete(self, ids: Iterable[str]) -> int:
        """Remove all entries of some documents; ids that are not stored are passed over.

        Returns:
            The number of entries removed.
        """
        count = 0
        with self._writing:
            for rows in self._ledger.remove((id, states) for id in ids for states in STATES):
                self._unlink(rows)
                count += len(rows)
        return count

    def flush(self) -> None:
        """Make everything stored so far durable.

        Entries are not flushed one by one, which doubles the time of storing them (30 ms against 14 for 2.3 MB). A power
        failure may take those that were stored after the last flush, or leave their files damaged, which reading them finds:
        nothing is lost but what is computed again.
        """
        with self._writing:
            written, self._not_flushed = self._not_flushed, []
        for path in (*written, *sorted({path.parent for path in written})):
            with suppress(FileNotFoundError):  # evicted or replaced meanwhile
                sync(path)
        self._ledger.flush()

    def close(self) -> None:
        """Flush, and give the ledger back. Caches that were read stay valid."""
        if not self._ledger.closed:
            self.flush()
            self._ledger.close()

    def _path(self, row: Row) -> Path:
        name = blake2b(json.dumps([row.id, row.states]).encode(), digest_size=16).hexdigest()
        return self._entries / name[:2] / f"{name}-{row.checksum}{_ENDING}"

    def _write(self, path: Path, content: bytes) -> None:
        try:
            with replacing(path, durable=False) as building:
                building.write_bytes(content)
        except OSError as error:
            raise OutputError(
                f"could not write {path}: {error.strerror or error}. What was stored before is untouched. Make room on the "
                "disk, or give the store a smaller budget (budget_bytes), and try again."
            ) from error
        self._not_flushed.append(path)

    def _read(self, row: Row, dtype: torch.dtype | None) -> KeyValueCache:
        path = self._path(row)
        try:
            size, checksum = _measure(path)
            if size != row.num_bytes:
                raise _Damaged(f"is truncated or altered ({size:,} bytes instead of {row.num_bytes:,})")
            if checksum != row.checksum:
                raise _Damaged("is altered (its content does not have its checksum)")
            return _from_file(path, dtype)
        except FileNotFoundError as error:
            raise _Damaged("is missing") from error
        except OSError as error:
            if error.errno != errno.EIO:  # too many open files, say: no damage
                raise
            raise _Damaged("cannot be read from the disk") from error
        except RuntimeError as error:  # of torch, whose second opening of the file knows no OSError
            if os.strerror(errno.ENOENT) not in str(error):
                raise
            raise _Damaged("is missing") from error
        except (safetensors.SafetensorError, KeyError, ValueError) as error:
            raise _Damaged(f"is not in the format of this version ({error})") from error

    def _forget(self, row: Row) -> None:
        if self._ledger.writable:
            self._unlink([row])
            self._ledger.drop(row)

    def _unlink(self, rows: Iterable[Row]) -> None:
        for row in rows:
            self._path(row).unlink(missing_ok=True)

    def _files(self) -> Iterator[Path]:
        for folder in sorted(self._entries.iterdir()):
            yield from (path for path in folder.iterdir() if path.suffix == _ENDING)

    def _sweep(self) -> None:
        """Before the first write: remove files without a row, which killed writers left."""
        if not self._swept:
            known = {self._path(row) for row in self._ledger}
            for path in self._files():
                if path not in known:
                    path.unlink(missing_ok=True)
            self._swept = True

    def _rows_of_files(self) -> Iterator[Row]:
        """What the files say of themselves, the least recently written first."""
        for path in sorted(self._files(), key=lambda path: path.stat().st_mtime_ns):
            # A file that is cut, was not complete, or is of another version has no row, and is swept.
            with suppress(safetensors.SafetensorError, KeyError, ValueError), safetensors.safe_open(path, "pt") as file:
                about = _metadata(file)
                checksum = path.stem.rpartition("-")[2]
                row = Row(about["id"], about["states"], path.stat().st_size, checksum)
                if self._path(row) == path:
                    yield row


def _check_states(states: str) -> None:
    if states not in STATES:
        raise ConfigError(f"unknown states '{states}' of key-values.{did_you_mean(states, STATES)}")


def _shown(id: str) -> str:
    return repr(id if len(id) <= 60 else f"{id[:57]}...")


def _measure(path: Path) -> tuple[int, str]:
    """Size and checksum of a file."""
    digest, buffer, size = xxhash.xxh3_64(), memoryview(bytearray(_READ_BYTES)), 0
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            size += count
    return size, digest.hexdigest()


def _to_bytes(id: str, states: str, form: str, cache: KeyValueCache) -> bytes:
    """The content of an entry's file.

    Raises:
        ConfigError: a key or a value is too large for the form, or no number.
    """
    tensors = {"token_ids": cache.token_ids.clone(), "position_ids": cache.position_ids.clone()}
    for part, layers in zip(_PARTS, zip(*cache.layers, strict=True), strict=True):
        # Layers of one shape are one tensor: each tensor costs as much as 100 kB.
        for number, (_, alike) in enumerate(groupby(layers, key=lambda values: values.shape)):
            name, stacked = f"{part}.{number}", torch.stack(tuple(alike))
            if form == "int8":
                stacked, scales = quantize(stacked, _SCALED[part])
                tensors[f"{name}.scales"] = scales.cpu()
            tensors[name] = stacked.to("cpu", FORMS[form])
            checked = tensors[f"{name}.scales"] if form == "int8" else tensors[name]
            if form in ("int8", "float16") and not checked.sum(dtype=torch.float32).isfinite():
                raise ConfigError(
                    f"{part} of document {_shown(id)} are beyond the range of {form}, or no numbers. "
                    "Choose the form bfloat16 or float32."
                )
    about = {"format": _FORMAT, "id": id, "states": states, "blocks": [astuple(block) for block in cache.blocks]}
    # One text, because safetensors writes several in random order, and equal entries are equal files.
    return safetensors.torch.save(tensors, {_ABOUT: json.dumps(about)})


def _from_file(path: Path, dtype: torch.dtype | None) -> KeyValueCache:
    """What a whole file holds, on the CPU; keys and values that need no computation are parts of the mapped file."""
    with safetensors.safe_open(path, "pt") as file:
        about = _metadata(file)
        names = set(file.keys())

        def layers_of(part: str) -> Iterator[torch.Tensor]:
            number, dim = 0, _SCALED[part]
            while (name := f"{part}.{number}") in names:
                layers = file.get_tensor(name)
                if f"{name}.scales" in names:  # layer by layer, in the dtype asked for: memory in use is not written twice
                    scales = file.get_tensor(f"{name}.scales")
                    yield from (dequantize(*layer, dim, dtype or torch.float32) for layer in zip(layers, scales, strict=True))
                else:
                    yield from layers
                number += 1

        return KeyValueCache(
            token_ids=file.get_tensor("token_ids"),
            position_ids=file.get_tensor("position_ids"),
            layers=tuple(zip(*map(layers_of, _PARTS), strict=True)),
            blocks=tuple(Block(*block) for block in about["blocks"]),
        )


def _metadata(file: safetensors.safe_open) -> dict[str, Any]:
    about = json.loads((file.metadata() or {}).get(_ABOUT, "{}"))
    if about.get("format") != _FORMAT:
        raise ValueError(f"format {about.get('format')!r}, expected {_FORMAT!r}")
    return dict(about)
