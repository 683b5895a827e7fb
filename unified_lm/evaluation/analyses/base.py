"""What an analysis is: material that is the same for all models, a measurement of one model, a figure of all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unified_lm.evaluation.result_table import ResultTable
from unified_lm.inference.unified import UnifiedLM

Numbers = dict[str, Any]
"""What was measured on one arm, JSON values."""


@dataclass(frozen=True, kw_only=True)
class AnalysisSettings:
    """What to measure on.

    Attributes:
        texts: reference texts: "pydocs", a file or folder, or an offline STS task.
        num_texts: texts of anisotropy.
        num_windows: texts of the analyses by layer and position.
        positions: tokens of each of those.
        triples: file of prefixes with continuations for the future-token probe; None takes the package's own.
        sts: offline STS task, or a file with sentence1, sentence2, score; None leaves out what needs one.
        num_pairs: sentence pairs, and retrieval rows, at most.
        positive_score: least score of a pair that counts as similar (alignment).
        retrieval: retrieval pairs: "pydocs", a file or folder; None leaves them out.
        corpora: label -> reference corpus of standardization, as `texts`.
        corpus_texts: texts of each corpus, at most.
    """

    texts: str = "pydocs"
    num_texts: int = 1000
    num_windows: int = 32
    positions: int = 64
    triples: Path | None = None
    sts: str | None = None
    num_pairs: int = 500
    positive_score: float = 4.0
    retrieval: str | None = "pydocs"
    corpora: Mapping[str, str] = field(default_factory=lambda: {"pydocs": "pydocs"})
    corpus_texts: int = 1000


@dataclass(frozen=True)
class Material:
    """What an analysis reads.

    Attributes:
        description: for the JSON file: names and counts.
        fingerprint: changes whenever a number may.
        content: for `measure` alone.
    """

    description: Mapping[str, Any]
    fingerprint: str
    content: Any = field(repr=False)


@dataclass(frozen=True)
class Analysis:
    """One analysis.

    Attributes:
        name: on the command line and of its files.
        summary: one line for help.
        version: grows when the same material gives other numbers.
        prepare: reads the material.
        measure: (model, material, whether to show progress) -> numbers.
        draw: (label -> numbers, material's description, file to write) -> that file.
        tabulate: (label -> numbers, material's description) -> the few numbers that a run's report shows.
    """

    name: str
    summary: str
    version: int
    prepare: Callable[[AnalysisSettings], Material]
    measure: Callable[[UnifiedLM, Material, bool], Numbers]
    draw: Callable[[Mapping[str, Numbers], Mapping[str, Any], Path], Path]
    tabulate: Callable[[Mapping[str, Numbers], Mapping[str, Any]], ResultTable]


def rounded(value: Any, digits: int = 6) -> Any:
    """JSON values of arrays: floats with that many significant digits, in nested lists."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [rounded(item, digits) for item in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value
