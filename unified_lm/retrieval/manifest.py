"""What an index says about itself: which model it is of, and how its documents were read."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from unified_lm.core.errors import CheckpointError
from unified_lm.core.files import write_json
from unified_lm.core.folder_lock import LOCK_FILE
from unified_lm.core.outputs import check_folder
from unified_lm.core.typed import require_typed
from unified_lm.core.user_files import read_json

FILE_NAME = "index.json"
VECTORS, KEY_VALUES = "vectors", "key_values"
_FORMAT = 1


def check_place(folder: Path) -> None:
    """Check that an index may be made in a folder, or is there already.

    Raises:
        OutputError: something else is there.
    """
    only_locked = folder.is_dir() and not folder.is_symlink() and [path.name for path in folder.iterdir()] == [LOCK_FILE]
    if not (folder / FILE_NAME).exists() and not only_locked:  # a lock is what an indexer leaves that was killed at once
        check_folder(folder, None)


@dataclass(frozen=True, kw_only=True)
class IndexManifest:
    """The settings of an index; they do not change after it was created.

    Attributes:
        model_key: hash of everything that its vectors depend on (`UnifiedLM.embedding_key`).
        model: where the model was loaded from, so that a command need not be told.
        dim: dimensions of a vector.
        max_tokens: limit of a document with its prompt.
        on_long: what happens to longer ones, "cut" or "split".
        engine: name of the vector engine.
        address: of its server, or "" for a folder in the index.
        states: how documents are read for answers: "bidirectional", "causal", both, or none.
        form: what keys and values are stored as.
        budget_bytes: limit of the keys and values on disk, or None.
    """

    model_key: str
    model: str
    dim: int
    max_tokens: int
    on_long: str
    engine: str
    address: str
    states: tuple[str, ...]
    form: str
    budget_bytes: int | None
    format: int = _FORMAT

    def check_same(self, folder: Path, wanted: IndexManifest) -> None:
        """Refuse to add to an index that was made otherwise.

        Raises:
            CheckpointError: a setting differs; where the model was loaded from does not matter.
        """
        names = [item.name for item in fields(self) if item.name != "model"]
        if differing := [name for name in names if getattr(self, name) != getattr(wanted, name)]:
            told = "; ".join(f"{name} is {getattr(self, name)}, asked for {getattr(wanted, name)}" for name in differing)
            raise CheckpointError(f"{folder} is an index that was made otherwise: {told}. Use its settings, or another folder.")

    def save(self, folder: Path) -> None:
        """Write it into the folder of an index, atomically."""
        write_json(folder / FILE_NAME, asdict(self))

    @staticmethod
    def remove(folder: Path) -> None:
        """Take back an index that was made just now, and whatever its engine has left."""
        (folder / FILE_NAME).unlink(missing_ok=True)
        for part in (VECTORS, KEY_VALUES):
            shutil.rmtree(folder / part, ignore_errors=True)

    @classmethod
    def load(cls, folder: Path) -> IndexManifest:
        """Read it.

        Raises:
            CheckpointError: there is none, it is damaged, or of another version.
        """
        path = folder / FILE_NAME
        if not path.is_file():
            raise CheckpointError(f"{folder} is no index: it has no {FILE_NAME}. Make one with `unified-lm index`.")
        fix = "Build the index again, or restore the file."
        values = read_json(path, CheckpointError, fix=fix)
        if isinstance(values, Mapping) and values.get("format") != _FORMAT:
            raise CheckpointError(
                f"{path} has format {values.get('format')!r:.60}, and this version reads {_FORMAT}. Build the index again."
            )
        return require_typed(cls, values, path, CheckpointError, fix=fix, open_ended=True)
