"""The built-in data set: docstrings of the Python packages installed here. Real text, no download, no license trouble.

Four subsets are built from the same documented objects, and the name of an object decides its split, so that an object held
out in one subset is held out in all of them:

- ``pairs``: summary line -> name, signature and the rest of the docstring (the summary itself is not in it);
- ``chats``: "What does X do?" -> summary and the first paragraph after it;
- ``text``: whole docstrings as running text; ``sentences``: their sentences.

Three further ones are derived from these: pairs with hard negatives (`data/pydocs/negatives.py`), preferences
(`data/pydocs/preferences.py`), and questions with documents and a short answer (`data/pydocs/grounded.py`).

The result depends only on the versions of the packages; source files are parsed, never imported.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import json
import logging
import re
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any
from zlib import crc32

from unified_lm.core.cached_folder import cached_folder
from unified_lm.core.errors import DataError, did_you_mean
from unified_lm.core.files import cache_dir, write_json
from unified_lm.data.pydocs.docstrings import Docstring, extract
from unified_lm.data.pydocs.grounded import PART as GROUNDED
from unified_lm.data.pydocs.grounded import grounded_file
from unified_lm.data.pydocs.negatives import PART as HARD_PAIRS
from unified_lm.data.pydocs.negatives import hard_pairs_file
from unified_lm.data.pydocs.preferences import PART as PREFERENCES
from unified_lm.data.pydocs.preferences import preferences_file
from unified_lm.data.rows.records import RecordKind

logger = logging.getLogger(__name__)

# Increase when a change below alters the result.
VERSION = 2
PACKAGES = ("numpy", "torch", "transformers", "datasets", "huggingface_hub", "peft", "scipy", "pandas", "networkx")
"""Packages to read besides the standard library. Missing ones are recorded in metadata.json and change the data set's key."""
INSTRUCTION = "Given a description, retrieve the Python object that does it"
QUESTION = "What does {name} do?"
SPLITS = ("train", "test")
PARTS = {
    "pairs": RecordKind.PAIR,
    "chats": RecordKind.CHAT,
    "text": RecordKind.TEXT,
    "sentences": RecordKind.TEXT,
}
_DEFAULT_PART = {
    RecordKind.PAIR: "pairs",
    RecordKind.CHAT: "chats",
    RecordKind.TEXT: "text",
    RecordKind.PREFERENCE: PREFERENCES,
    RecordKind.GROUNDED: GROUNDED,
}
MAX_DOCUMENT_CHARACTERS = 1200
MAX_ANSWER_CHARACTERS = 500

# Tests, vendored copies, generated code, and hundreds of modeling files whose docstrings are copies of each other.
_SKIPPED_FOLDERS = {
    "test", "tests", "testing", "_vendor", "site-packages", "dist-packages", "__pycache__", "idlelib", "lib2to3", "turtledemo",
    "pydoc_data", "encodings", "ensurepip", "models", "_inductor", "_dynamo", "_functorch", "_export", "_refs", "_decomp",
    "_prims", "_higher_order_ops", "_vendored_packaging", "onnx", "caffe2", "include", "externals", "_precompiled",
}  # fmt: skip
_TEST_SHARE = 0.1
_MIN_SUMMARY_WORDS, _MAX_SUMMARY_CHARACTERS = 4, 250
_MIN_BODY_CHARACTERS = 80
_MIN_SENTENCE_WORDS, _MAX_SENTENCE_WORDS = 6, 48
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
_SHINGLE_WORDS, _SKETCH_SIZE = 4, 24


def pydocs_file(part: str | None, split: str, kind: RecordKind) -> tuple[str, Path]:
    """Find one subset of the data set, building the whole data set first if this machine lacks it.

    Args:
        part: "pairs", "chats", "text", "sentences", "preferences", "grounded" (also read as pairs: question and
            document), "hard_pairs" (pairs with 7 hard negatives) or
            "hard_pairs/PACKAGE" (those of one package; "python" is the standard library); None selects one by `kind`.
        split: "train", or "test" (about a tenth, held out by name).
        kind: the requested kind of record.

    Returns:
        A name for logs, and a jsonl file.

    Raises:
        DataError: no such subset or split, or a subset with records of another kind.
    """
    if split not in SPLITS:
        raise DataError(f"pydocs has no split '{split}'.{did_you_mean(split, SPLITS)}")
    part = part or _DEFAULT_PART[kind]
    if part.partition("/")[0] == HARD_PAIRS:
        if kind is not RecordKind.PAIR:
            raise DataError(f"pydocs subset '{part}' holds pair rows, the format wants {kind.value} rows.")
        package = part.partition("/")[2] or None
        return f"pydocs/{part}/{split}", hard_pairs_file(build() / _file_name("pairs", split), package, PACKAGES)
    if part == GROUNDED:
        if kind not in (RecordKind.GROUNDED, RecordKind.PAIR):
            raise DataError(f"pydocs subset '{part}' holds grounded rows, the format wants {kind.value} rows.")
        return f"pydocs/{part}/{split}", grounded_file(build() / _file_name("pairs", split))
    if part == PREFERENCES:
        if kind is not RecordKind.PREFERENCE:
            raise DataError(f"pydocs subset '{part}' holds preference rows, the format wants {kind.value} rows.")
        return f"pydocs/{part}/{split}", preferences_file(build() / _file_name("chats", split), QUESTION)
    if part not in PARTS:
        raise DataError(f"pydocs has no subset '{part}'.{did_you_mean(part, [*PARTS, HARD_PAIRS, PREFERENCES, GROUNDED])}")
    if PARTS[part] is not kind:
        fitting = ", ".join(name for name, held in PARTS.items() if held is kind) or "none"
        raise DataError(
            f"pydocs subset '{part}' holds {PARTS[part].value} rows, the format wants {kind.value} rows: {fitting}."
        )
    return f"pydocs/{part}/{split}", build() / _file_name(part, split)


def _file_name(part: str, split: str) -> str:
    return f"{part}-{split}.jsonl"


def build() -> Path:
    """Find the data set in the cache, or build it there; a damaged one is built again, with a warning.

    Returns:
        Its folder, with a jsonl file per subset and split, and metadata.json (versions, counts, seconds).
    """
    versions = _versions()
    target = cache_dir("pydocs", _key(versions))
    try:
        return cached_folder(target, "pydocs", lambda folder: _fill(folder, versions))
    except OSError as error:
        raise DataError(f"cannot write the pydocs cache, {target}: {error}. Set UNIFIED_LM_CACHE.") from error


def _key(versions: dict[str, str]) -> str:
    return blake2b(json.dumps([VERSION, versions], sort_keys=True).encode(), digest_size=12).hexdigest()


def _versions() -> dict[str, str]:
    """Version of every package to read; "" if it is not installed."""
    versions = {"python": ".".join(map(str, sys.version_info[:3]))}
    return versions | {package: _version(package) for package in PACKAGES}


@functools.cache
def _version(package: str) -> str:
    """A package's version, "" if it is not installed; reading it takes 5 ms, and every source of a run asks."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _fill(folder: Path, versions: dict[str, str]) -> None:
    start = time.perf_counter()
    logger.info("building pydocs from the installed packages (only the first time)")
    found: Counter[str] = Counter()
    documents = distinct(document for package in ("python", *PACKAGES) for document in _package(package, found))
    rows: dict[str, list[dict[str, Any]]] = {_file_name(part, split): [] for part in PARTS for split in SPLITS}
    seen_sentences: set[str] = set()
    for document in documents:
        for part, row in _rows(document, seen_sentences):
            rows[_file_name(part, split_of(document.name))].append(row)
    for name, content in rows.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
        (folder / name).write_text(text, encoding="utf-8")
    counts = {name: len(content) for name, content in rows.items()}
    seconds = round(time.perf_counter() - start, 1)
    logger.info("pydocs: %d distinct docstrings in %.1f s; %s", len(documents), seconds, counts)
    write_json(
        folder / "metadata.json",
        {"versions": versions, "docstrings": found, "distinct": len(documents), "rows": counts, "seconds": seconds},
    )


def _package(package: str, found: Counter[str]) -> Iterator[Docstring]:
    """Yield the docstrings of a package in the sorted order of its files."""
    root = _root(package)
    if root is None:
        return
    prefix = () if package == "python" else (package,)
    # Sorted by path components, not by string: the order must not depend on the path separator of the system.
    for file in sorted(root.rglob("*.py"), key=lambda file: file.relative_to(root).parts):
        parts = file.relative_to(root).with_suffix("").parts
        if _SKIPPED_FOLDERS.intersection(parts):
            continue
        source = file.read_bytes()
        if source.count(b'"""') + source.count(b"'''") < 2:
            continue
        for document in extract(source, ".".join((*prefix, *parts))):
            found[package] += 1
            yield document


def _root(package: str) -> Path | None:
    if package == "python":
        return Path(sysconfig.get_paths()["stdlib"])
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).parent if spec is not None and spec.origin is not None else None


def split_of(name: str) -> str:
    """The split of an object, from the hash of its qualified name, so that changes to other objects do not move it."""
    value = int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little")
    return "test" if value < _TEST_SHARE * 2**64 else "train"


def distinct(documents: Iterable[Docstring]) -> list[Docstring]:
    """Remove objects whose name, summary or text repeats an earlier one, including near-duplicate texts.

    Near-duplicates are detected by bottom-k sketches of word 4-grams (Broder 1997, "On the resemblance and containment of
    documents"): an earlier text shares more than half of the sketch.
    """
    kept: list[Docstring] = []
    names: set[str] = set()
    summaries: set[str] = set()
    by_shingle: dict[int, list[int]] = {}
    for document in documents:
        summary = _normalized(document.summary)
        if document.name in names or summary in summaries or len(summary.split()) < _MIN_SUMMARY_WORDS:
            continue
        sketch = _sketch(" ".join((summary, *map(_normalized, document.paragraphs))))
        shared = Counter(earlier for shingle in sketch for earlier in by_shingle.get(shingle, ()))
        if any(count * 2 > len(sketch) for count in shared.values()):
            continue
        for shingle in sketch:
            by_shingle.setdefault(shingle, []).append(len(kept))
        names.add(document.name)
        summaries.add(summary)
        kept.append(document)
    return kept


def _normalized(text: str) -> str:
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def _sketch(text: str) -> list[int]:
    words = text.split()
    shingles = {" ".join(words[i : i + _SHINGLE_WORDS]) for i in range(max(1, len(words) - _SHINGLE_WORDS + 1))}
    return sorted(crc32(shingle.encode()) for shingle in shingles)[:_SKETCH_SIZE]


def _rows(document: Docstring, seen_sentences: set[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of an object in every subset."""
    if (pair := _pair(document)) is not None:
        yield "pairs", pair
        answer = bounded(" ".join((document.summary, *document.prose[:1])), MAX_ANSWER_CHARACTERS)
        question = {"role": "user", "content": QUESTION.format(name=document.name)}
        yield "chats", {"messages": [question, {"role": "assistant", "content": answer}]}
    text = bounded("\n".join((document.summary, *document.paragraphs)), MAX_DOCUMENT_CHARACTERS)
    if len(text) >= _MIN_BODY_CHARACTERS:
        yield "text", {"text": text}
    for sentence in _sentences((document.summary, *document.prose)):
        if (key := _normalized(sentence)) not in seen_sentences:
            seen_sentences.add(key)
            yield "sentences", {"text": sentence}


def _pair(document: Docstring) -> dict[str, Any] | None:
    """The retrieval row, or None if there is too little text or the document contains the summary."""
    body = "\n".join(document.paragraphs)
    if len(document.summary) > _MAX_SUMMARY_CHARACTERS or len(body) < _MIN_BODY_CHARACTERS:
        return None
    if _normalized(document.summary) in _normalized(body):
        return None
    text = bounded(f"{document.name}{document.signature}\n{body}", MAX_DOCUMENT_CHARACTERS)
    return {"query": [INSTRUCTION, document.summary], "pos": [["", text]]}


def bounded(text: str, limit: int) -> str:
    """Truncate a text to at most `limit` characters, after a sentence if one ends in the second half, else after a word."""
    if len(text) <= limit:
        return text
    head = text[:limit]
    ends = [match.end() for match in re.finditer(r"[.!?](?=\s)", head)]
    if ends and ends[-1] > limit // 2:
        return head[: ends[-1]]
    return re.sub(r"\s+\S*$", "", head)


def _sentences(paragraphs: Iterable[str]) -> Iterator[str]:
    for paragraph in paragraphs:
        for sentence in _SENTENCE_END.split(paragraph):
            words = sentence.split()
            whole = sentence[:1].isupper() and sentence.endswith((".", "!", "?"))
            if whole and _MIN_SENTENCE_WORDS <= len(words) <= _MAX_SENTENCE_WORDS:
                yield sentence
