"""Folders of the cache that are what was written: checksums of their files lie beside them, and are compared before any use.

The whole of a folder is read, since a sample would pass over a flipped byte. Every process does so once, as long as the files
stay the same (within `reading_once` one process of a machine): 0.3 s for the largest of them, the embedded model (270 MB).
"""

from __future__ import annotations

import json
import warnings
import zlib
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path

from filelock import FileLock

from unified_lm.core.errors import UserError
from unified_lm.core.files import checksum, write_directory, write_json
from unified_lm.core.reading_once import identity, once

LIST = ".checksums.json"
"""The file with the checksums of the others, and with its own; hidden, so that it is no part of what readers find there."""


def cached_folder(target: Path, what: str, fill: Callable[[Path], None]) -> Path:
    """A folder of the cache: filled if it is not there, and again, with a warning, if it is not what was written.

    A folder without the list is filled again too, without a warning. An earlier version wrote it, or the list is lost; to write
    a list of what is there would vouch for whatever happened to it.

    Args:
        target: the folder.
        what: its content, for the warning.
        fill: writes the content into the folder that it receives. One process does, the others wait for it.

    Returns:
        `target`.

    Raises:
        CheckpointError: the operating system refused to write.
        OSError: the folder around it cannot be made or locked.
    """
    if _is_whole(target):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f"{target.name}.lock")):
        if not _is_whole(target, warn_of=what):
            write_directory(target, lambda folder: _fill(folder, fill))
    return target


def _fill(folder: Path, fill: Callable[[Path], None]) -> None:
    fill(folder)
    files = {path.relative_to(folder).as_posix(): checksum(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    write_json(folder / LIST, {"files": files, "list": _checksum_of_list(files)})


def _is_whole(folder: Path, warn_of: str | None = None) -> bool:
    """Whether a folder is what was written; if not, and there was one, a warning says why."""
    if not (folder / LIST).is_file():
        return False
    try:
        said = json.loads((folder / LIST).read_text(encoding="utf-8"))
        files: dict[str, int] = said["files"]
        if said["list"] != _checksum_of_list(files):
            raise ValueError(f"{LIST} is not what was written")
        paths = [folder / name for name in files]
        states = tuple(tuple(identity(path)) for path in paths)
        found = json.loads(once(folder, paths, lambda: json.dumps(_checksums(tuple(paths), states))))
        if changed := [name for name, value in zip(files, found, strict=True) if value != files[name]]:
            raise ValueError(f"{changed[0]} is not what was written")
        return True
    except UserError:  # a cache that cannot be written is not a damaged one
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        if warn_of is not None:
            warnings.warn(f"the cache of {warn_of}, {folder}, is damaged ({error}); it is made again", stacklevel=3)
        return False


def _checksum_of_list(files: Mapping[str, int]) -> int:
    return zlib.crc32(json.dumps(files, sort_keys=True).encode())


@lru_cache(maxsize=256)
def _checksums(files: tuple[Path, ...], states: tuple[tuple[int, ...], ...]) -> tuple[int, ...]:
    """Of files in the states that their identities tell: a file that has changed is read again."""
    return tuple(checksum(path) for path in files)
