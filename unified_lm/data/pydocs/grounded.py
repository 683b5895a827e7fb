"""Questions with documents and an answer from the built-in pairs, derived from the pairs file on first use.

Each object gives one row, and a hash of its name says which kind of question: which object does what a summary says (its name),
which parameters it takes, or what is said first about it. The answer stands in the object's document, verbatim; the documents
of related objects (`data/pydocs/negatives.py`) do not answer the question.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from unified_lm.core.cached_folder import cached_folder
from unified_lm.core.files import cache_dir
from unified_lm.core.random import derive_seed
from unified_lm.data.pydocs.negatives import object_name, with_negatives

PART = "grounded"
"""Name of the subset."""
VERSION = 1
"""Increase when a change below alters the result."""
WHICH = "Which Python object does this? {summary}"
PARAMETERS = "Which parameters does {name} take?"
FIRST = "What does the documentation of {name} say first?"
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])|\n")
_MAX_ANSWER_CHARACTERS = 240


def grounded_file(pairs: Path) -> Path:
    """The file of grounded rows, built beside the file of `pairs` (one split) if this machine lacks it."""
    target = cache_dir("pydocs_grounded", f"{pairs.parent.name}-{pairs.stem}-{VERSION}")
    cached_folder(target, f"pydocs/{PART}", lambda folder: _fill(folder, pairs))
    return target / "grounded.jsonl"


def _fill(folder: Path, pairs: Path) -> None:
    rows = [json.loads(line) for line in pairs.read_text(encoding="utf-8").split("\n") if line]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in grounded_rows(rows))
    (folder / "grounded.jsonl").write_text(text, encoding="utf-8")


def grounded_rows(pairs: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A row with question, documents and answer for each row of pairs, in order."""
    for row in with_negatives(pairs):
        question, answer = _asked(object_name(row), row["query"][1], row["pos"][0][1])
        yield {"query": [row["query"][0], question], "pos": row["pos"], "neg": row["neg"], "answers": [answer]}


def _asked(name: str, summary: str, document: str) -> tuple[str, str]:
    """The question about an object, and its answer."""
    head, _, body = document.partition("\n")
    signature = head.removeprefix(name)
    first = _SENTENCE_END.split(body, maxsplit=1)[0]
    kinds = [(WHICH.format(summary=summary), name)]
    if len(signature) > len("()"):
        kinds.append((PARAMETERS.format(name=name), signature))
    if len(first) <= _MAX_ANSWER_CHARACTERS:
        kinds.append((FIRST.format(name=name), first))
    return kinds[derive_seed(PART, name) % len(kinds)]
