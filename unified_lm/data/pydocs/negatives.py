"""Hard negatives for the built-in pairs: other objects of the same module, derived from the pairs file on first use.

The negatives of a row are the documents of the objects whose qualified names have the longest common prefix with its own
(methods of the same class first, then the same module, then the same package); ties are ordered by a hash of both names. They
resemble the answer in vocabulary and style. Since pydocs has no near-duplicate texts, hardly any of them answers the query.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from unified_lm.core.cached_folder import cached_folder
from unified_lm.core.errors import DataError
from unified_lm.core.files import cache_dir

PART = "hard_pairs"
"""Name of the subset with all rows; `hard_pairs/PACKAGE` has those of one package ("python" is the standard library)."""
NUM_NEGATIVES = 7
VERSION = 1
"""Increase when a change below alters the result."""
_NAME = re.compile(r"[\w.]+")
_HUGE = 400
"""Number of neighbors in sorted order that are considered on either side."""


def hard_pairs_file(pairs: Path, package: str | None, packages: Sequence[str]) -> Path:
    """The file of pairs with hard negatives, built beside the file of `pairs` if this machine lacks it.

    Args:
        pairs: a pydocs file of pairs (one split).
        package: only rows of this package; None for all rows.
        packages: the packages that pydocs reads besides the standard library.

    Raises:
        DataError: no rows of that package.
    """
    target = cache_dir("pydocs_negatives", f"{pairs.parent.name}-{pairs.stem}-{VERSION}")
    cached_folder(target, f"pydocs/{PART}", lambda folder: _fill(folder, pairs, packages))
    file = target / f"{package or 'all'}.jsonl"
    if not file.is_file():
        known = sorted(path.stem for path in target.glob("*.jsonl") if path.stem != "all")
        raise DataError(f"pydocs has no {PART} of the package '{package}' here; it has {', '.join(known)}.")
    return file


def _fill(folder: Path, pairs: Path, packages: Sequence[str]) -> None:
    rows = [json.loads(line) for line in pairs.read_text(encoding="utf-8").split("\n") if line]
    by_package: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in with_negatives(rows):
        top = object_name(row).partition(".")[0]
        by_package[top if top in packages else "python"].append(row)
        by_package["all"].append(row)
    for name, content in by_package.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def object_name(row: dict[str, Any]) -> str:
    """The qualified name of a row's object, which begins its document."""
    match = _NAME.match(row["pos"][0][1])
    assert match is not None, "a pydocs document begins with its object's name"
    return match[0].rstrip(".")


def with_negatives(rows: Sequence[dict[str, Any]], count: int = NUM_NEGATIVES) -> list[dict[str, Any]]:
    """The rows, in order, each with `count` negatives (fewer only if there are fewer other rows)."""
    paths = [tuple(object_name(row).split(".")) for row in rows]
    order = sorted(range(len(rows)), key=lambda index: paths[index])
    rank = {index: position for position, index in enumerate(order)}
    result = []
    for index, row in enumerate(rows):
        others = _nearest(order, rank[index], paths, count)
        others.sort(key=lambda other: (-_shared(paths[index], paths[other]), _tie(paths[index], paths[other])))
        result.append({**row, "neg": [rows[other]["pos"][0] for other in others[:count]]})
    return result


def _nearest(order: Sequence[int], place: int, paths: Sequence[tuple[str, ...]], count: int) -> list[int]:
    """The neighbors in sorted order with the longest common prefixes: `count` of them, and all that share as much as the last.

    In sorted order what two names share gets no longer with their distance, so both sides are walked outward, the one that
    shares more first.
    """
    own = paths[order[place]]

    def shared(at: int) -> int:
        return _shared(own, paths[order[at]]) if max(0, place - _HUGE) <= at <= min(len(order) - 1, place + _HUGE) else -1

    found: list[int] = []
    left, right, last = place - 1, place + 1, -1
    on_left, on_right = shared(left), shared(right)
    while (level := max(on_left, on_right)) >= 0 and (len(found) < count or level == last):
        if on_left >= on_right:
            found.append(order[left])
            left, on_left = left - 1, shared(left - 1)
        else:
            found.append(order[right])
            right, on_right = right + 1, shared(right + 1)
        last = level
    return found


def _shared(left: Sequence[str], right: Sequence[str]) -> int:
    """Length of the common prefix of two names, in components."""
    for number, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return number
    return min(len(left), len(right))


def _tie(left: Sequence[str], right: Sequence[str]) -> bytes:
    return blake2b("\0".join((*left, "", *right)).encode(), digest_size=8).digest()
