"""Splits of a folder of files, told by their names as `datasets` tells them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from unified_lm.core.errors import DataError

EVERY_SPLIT = "all"
_WORDS: Mapping[str, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Words for each split: those of `datasets.data_files.SPLIT_KEYWORDS`."""


def split_of(name: str) -> str | None:
    """The split that a path says, in a folder's name or in the file's own; None if it says none.

    Args:
        name: path of a file relative to its data folder, such as ``train-00000-of-00002.parquet`` or ``dev/nli.jsonl``.
    """
    words = re.split(r"[^a-z]+", name.lower())
    return next((split for word in words for split, names in _WORDS.items() if word in names), None)


def files_of_split(root: Path, files: Sequence[Path], split: str | None) -> list[Path]:
    """The files of a split of a folder.

    As in `datasets`, files that name no split are "train" where no file of the folder names any.

    Args:
        root: the folder, or the only file.
        files: its data files.
        split: "train", "validation" or "test" (or another word for one of them), "all", or None for all files of a folder
            that holds no two splits.

    Raises:
        DataError: no file of the split, or None where there are several.
    """
    if split == EVERY_SPLIT:
        return list(files)
    named = {file: split_of(file.name if file == root else str(file.relative_to(root))) for file in files}
    found = Counter(name for name in named.values() if name)
    there = ", ".join(f"{name} ({count})" for name, count in sorted(found.items()))
    if split is None:
        if len(found) > 1:
            raise DataError(
                f"{root} holds files of several splits: {there}. Say which with split=train, or split={EVERY_SPLIT} for all "
                "files."
            )
        return list(files)
    wanted = split_of(split) or split
    own = [file for file, name in named.items() if name == wanted]
    if not own and not found and wanted == "train":
        return list(files)
    if not own:
        raise DataError(
            f"{root} has no file of the split '{split}': found {there or 'no file that names a split'}. A file belongs to the "
            "split that its name or its folder's says, such as train.jsonl or test/part-0.parquet; name files with path=FILE."
        )
    return own
