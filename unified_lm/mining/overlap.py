"""Overlap between training rows and evaluation texts, which reveals contamination of a test set.

There are four tests, from the strictest to the loosest; a training row counts under the first one that matches:

- ``exact``: a text of the row equals a text of the evaluation set;
- ``normalized``: the texts are equal up to case, punctuation and white space;
- ``ngram``: the texts share a run of 13 words (GPT-3, https://arxiv.org/abs/2005.14165, appendix C);
- ``near``: their word shingles have a Jaccard similarity above a threshold. Candidates come from MinHash (Broder 1997) with
  locality-sensitive hashing, and every candidate is verified with its exact similarity, so `near` has no false positives.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from unified_lm.core.errors import ConfigError, DataError
from unified_lm.core.outputs import check_files
from unified_lm.core.typed import half_pair
from unified_lm.data.rows.files import RowWriter, check_txt_row, output_names
from unified_lm.data.rows.texts import RowFile, row_texts
from unified_lm.mining.text_match import SHINGLE_WORDS, jaccard, normalized_words, runs, shingles

_PERMUTATIONS = 128
_SHOWN = 300


class OverlapKind(Enum):
    """How a training row matches an evaluation text, strictest first."""

    EXACT = "exact"
    NORMALIZED = "normalized"
    NGRAM = "ngram"
    NEAR = "near"

    @classmethod
    def _missing_(cls, value: object) -> OverlapKind | None:
        return cls.NORMALIZED if value == "normalised" else None  # as it was once spelled, in scripts that still run


@dataclass(frozen=True, kw_only=True)
class OverlapConfig:
    """What counts as overlap."""

    ngram_words: int = 13
    """Length of a shared run, in words."""
    near_threshold: float = 0.8
    """Minimum Jaccard similarity of word shingles, in (0, 1]."""
    shingle_words: int = SHINGLE_WORDS
    """Length of a shingle, in words."""
    min_words: int = 4
    """Texts with fewer words (labels, names, "yes") are not compared."""
    kinds: tuple[OverlapKind, ...] = tuple(OverlapKind)
    """The tests to run."""
    columns: tuple[str, ...] = ()
    """Columns of the evaluation sets to compare; () for all columns with texts."""
    num_examples: int = 5
    """Number of examples to keep per kind."""

    def __post_init__(self) -> None:
        """Validate all values.

        Raises:
            ConfigError: lists every problem.
        """
        problems = []
        for name in ("ngram_words", "shingle_words", "min_words"):
            if getattr(self, name) < 1:
                problems.append(f"{name}: got {getattr(self, name)}, expected at least 1 word.")
        if not 0 < self.near_threshold <= 1:
            problems.append(f"near_threshold: got {self.near_threshold}, expected more than 0 and at most 1.")
        if self.num_examples < 0:
            problems.append(f"num_examples: got {self.num_examples}, expected 0 or more.")
        if not self.kinds:
            problems.append(f"kinds: got none, expected some of {', '.join(kind.value for kind in OverlapKind)}.")
        if problems:
            raise ConfigError(problems)


@dataclass(frozen=True, slots=True)
class Match:
    """A match between a training text and an evaluation text.

    Attributes:
        kind: kind of the match.
        evaluation: index of the evaluation text in `EvaluationIndex.texts`.
        field: path of the text in the training row (``pos[0]``).
        shared: what is shared: the run of words, or the similarity, as text.
    """

    kind: OverlapKind
    evaluation: int
    field: str
    shared: str


@dataclass(frozen=True, slots=True)
class EvaluationText:
    """A text of an evaluation set with its location (file, line, field)."""

    set_name: str
    location: str
    text: str


class EvaluationIndex:
    """The texts of evaluation sets, indexed for all tests.

    Attributes:
        texts: all texts that are compared.
        num_short: number of texts excluded because they have too few words.
    """

    def __init__(self, config: OverlapConfig) -> None:
        self.config = config
        self.texts: list[EvaluationText] = []
        self.num_short = 0
        self._exact: dict[str, int] = {}
        self._normalized: dict[str, int] = {}
        self._runs: dict[str, int] = {}
        self._shingles: list[frozenset[str]] = []
        self._near = _NearIndex(config.near_threshold) if OverlapKind.NEAR in config.kinds else None

    def add(self, text: EvaluationText) -> None:
        """Index one text; a repeated text adds nothing."""
        words = normalized_words(text.text)
        if len(words) < self.config.min_words:
            self.num_short += 1
            return
        if text.text in self._exact:
            return
        number = len(self.texts)
        self.texts.append(text)
        self._exact[text.text] = number
        if self._normalized.setdefault(" ".join(words), number) != number:
            self._shingles.append(frozenset())  # parallel to `texts`; an equal text is indexed already
            return
        if OverlapKind.NGRAM in self.config.kinds:
            for run in runs(words, self.config.ngram_words):
                self._runs.setdefault(run, number)
        own = shingles(words, self.config.shingle_words) if self._near is not None else frozenset()
        self._shingles.append(own)
        if self._near is not None:
            self._near.add(number, own)

    def find(self, text: str, field: str) -> Match | None:
        """The strictest match of a training text, or None.

        Args:
            text: the training text.
            field: its path in the training row, for the match.
        """
        words = normalized_words(text)
        if len(words) < self.config.min_words:
            return None
        kinds = self.config.kinds
        if OverlapKind.EXACT in kinds and (number := self._exact.get(text)) is not None:
            return Match(OverlapKind.EXACT, number, field, "the whole text")
        if OverlapKind.NORMALIZED in kinds and (number := self._normalized.get(" ".join(words))) is not None:
            return Match(OverlapKind.NORMALIZED, number, field, "the whole text")
        if OverlapKind.NGRAM in kinds:
            for run in runs(words, self.config.ngram_words):
                if (number := self._runs.get(run)) is not None:
                    return Match(OverlapKind.NGRAM, number, field, run)
        return self._nearest(words, field) if self._near is not None else None

    def _nearest(self, words: Sequence[str], field: str) -> Match | None:
        assert self._near is not None
        own = shingles(words, self.config.shingle_words)
        # The negated number makes `max` prefer the earliest of equally similar texts.
        scored = [(jaccard(own, self._shingles[number]), -number) for number in self._near.candidates(own)]
        similarity, number = max(scored, default=(0.0, 0))
        if similarity < self.config.near_threshold:
            return None
        return Match(OverlapKind.NEAR, -number, field, f"Jaccard similarity {similarity:.2f}")


class _NearIndex:
    """Finds candidates of high Jaccard similarity by MinHash and locality-sensitive hashing (`datasketch`)."""

    def __init__(self, threshold: float) -> None:
        try:
            import datasketch
        except ImportError as error:
            raise DataError(
                "finding near-duplicates needs the package datasketch, which is not installed: pip install "
                "'unified_lm[data]', or leave them out with --kinds exact,normalized,ngram."
            ) from error
        self._empty = datasketch.MinHash(num_perm=_PERMUTATIONS, seed=1)
        # Bands for a lower threshold, weighted for recall: a false candidate only costs a check, a missed one is never found.
        self._lsh = datasketch.MinHashLSH(threshold=0.9 * threshold, num_perm=_PERMUTATIONS, weights=(0.1, 0.9))

    def _sketch(self, members: frozenset[str]) -> Any:
        sketch = self._empty.copy()  # a copy: drawing the permutations again would cost more than the rest
        sketch.update_batch([member.encode() for member in members])
        return sketch

    def add(self, number: int, members: frozenset[str]) -> None:
        """Add a text, given its number and its shingles."""
        self._lsh.insert(number, self._sketch(members))

    def candidates(self, members: frozenset[str]) -> list[int]:
        """Numbers of the texts that may be similar, false positives included."""
        return list(self._lsh.query(self._sketch(members)))


def build_index(evaluation: Iterable[tuple[str, RowFile]], config: OverlapConfig) -> EvaluationIndex:
    """Index evaluation sets.

    Args:
        evaluation: (name of the set, rows) of every file.
        config: what counts as overlap.

    Raises:
        DataError: no text is long enough, or no row of a set has any of the columns.
    """
    index = EvaluationIndex(config)
    for set_name, file in evaluation:
        columns: set[str] = set()
        for location, row in file.rows():
            _require_columns(row, file, location)
            chosen = {key: value for key, value in row.items() if not config.columns or key in config.columns}
            columns |= chosen.keys()
            for field_name, text in _texts(chosen, file, location):
                index.add(EvaluationText(set_name, f"{file.name}, {location}, {field_name}", text))
        if config.columns and not columns:
            raise DataError(f"{file.name} of {set_name} has none of the columns {', '.join(config.columns)}.")
    if not index.texts:
        raise DataError(
            f"no text of the evaluation sets has {config.min_words} words or more ({index.num_short} have fewer): "
            "lower --min-words."
        )
    return index


@dataclass
class OverlapReport:
    """Counts of `find_overlap`.

    Attributes:
        num_rows: training rows.
        counts: rows by kind.
        by_set: rows by evaluation set and kind.
        by_field: rows by the field of their strictest match ("pos", without index).
        examples: the first matches of each kind.
        num_evaluation_texts, num_short_texts: number of texts compared, and of texts too short for comparison.
    """

    num_evaluation_texts: int
    num_short_texts: int
    num_rows: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    by_set: dict[str, Counter[str]] = field(default_factory=dict)
    by_field: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[dict[str, str]]] = field(default_factory=dict)

    @property
    def num_overlapping(self) -> int:
        """Number of rows with a match of any kind."""
        return self.counts.total()

    def add(self, match: Match, text: EvaluationText, location: str, train_text: str, limit: int) -> None:
        """Count the match of a row, and keep it as an example while there are fewer than `limit`."""
        kind = match.kind.value
        self.counts[kind] += 1
        self.by_set.setdefault(text.set_name, Counter())[kind] += 1
        self.by_field[match.field.partition("[")[0]] += 1
        shown = self.examples.setdefault(kind, [])
        if len(shown) < limit:
            shown.append(
                {
                    "train": f"{location}, {match.field}",
                    "train_text": train_text[:_SHOWN],
                    "evaluation": f"{text.set_name}: {text.location}",
                    "evaluation_text": text.text[:_SHOWN],
                    "shared": match.shared,
                }
            )

    def as_dict(self) -> dict[str, Any]:
        """The counts as plain values, for a file."""
        return {
            "rows": self.num_rows,
            "overlapping": self.num_overlapping,
            "kinds": {kind.value: self.counts[kind.value] for kind in OverlapKind},
            "evaluation_sets": {name: dict(counts) for name, counts in self.by_set.items()},
            "fields": dict(self.by_field),
            "evaluation_texts": self.num_evaluation_texts,
            "evaluation_texts_too_short": self.num_short_texts,
            "examples": self.examples,
        }


def find_overlap(
    train: Sequence[RowFile],
    index: EvaluationIndex,
    *,
    write: Path | None = None,
    progress: Callable[[int], None] | None = None,
) -> OverlapReport:
    """Compare training rows with evaluation texts.

    Args:
        train: the training files.
        index: from `build_index`.
        write: file for the rows without any match, unchanged; a folder if there are several training files.
        progress: called with the number of rows compared since the last call.

    Raises:
        DataError: a file cannot be read or written, two training files have one output, or no row is left to write.
        OutputError: an output would replace what this package did not write.
    """
    report = OverlapReport(len(index.texts), index.num_short)
    paths = [] if write is None else output_paths(train, write)
    check_files(paths)
    for number, file in enumerate(train):
        if write is None:
            for _ in _clean_rows(file, index, report, progress):
                pass
            continue
        with RowWriter(paths[number]) as writer:
            for row in _clean_rows(file, index, report, progress):
                writer.write(row)
            if not writer.num_rows:
                raise DataError(f"{file.name}: every row overlaps, so nothing is left to write.")
    return report


def output_paths(train: Sequence[RowFile], write: Path) -> list[Path]:
    """Where the rows of each training file go: `write` itself for one file, else files in it, named as they are.

    Raises:
        DataError: two training files would be written to one file.
    """
    if len(train) == 1:
        return [write]
    return [write / name for name in output_names([file.name for file in train], ".jsonl")]


def check_rows(train: Sequence[RowFile], paths: Sequence[Path]) -> None:
    """Check before any work that the files of `output_paths` can hold the rows, which only a .txt file may not.

    Raises:
        DataError: an unknown extension, or a row that a .txt file would not give back as it is.
    """
    for file, path in zip(train, paths, strict=True):
        if RowWriter(path).path.suffix == ".txt":
            for location, row in file.rows():
                _require_columns(row, file, location)
                check_txt_row(path, row, f"{file.name}, {location}")


def _require_columns(row: object, file: RowFile, location: str) -> None:
    if not isinstance(row, Mapping):
        raise DataError(f"{file.name}, {location}: expected an object with named columns, got {type(row).__name__}.")


def _texts(row: object, file: RowFile, location: str) -> list[tuple[str, str]]:
    """The fields and texts of a row.

    Raises:
        DataError: one of them is no Unicode, or the row is nested too deeply.
    """
    try:
        found = list(row_texts(row))
    except RecursionError as error:
        raise DataError(f"{file.name}, {location}: nested too deeply to be read.") from error
    for name, text in found:
        if (place := half_pair(f"{name}{text}")) is not None:
            what = f"half of a surrogate pair at character {place - len(name)}" if place >= len(name) else "such a name"
            raise DataError(f"{file.name}, {location}, field {name!r}: got {what}, expected valid Unicode text.")
    return found


def _clean_rows(
    file: RowFile, index: EvaluationIndex, report: OverlapReport, progress: Callable[[int], None] | None
) -> Iterator[Mapping[str, Any]]:
    """Yield the rows without a match; count the others."""
    order = list(OverlapKind)
    for location, row in file.rows():
        _require_columns(row, file, location)
        report.num_rows += 1
        found = [(match, text) for name, text in _texts(row, file, location) if (match := index.find(text, name)) is not None]
        if found:
            match, text = min(found, key=lambda item: order.index(item[0].kind))
            report.add(match, index.texts[match.evaluation], f"{file.name}, {location}", text, index.config.num_examples)
        else:
            yield row
        if progress is not None:
            progress(1)
