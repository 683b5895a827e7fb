"""Outputs that a user names: what may stand in their place is replaced only where this package wrote it.

Every folder that receives an output also receives `.unified_lm_written`: one JSON line per file with its name, size, hash, and
whether it was written alone or with a folder of some kind; the latest line of a name counts. A file is ours while it is what
the line says; a folder is ours while it holds nothing but such files. Everything else is the user's: it is left alone, and the
command ends before its work, not after it. A folder of ours is replaced by one of its own kind only, and not while it also
holds files that were written alone, which are outputs of their own. What a command reads is not replaced by what it writes
either, whoever wrote it.

The runs' own folders have other rules (`assembly.run_folder`), and so do the caches, which nobody else writes to.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from unified_lm.core.errors import OutputError
from unified_lm.core.files import replacing, write_directory

RECORD = ".unified_lm_written"
"""Name of the file that lists what this package wrote into a folder."""

_HASHED_BYTES = 1 << 26
"""Larger files (weights) are known by their size: reading gigabytes to replace them would take minutes."""

_ALONE = "file"
"""What stands for a kind in the line of a file that was written alone."""


@dataclass(frozen=True)
class FolderKind:
    """A kind of folder that a command writes as a whole; `write_folder` replaces a folder of the same kind only.

    Attributes:
        name: in the record and in messages.
        mark: a file that each such folder has; it tells the kind where an earlier version wrote the record, which names none.
    """

    name: str
    mark: str


@dataclass(frozen=True)
class _Written:
    """A file as it was when it was written.

    Size in bytes; hash, or "" for a file too large to hash; kind of its folder, `_ALONE`, or "" by an earlier version.
    """

    size: int
    digest: str
    kind: str


_inputs: tuple[Path, ...] = ()


def note_inputs(paths: Iterable[Path]) -> None:
    """Say what the command under way reads, instead of what the one before it did; a run stands for its export."""
    global _inputs
    named = [Path(os.path.expanduser(path)) for path in paths]
    _inputs = tuple(each for path in named for each in (path, path / "export") if os.path.exists(each))


def _refuse_inputs(target: Path, inputs: Iterable[Path]) -> None:
    place = target.resolve()
    for path in (*_inputs, *inputs):
        if place in (read := path.resolve(), *read.parents):
            holds = "is" if read == place else f"holds {path},"
            raise OutputError(f"{target} {holds} what this command reads; {_UNCHANGED} Name another output.")


def check_folder(target: Path, kind: FolderKind | None, inputs: Iterable[Path] = ()) -> None:
    """Check that `target` may become a folder that a command writes as a whole.

    It may if nothing is there, if it is an empty folder, or if it holds nothing but what this package wrote there as a folder
    of the same kind, and nothing that the command reads.

    Args:
        target: the folder.
        kind: what is to be written there; None for what needs an empty place, because no `write_folder` makes it (an index,
            vectors).
        inputs: what is read, beside what `note_inputs` was told.

    Raises:
        OutputError: it is a file or a link, the working directory or above it, or holds anything else; or it cannot be made.
    """
    if target.is_symlink():
        raise OutputError(f"{target} is a link to {os.readlink(target)}; {_UNCHANGED} Name the folder itself, or another one.")
    if not target.exists():
        _check_parent(target)
        return
    if not target.is_dir():
        raise OutputError(f"{target} is a file, and a folder is to be written there; {_UNCHANGED} Name a folder.")
    if target.resolve() in (here := Path.cwd().resolve(), *here.parents):
        raise OutputError(f"{target} is the working directory or a folder above it; {_UNCHANGED} Name a folder in it.")
    if foreign := _foreign(target):
        raise OutputError(
            f"{target} holds what unified_lm did not write there, or what was changed since: {_few(foreign)}; {_UNCHANGED} "
            "Name another folder, or move this one away."
        )
    _refuse_inputs(target, inputs)
    if other := _of_another_kind(target, kind):
        raise OutputError(
            f"{target} holds other outputs of unified_lm: {_few(other)}; {_UNCHANGED} "
            "Name another folder, or move this one away."
        )
    _check_parent(target)


def write_folder(target: Path, kind: FolderKind, fill: Callable[[Path], None]) -> None:
    """Like `core.files.write_directory`, where `check_folder` allows it; the folder lists its files.

    Raises:
        OutputError: see `check_folder`.
        CheckpointError: the operating system refused to write.
    """
    target = Path(os.path.abspath(target))
    check_folder(target, kind)

    def fill_and_list(building: Path) -> None:
        """Fill the folder, and list what is in it then."""
        fill(building)
        (building / RECORD).unlink(missing_ok=True)
        _record(building, sorted(_files(building)), kind.name)
        check_folder(target, kind)  # what takes its place now may have come while it was filled

    if target.is_dir() and not any(target.iterdir()):
        target.rmdir()
    write_directory(target, fill_and_list)


def check_file(path: Path, inputs: Iterable[Path] = ()) -> None:
    """Check that `path` may become a file that a command writes.

    It may if nothing is there, or a file that this package wrote there, alone, and the command does not read.

    Args:
        path: the file.
        inputs: what is read, beside what `note_inputs` was told.

    Raises:
        OutputError: it is a folder, a link, or a file that another program wrote or changed; or it cannot be made.
    """
    if path.is_symlink():
        raise OutputError(f"{path} is a link to {os.readlink(path)}; {_UNCHANGED} Name the file itself, or another one.")
    if path.is_dir():
        raise OutputError(f"{path} is a folder, and a file is to be written there; {_UNCHANGED} Name a file.")
    written = _recorded(path.parent).get(path.name) if path.exists() else None
    if path.exists() and not _is_ours(path, written):
        raise OutputError(
            f"{path} exists, and unified_lm did not write it, or it was changed since; {_UNCHANGED} "
            "Name another file, or move this one away."
        )
    if written is not None and written.kind not in (_ALONE, ""):
        raise OutputError(
            f"{path} is part of another output of unified_lm, the folder it lies in ({written.kind}); {_UNCHANGED} "
            "Name another file."
        )
    _refuse_inputs(path, inputs)
    _check_parent(path)


def check_files(paths: Iterable[Path], inputs: Iterable[Path] = ()) -> None:
    """`check_file` for several."""
    inputs = tuple(inputs)
    for path in paths:
        check_file(path, inputs)


@contextmanager
def building_file(path: Path) -> Iterator[Path]:
    """A temporary sibling to write, with the same extension: renamed to `path` after the block, where `check_file` allows it.

    Raises:
        OutputError: see `check_file`.
        OSError: the disk reported an error, which names `path`; no partial file remains.
    """
    check_file(path)

    def record(building: Path) -> None:
        """The line before the rename: a crash between them leaves a line without its file, which is harmless."""
        check_file(path)
        _record(path.parent, [building], _ALONE, [path.name])

    with replacing(path, record) as building:
        yield building


def write_file(path: Path, write: Callable[[Path], object]) -> Path:
    """Write a file under a temporary name, and rename it where `check_file` allows it.

    Args:
        path: the file; its folder is created.
        write: writes the content to the path that it receives, which has the same extension.

    Returns:
        `path`.

    Raises:
        OutputError: see `check_file`.
        OSError: the disk reported an error; no partial file remains.
    """
    with building_file(path) as building:
        write(building)
    return path


def write_text_file(path: Path, text: str) -> Path:
    """`write_file` with a text in UTF-8."""
    return write_file(path, lambda building: building.write_bytes(text.encode()))


def write_json_file(path: Path, value: Any) -> Path:
    """`write_file` with indented JSON and a final newline."""
    return write_text_file(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


_UNCHANGED = "nothing was changed."


def _check_parent(path: Path) -> None:
    """Check that the folders above a path exist or can be made, and that the file system takes its name."""
    above = next(folder for folder in Path(os.path.abspath(path)).parents if folder.exists())
    if not above.is_dir():
        raise OutputError(f"cannot write {path}: {above} is a file, not a folder.")
    if not os.access(above, os.W_OK | os.X_OK):
        raise OutputError(f"cannot write {path}: no permission to write in {above}.")
    longest = os.pathconf(above, "PC_NAME_MAX")
    for name in Path(os.path.abspath(path)).relative_to(above).parts:
        if len(os.fsencode(name)) > longest:
            raise OutputError(f"cannot write {path}: a name of more than {longest} bytes. Name a shorter one.")
    try:
        tempfile.TemporaryFile(dir=above).close()  # what has permission may still be read-only, full, or no real folder (/proc)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {above} takes no files ({error.strerror}).") from error


def _files(folder: Path) -> list[Path]:
    """Everything in a folder and its folders but folders; a link is one of them, wherever it leads."""
    return [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]


def _foreign(folder: Path) -> list[str]:
    """What a folder holds that is not as this package wrote it, sorted; empty folders included."""
    recorded = _recorded(folder)
    kept_folders = {parent for name in recorded for parent in Path(name).parents}
    found = [path for path in folder.rglob("*") if path != folder / RECORD]
    return sorted(
        str(name)
        for path in found
        if (name := path.relative_to(folder))
        and not (name in kept_folders if path.is_dir() and not path.is_symlink() else _is_ours(path, recorded.get(str(name))))
    )


def _of_another_kind(folder: Path, kind: FolderKind | None) -> list[str]:
    """What a folder of ours holds that was not written with a folder of this kind, sorted, each with what it is."""
    recorded = {name: written for name, written in _recorded(folder).items() if (folder / name).exists()}
    own = set() if kind is None else {kind.name, *([""] if kind.mark in recorded else [])}
    return sorted(
        f"{name} ({written.kind or 'of an earlier version'})" for name, written in recorded.items() if written.kind not in own
    )


def _few(names: Sequence[str]) -> str:
    """The first three, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _is_ours(path: Path, written: _Written | None) -> bool:
    if written is None or path.is_symlink() or not path.is_file() or path.stat().st_size != written.size:
        return False
    return not written.digest or _digest(path) == written.digest


def _recorded(folder: Path) -> dict[str, _Written]:
    """Name -> what was written last, by the record of a folder; what a torn line says is unknown."""
    found: dict[str, _Written] = {}
    if not (folder / RECORD).is_file():
        return found
    for line in (folder / RECORD).read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            entry = json.loads(line)
            found[str(entry["name"])] = _Written(int(entry["size"]), str(entry["hash"]), str(entry.get("kind", "")))
        except (ValueError, KeyError, TypeError):
            continue
    return found


def _record(folder: Path, files: Iterable[Path], kind: str, names: Iterable[str] | None = None) -> None:
    """Append lines about files: one write, so that processes that write into one folder do not lose each other's lines."""
    files = list(files)
    names = [str(path.relative_to(folder)) for path in files] if names is None else names
    lines = []
    for path, name in zip(files, names, strict=True):
        size = path.stat().st_size
        digest = _digest(path) if size <= _HASHED_BYTES else ""
        lines.append(json.dumps({"name": name, "size": size, "hash": digest, "kind": kind}) + "\n")
    with open(folder / RECORD, "ab") as handle:
        handle.write("".join(lines).encode())


def _digest(path: Path) -> str:
    return blake2b(path.read_bytes(), digest_size=16).hexdigest()
