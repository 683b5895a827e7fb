"""The parts of an analysis: material shared by all models, a measurement of one model, a figure of all models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unified_lm.evaluation.result_table import ResultTable
from unified_lm.inference.unified import UnifiedLM

Numbers = dict[str, Any]
"""Measurements of one arm, as JSON values."""


@dataclass(frozen=True, kw_only=True)
class AnalysisSettings:
    """The data that analyses measure on.

    Attributes:
        texts: reference texts: "pydocs", a file or folder, or an offline STS task.
        num_texts: number of texts for anisotropy.
        num_windows: number of texts for the analyses by layer and position.
        positions: tokens per text in those analyses.
        triples: file of prefixes with continuations for the future-token probe; None selects the package's own.
        sts: offline STS task, or a file with sentence1, sentence2, score; None skips what needs one.
        num_pairs: maximum number of sentence pairs and of retrieval rows.
        positive_score: minimum score of a pair that counts as similar (alignment).
        retrieval: retrieval pairs: "pydocs", a file or folder; None skips them.
        corpora: label -> reference corpus for standardization, in the form of `texts`.
        corpus_texts: maximum number of texts per corpus.
        labels: labeled texts, a file with `text` and `label` or an offline task of classification or clustering; None skips
            what needs them.
        num_labeled: maximum number of labeled texts.
        clusters: of the texts, for complementarity.
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
    labels: str | None = None
    num_labeled: int = 1000
    clusters: int = 20


@dataclass(frozen=True)
class Material:
    """The input of an analysis.

    Attributes:
        description: names and counts, for the JSON file.
        fingerprint: hash of everything that affects the numbers.
        content: read by `measure` only.
    """

    description: Mapping[str, Any]
    fingerprint: str
    content: Any = field(repr=False)


@dataclass(frozen=True)
class Analysis:
    """One analysis.

    Attributes:
        name: its name on the command line and in file names.
        summary: one line of help.
        version: increased when the same material yields different numbers or keys, so that old results are not reused.
        prepare: reads the material.
        measure: (model, material, whether to show progress) -> numbers.
        draw: (label -> numbers, material's description, file to write) -> that file.
        tabulate: (label -> numbers, material's description) -> the table that a run's report shows.
    """

    name: str
    summary: str
    version: int
    prepare: Callable[[AnalysisSettings], Material]
    measure: Callable[[UnifiedLM, Material, bool], Numbers]
    draw: Callable[[Mapping[str, Numbers], Mapping[str, Any], Path], Path]
    tabulate: Callable[[Mapping[str, Numbers], Mapping[str, Any]], ResultTable]


def rounded(value: Any, digits: int = 6) -> Any:
    """Convert an array to JSON values: nested lists of floats, rounded to that many significant digits."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [rounded(item, digits) for item in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value
