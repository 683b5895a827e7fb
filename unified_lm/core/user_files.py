"""Paths and files that a user names: found and read with messages that name them.

Where the operating system and the libraries say too little: a path with an unknown `~user`, a JSON file that is damaged, and a
full disk, whose error names no file, or comes as an error of the library that writes.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from unified_lm.core.errors import DataError, UserError


def user_path(text: str | Path) -> Path:
    """A path as a user writes it, with `~` and `~user` expanded; `./~name` is a name that begins so.

    Raises:
        UserError: there is no such user, or the text can be no path.
    """
    raw = str(text)
    if "\0" in raw:
        raise UserError(f"{raw!r} is no path: it holds a NUL character.")
    expanded = os.path.expanduser(raw)
    if raw.startswith("~") and expanded == raw:
        raise UserError(f"{text}: there is no user of that name. A folder whose name begins with ~ is written ./~name.")
    path = Path(expanded)
    return path.absolute() if str(path).startswith("~") else path  # Path drops "./", and the next reader would expand it


class RepeatedKeyError(ValueError):
    """An object that has one key more than once, of which a reader would keep the last value in silence.

    Attributes:
        key: the key.
    """

    def __init__(self, key: object) -> None:
        super().__init__(f"an object has the key '{key}' more than once; keep one of them")
        self.key = key


def single_keys(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    """An object of its pairs, for `object_pairs_hook`.

    Raises:
        RepeatedKeyError: a key comes twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise RepeatedKeyError(next(key for index, key in enumerate(keys) if key in keys[:index]))
    return found


def parse_json(text: str | bytes) -> Any:
    """`json.loads`, whose every failure is a ValueError.

    Raises:
        ValueError: not UTF-8, not JSON, nested too deeply, a number of too many digits, or a key that comes twice in an object;
            the text says which.
    """
    try:
        return json.loads(text, object_pairs_hook=single_keys)
    except RecursionError as error:
        raise ValueError("nested too deeply to be read") from error


class _YamlLoader(yaml.SafeLoader):
    """YAML whose mappings have each key once. (Recipes are read by OmegaConf, which refuses repeated keys too.)"""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """See `yaml`; keys that are merged in (`<<`) may be given anew."""
        single_keys([(self.construct_object(key, deep=True), None) for key, _ in node.value if key.tag != _MERGE])
        return super().construct_mapping(node, deep)


_MERGE = "tag:yaml.org,2002:merge"


def parse_yaml(text: bytes) -> Any:
    """`yaml.safe_load`, whose every failure is a ValueError.

    Raises:
        ValueError: not YAML, nested too deeply, or a key that comes twice in a mapping; the text says which.
    """
    try:
        return yaml.load(text, _YamlLoader)
    except (yaml.YAMLError, TypeError) as error:  # a key that is a list, say
        raise ValueError(str(error)) from error
    except RecursionError as error:
        raise ValueError("nested too deeply to be read") from error


def read_json(path: Path, kind: type[UserError] = DataError, *, fix: str) -> Any:
    """The content of a JSON file.

    Args:
        path: the file.
        kind: the error to raise.
        fix: what to do about a damaged file, a sentence.

    Raises:
        UserError: of the given kind: the file cannot be read, or is not JSON.
    """
    try:
        return parse_json(path.read_bytes())
    except OSError as error:
        raise kind(f"cannot read {path}: {error.strerror or error}.") from error
    except ValueError as error:
        raise kind(f"{path} is not valid JSON ({error}). {fix}") from error


def refusal(error: BaseException) -> OSError | None:
    """What the operating system refused, whichever library passes it on; None for any other error.

    numpy tells of a short write in words alone. Libraries written in Rust (safetensors, tokenizers) raise errors of their own
    kinds, whose texts end in its number.
    """
    if number := _RUST.search(str(error)) if not isinstance(error, OSError | UserError) else None:
        return OSError(int(number[1]), os.strerror(int(number[1])))
    if type(error) is OSError and _SHORT_WRITE.fullmatch(str(error)):
        return OSError(errno.EIO, f"not everything could be written: {error}")
    return error if isinstance(error, OSError) else None


_RUST = re.compile(r"\(os error (\d+)\)")
_SHORT_WRITE = re.compile(r"\d+ requested and \d+ written")


@contextmanager
def naming(path: Path, building: Path | None = None) -> Iterator[None]:
    """What the operating system refuses inside names this file, if it names none (while writing to a full disk, say).

    Args:
        path: the file that the user knows.
        building: the temporary file in its place, for which it stands in messages.

    Raises:
        OSError: as inside, or in place of another library's error (see `refusal`).
    """
    try:
        yield
    except Exception as error:
        found = refusal(error)
        if found is None or found.errno is None:
            raise
        names = {str(name) for name in (found.filename, found.filename2) if name is not None}
        if names and str(building) not in names:
            raise
        found.filename, found.filename2 = str(path), None
        if found is error:
            raise
        raise found from error


def explain_os_error(error: OSError) -> str | None:
    """A sentence for what the operating system refused, with the path if there is one; None for an error of another kind.

    The path is one that the user gave, or lies below one: the package opens no others but its caches, which the user places.
    """
    if error.errno is None:
        return None
    names = " and ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
    shown = names or "the operating system refused"
    if len(names) >= 300:
        shown = f"{names[:150]}...{names[-50:]}"
    hint = _HINTS.get(error.errno, "")
    return f"{shown}: {error.strerror}.{hint}"


_HINTS = {
    errno.EIO: " Look whether the disk is full or damaged; what was complete before is as it was.",
    errno.EFBIG: " Allow larger files there (ulimit -f), or name another place; what was complete before is as it was.",
    errno.ENOSPC: " Make room there, or name another place; what was complete before is as it was.",
    errno.EDQUOT: " Make room there, or name another place; what was complete before is as it was.",
    errno.EROFS: " Name another place.",
    errno.EACCES: " Change its permissions, or name another place.",
    errno.EPERM: " Change its permissions, or name another place.",
    errno.ENOENT: " Check the path; relative ones begin at the working directory.",
    errno.EISDIR: " Name a file.",
    errno.ENOTDIR: " A part of the path is a file.",
    errno.EEXIST: " Name another place.",
    errno.ENAMETOOLONG: " Name a shorter one.",
}
