"""Hard negatives: which documents may serve as negatives of a query, given their similarities under a model.

This module works on scores and texts; embedding and search are in `unified_lm.mining.mine`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from hashlib import blake2b
from typing import Any

import numpy as np

from unified_lm.core.errors import ConfigError
from unified_lm.core.random import derive_seed
from unified_lm.data.rows.records import PairRecord, Text, TextRecord
from unified_lm.data.sources import RecordSource
from unified_lm.mining.text_match import jaccard, normalized, normalized_words, shingles


class Sampling(Enum):
    """How negatives are selected from the candidates that pass every filter."""

    TOP = "top"
    RANDOM = "random"


class Given(Enum):
    """What happens to negatives that a row already has."""

    KEEP = "keep"
    REPLACE = "replace"


class Filter(Enum):
    """Why a candidate is rejected as a negative."""

    SAME_TEXT = "same text as the query, a positive or a kept negative"
    NEAR_DUPLICATE = "near-duplicate of a positive"
    FRACTION = "above the fraction of the positive's score"
    MARGIN = "within the margin below the positive's score"
    MAX_SCORE = "above the greatest score"
    MIN_SCORE = "below the least score"
    REPEATED = "same text as a negative taken before"


@dataclass(frozen=True, kw_only=True)
class MiningConfig:
    """How hard negatives are chosen."""

    num_negatives: int = 7
    """Negatives to mine per row."""
    skip: int = 0
    """Number of best-ranked candidates to skip."""
    depth: int = 100
    """Number of candidates to consider, including the skipped ones."""
    max_fraction: float | None = 0.95
    """Maximum similarity of a negative as a fraction of the positive's (TopK-PercPos of NV-Retriever,
    https://arxiv.org/abs/2407.15831); None for no such limit."""
    margin: float | None = None
    """Minimum difference between the positive's similarity and a negative's (TopK-MarginPos)."""
    max_score: float | None = None
    """Maximum similarity of a negative (TopK-Abs)."""
    min_score: float | None = None
    """Minimum similarity of a negative."""
    near_duplicate: float | None = 0.8
    """Candidates with at least this Jaccard similarity of word triples to a positive count as false negatives; None compares
    whole texts only."""
    sampling: Sampling = Sampling.TOP
    """Take the hardest candidates, or sample among them."""
    given: Given = Given.KEEP
    """Keep a row's own negatives and add to them, or replace them."""
    seed: int = 42
    """Seed of the sampling, combined with the index of the row."""

    def __post_init__(self) -> None:
        """Validate all values.

        Raises:
            ConfigError: lists every problem.
        """
        problems = []
        if self.num_negatives < 1:
            problems.append(f"num_negatives: got {self.num_negatives}, expected at least 1.")
        if self.skip < 0:
            problems.append(f"skip: got {self.skip}, expected 0 or more documents.")
        if self.depth - self.skip < self.num_negatives:
            problems.append(
                f"depth: {self.depth} minus skip {self.skip} leaves {max(0, self.depth - self.skip)} candidates for "
                f"{self.num_negatives} negatives; raise depth or lower skip."
            )
        for name in ("max_fraction", "near_duplicate"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                problems.append(f"{name}: got {value}, expected more than 0 and at most 1.")
        if self.margin is not None and self.margin < 0:
            problems.append(f"margin: got {self.margin}, expected 0 or more.")
        if self.max_score is not None and self.min_score is not None and self.min_score > self.max_score:
            problems.append(f"min_score {self.min_score} is above max_score {self.max_score}, so nothing can pass.")
        problems += [
            f"{name}: got {value}, expected a finite number."
            for name, value in vars(self).items()
            if isinstance(value, float) and not math.isfinite(value)
        ]
        if problems:
            raise ConfigError(problems)


def text_key(text: str) -> int:
    """A 63-bit key of a normalized text: equal for texts that differ only in case, punctuation or white space."""
    return int.from_bytes(blake2b(normalized(text).encode(), digest_size=8).digest(), "little") >> 1


class DocumentPool:
    """The documents to mine from: all distinct positives and negatives of a source, and the texts of a corpus.

    Texts stay in the memory-mapped sources; a document takes a few dozen bytes here. Documents with equal texts but different
    instructions are embedded separately.

    Attributes:
        keys: int64 `[documents]`, `text_key` of each.
        same: key -> indices of the documents with this key.
    """

    def __init__(self, source: RecordSource, corpus: RecordSource | None = None) -> None:
        """Read the source, and the corpus (a source of texts), once."""
        self._source, self._corpus = source, corpus
        self._locations: list[tuple[int, int]] = []
        self._index: dict[bytes, int] = {}
        keys: list[int] = []
        self.same: dict[int, list[int]] = {}
        self._query_positives: dict[int, set[int]] = {}
        for row, record in enumerate(source):
            assert isinstance(record, PairRecord)
            for slot, text in enumerate((*record.positives, *record.negatives)):
                self._add(text, (row, slot), keys)
            positives = self._query_positives.setdefault(text_key(record.query.text), set())
            positives.update(text_key(text.text) for text in record.positives)
        for row, record in enumerate(corpus if corpus is not None else ()):
            assert isinstance(record, TextRecord)
            self._add(Text(record.text), (row, -1), keys)
        self.keys = np.array(keys, np.int64)

    def _add(self, text: Text, location: tuple[int, int], keys: list[int]) -> None:
        digest = _digest(text)
        if digest in self._index:
            return
        number = self._index[digest] = len(self._locations)
        self._locations.append(location)
        keys.append(text_key(text.text))
        self.same.setdefault(keys[-1], []).append(number)

    def __len__(self) -> int:
        return len(self._locations)

    def __getitem__(self, index: int) -> Text:
        row, slot = self._locations[index]
        if slot < 0:
            assert self._corpus is not None
            record = self._corpus[row]
            assert isinstance(record, TextRecord)
            return Text(record.text)
        pair = self._source[row]
        assert isinstance(pair, PairRecord)
        return (*pair.positives, *pair.negatives)[slot]

    def __iter__(self) -> Iterator[Text]:
        return (self[i] for i in range(len(self)))

    def indices(self, texts: Sequence[Text]) -> list[int]:
        """The indices of the documents with these texts."""
        return [self._index[_digest(text)] for text in texts]

    def forbidden(self, record: PairRecord, kept: Sequence[Text]) -> np.ndarray:
        """The documents with the text of the query, of a positive of any row with this query, or of a kept negative.

        Returns:
            Indices int64, ascending.
        """
        # Positives of *any* row with this query: data sets repeat a query once per positive, and each would otherwise be mined
        # as a negative of the others.
        query = text_key(record.query.text)
        keys = {query, *self._query_positives[query], *(text_key(text.text) for text in kept)}
        return np.array(sorted(index for key in keys for index in self.same.get(key, ())), np.int64)


def _digest(text: Text) -> bytes:
    digest = blake2b(text.instruction.encode(), digest_size=12)
    digest.update(b"\x00" + text.text.encode())
    return digest.digest()


@dataclass
class MiningStatistics:
    """Sums over rows, which can be added across blocks.

    Attributes:
        rows: rows mined.
        mined: negatives found.
        short: rows with fewer negatives than requested; they are kept.
        none: rows without any negative.
        filtered: rejected candidates by reason. Top sampling stops when it has enough, so it does not count the rest.
        positive, hard, random: (number, sum of cosine similarities to the query) of positives, mined negatives, and random
            documents.
    """

    rows: int = 0
    mined: int = 0
    short: int = 0
    none: int = 0
    filtered: Counter[str] = field(default_factory=Counter)
    positive: tuple[int, float] = (0, 0.0)
    hard: tuple[int, float] = (0, 0.0)
    random: tuple[int, float] = (0, 0.0)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MiningStatistics:
        """Restore statistics from `vars` of them after a round trip through JSON."""
        sums = {name: _sum((0, 0.0), values[name]) for name in ("positive", "hard", "random")}
        return cls(values["rows"], values["mined"], values["short"], values["none"], Counter(values["filtered"]), **sums)

    def __add__(self, other: MiningStatistics) -> MiningStatistics:
        return MiningStatistics(
            self.rows + other.rows,
            self.mined + other.mined,
            self.short + other.short,
            self.none + other.none,
            self.filtered + other.filtered,
            _sum(self.positive, other.positive),
            _sum(self.hard, other.hard),
            _sum(self.random, other.random),
        )


def _sum(left: tuple[int, float], right: Sequence[float]) -> tuple[int, float]:
    return left[0] + int(right[0]), left[1] + right[1]


def mean(counted: Sequence[float]) -> float | None:
    """The mean from (number, sum); None if the number is 0."""
    return counted[1] / counted[0] if counted[0] else None


def choose_negatives(
    pool: DocumentPool,
    record: PairRecord,
    positive_scores: Sequence[float],
    ranked: np.ndarray,
    scores: np.ndarray,
    config: MiningConfig,
    row: int,
    filtered: Counter[str],
) -> list[int]:
    """Choose the negatives of one row.

    Args:
        pool: the documents.
        record: the row.
        positive_scores: cosine similarity of each of its positives.
        ranked: int64 `[K]`, candidate documents, most similar first, without `pool.forbidden`.
        scores: float32 `[K]`, their cosine similarities.
        config: the filters.
        row: index of the row in its source; with the seed, it determines the sampling.
        filtered: counter of rejected candidates, updated in place.

    Returns:
        Indices into `ranked` of at most `config.num_negatives` candidates.
    """
    window = np.arange(config.skip, min(config.depth, len(ranked)))
    passing = _by_score(window, scores, min(positive_scores), config, filtered)
    if config.sampling is Sampling.RANDOM:
        passing = np.random.default_rng(derive_seed(config.seed, "negatives", row)).permutation(passing)
    wanted = config.near_duplicate
    positives = [shingles(normalized_words(text.text)) for text in record.positives] if wanted is not None else []
    chosen: list[int] = []
    taken: set[int] = set()
    for position in passing.tolist():
        document = int(ranked[position])
        key = int(pool.keys[document])
        if key in taken:
            filtered[Filter.REPEATED.value] += 1
            continue
        if wanted is not None:
            own = shingles(normalized_words(pool[document].text))
            if any(jaccard(own, other) >= wanted for other in positives):
                filtered[Filter.NEAR_DUPLICATE.value] += 1
                continue
        chosen.append(position)
        taken.add(key)
        if len(chosen) == config.num_negatives:
            break
    return chosen


def _by_score(
    window: np.ndarray, scores: np.ndarray, positive: float, config: MiningConfig, filtered: Counter[str]
) -> np.ndarray:
    """The indices whose score passes every limit. With several positives, the least similar one sets the limits."""
    passing = window
    limits: list[tuple[Filter, float | None]] = [
        # not `positive * fraction`, which for a negative similarity would be above the positive
        (Filter.FRACTION, None if config.max_fraction is None else positive - abs(positive) * (1 - config.max_fraction)),
        (Filter.MARGIN, None if config.margin is None else positive - config.margin),
        (Filter.MAX_SCORE, config.max_score),
    ]
    for reason, limit in limits:
        if limit is not None:
            below = scores[passing] <= limit
            filtered[reason.value] += int((~below).sum())
            passing = passing[below]
    if config.min_score is not None:
        above = scores[passing] >= config.min_score
        filtered[Filter.MIN_SCORE.value] += int((~above).sum())
        passing = passing[above]
    return passing
