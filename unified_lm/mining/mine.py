"""Hard-negative mining: embed, search exactly, filter, write training rows. Sharded and resumable.

Rows are mined in blocks. Every finished block and every finished chunk of embeddings is a file, and existing files are reused.
Any number of processes, sequential or concurrent, can work on one output; the one that finds all blocks finished joins them.
The output does not depend on the number of processes.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from unified_lm.core.errors import ConfigError, DataError
from unified_lm.core.files import write_json
from unified_lm.core.outputs import building_file, check_files
from unified_lm.core.random import derive_seed
from unified_lm.core.typed import show_briefly
from unified_lm.core.user_files import parse_yaml
from unified_lm.data.rows.files import record_row, write_report, write_rows
from unified_lm.data.rows.records import PairRecord
from unified_lm.data.sources import RecordSource
from unified_lm.mining.embedders import Embedder
from unified_lm.mining.nearest import nearest
from unified_lm.mining.negatives import (
    DocumentPool,
    Filter,
    Given,
    MiningConfig,
    MiningStatistics,
    choose_negatives,
    mean,
)
from unified_lm.mining.vector_cache import CHUNK, VectorCache

BLOCK_ROWS = 1024
"""Number of rows that are mined and written together."""
# Increase when a change alters the content of a block.
_VERSION = 1
_RANDOM_PER_ROW = 4

Progress = Callable[[str, int, int], None]
"""Called with (name of the work, units done, units in total)."""


@dataclass(frozen=True)
class WorkShard:
    """The part of the blocks that a process mines: shard `index` (from 0) of `count`."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> WorkShard:
        """Parse "i/n", with i from 1 to n.

        Raises:
            ConfigError: the text has another form.
        """
        match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
        if match and 1 <= int(match[1]) <= int(match[2]):
            return cls(int(match[1]) - 1, int(match[2]))
        raise ConfigError(f"shard: got {show_briefly(text)}, expected i/n with i from 1 to n, such as 1/4.")


class Mining:
    """One mining job: a source, a model, settings, an output.

    Args:
        source: source of pair rows.
        embedder: the model that scores documents.
        config: how negatives are chosen.
        out: the .jsonl file to write; its report is `NAME.report.yaml` in the same folder.
        cache: folder for embeddings.
        corpus: source of texts that serve as further documents.
        device: device on which similarities are computed.
        block_rows: rows per block; part of the job's identity.
        chunk: texts per file of embeddings.

    Raises:
        DataError: `out` does not end in .jsonl, or another job wrote it.
    """

    def __init__(
        self,
        source: RecordSource,
        embedder: Embedder,
        config: MiningConfig,
        out: Path,
        *,
        cache: Path,
        corpus: RecordSource | None = None,
        device: str = "cpu",
        block_rows: int = BLOCK_ROWS,
        chunk: int = CHUNK,
    ) -> None:
        check_places([out])
        self.source, self.config, self.out = source, config, out
        self._corpus = corpus
        self._device = device
        self._block_rows = block_rows
        self._queries = VectorCache(cache, f"query:{embedder.key}", embedder.queries, block_rows)
        self._documents = VectorCache(cache, f"document:{embedder.key}", embedder.documents, chunk)
        self.key = _job_key(source, corpus, embedder, config, block_rows)
        self._parts = out.with_name(f".{out.name}.{self.key[:12]}.parts")
        self.report_path = _report_of(out)
        self._refuse_other_output()

    @property
    def is_complete(self) -> bool:
        """Whether the output of exactly this job exists."""
        return self.out.is_file() and self._reported_key() == self.key

    def run(self, shard: WorkShard | None = None, progress: Progress | None = None) -> dict[str, Any] | None:
        """Mine the unfinished blocks of a shard; join all blocks if none is missing then.

        Args:
            shard: the shard to mine; None for all blocks.
            progress: receives the progress of the work.

        Returns:
            The report, or None while blocks of other shards are missing.

        Raises:
            DataError: the cache cannot be written, or the model returned invalid vectors.
        """
        if self.is_complete:
            return self._report()
        shard = shard or WorkShard()
        blocks = self._blocks()
        own = [block for block in blocks if block % shard.count == shard.index and not self._part(block).exists()]
        if self.is_complete:  # another process has joined and removed the blocks since the first check
            return self._report()
        if own:
            self._parts.mkdir(parents=True, exist_ok=True)
            pool = DocumentPool(self.source, self._corpus)
            done = [0]

            def embedded(count: int) -> None:
                """Report that `count` further documents are embedded."""
                done[0] += count
                if progress is not None:
                    progress("embedding documents", done[0], len(pool))

            documents = self._documents.chunks(pool, start=shard.index / shard.count, progress=embedded)
            for number, block in enumerate(own, 1):
                self._mine(block, pool, documents)
                if progress is not None:
                    progress("mining blocks of rows", number, len(own))
        return self._join() if all(self._part(block).exists() for block in blocks) or self.is_complete else None

    def _blocks(self) -> range:
        return range(-(-len(self.source) // self._block_rows))

    def _part(self, block: int) -> Path:
        return self._parts / f"{block:08d}.jsonl"

    def _mine(self, block: int, pool: DocumentPool, documents: Sequence[np.ndarray]) -> None:
        """Mine a block and write its statistics, then its rows: an existing file of rows implies that both are complete."""
        rows = range(block * self._block_rows, min((block + 1) * self._block_rows, len(self.source)))
        records = [record for row in rows if isinstance(record := self.source[row], PairRecord)]
        queries = self._query_vectors(records)
        kept = [record.negatives if self.config.given is Given.KEEP else () for record in records]
        forbidden = [pool.forbidden(record, texts) for record, texts in zip(records, kept, strict=True)]
        ranked, scores = nearest(queries, documents, self.config.depth, excluded=forbidden, device=self._device)
        vectors = _Gather(documents, self._documents.chunk)
        statistics = MiningStatistics()
        mined = []
        for i, record in enumerate(records):
            found = int(np.isfinite(scores[i]).sum())
            own = pool.indices(record.positives)
            _count_same(statistics.filtered, queries[i], vectors, np.setdiff1d(forbidden[i], own), scores[i, :found])
            positive_scores = vectors(own) @ queries[i]
            candidates = (ranked[i, :found], scores[i, :found])
            chosen = choose_negatives(
                pool, record, positive_scores.tolist(), *candidates, self.config, rows[i], statistics.filtered
            )
            negatives = [pool[int(ranked[i, position])] for position in chosen]
            mined.append(PairRecord(record.query, record.positives, (*kept[i], *negatives)))
            # Similarity of random documents: the scale on which the mined similarities are to be read.
            blind = vectors(_random_documents(len(pool), forbidden[i], derive_seed(self.config.seed, "random", rows[i])))
            statistics += MiningStatistics(
                rows=1,
                mined=len(chosen),
                short=int(len(chosen) < self.config.num_negatives),
                none=int(not chosen),
                positive=_counted(positive_scores),
                hard=_counted(scores[i, chosen]),
                random=_counted(blind @ queries[i]),
            )
        write_json(self._part(block).with_suffix(".statistics"), vars(statistics))
        write_rows(self._part(block), map(record_row, mined))

    def _query_vectors(self, records: Sequence[PairRecord]) -> np.ndarray:
        """Vectors of the records' queries; a repeated query is embedded once."""
        distinct = list(dict.fromkeys(record.query for record in records))
        index_of = {query: index for index, query in enumerate(distinct)}
        vectors = self._queries.chunk_of(distinct)
        return np.asarray(vectors)[[index_of[record.query] for record in records]]

    def _join(self) -> dict[str, Any]:
        """Concatenate all blocks, write the report, remove the parts."""
        with FileLock(self.out.with_name(f".{self.out.name}.lock")):
            if self.is_complete:  # another process joined them while this one waited for the lock
                return self._report()
            statistics = MiningStatistics()
            with building_file(self.out) as building:
                with open(building, "wb") as whole:
                    for block in self._blocks():
                        counted = json.loads(self._part(block).with_suffix(".statistics").read_text(encoding="utf-8"))
                        statistics += MiningStatistics.from_dict(counted)
                        with open(self._part(block), "rb") as part:
                            shutil.copyfileobj(part, whole)
                report = self._as_report(statistics)
                # Report first: `is_complete` needs both files, and an output without its report would be refused as foreign.
                write_report(self.report_path, report)
            shutil.rmtree(self._parts)
        return report

    def _as_report(self, statistics: MiningStatistics) -> dict[str, Any]:
        config = {name: getattr(value, "value", value) for name, value in asdict(self.config).items()}
        return {
            "job": self.key,
            "source": self.source.name,
            "rows": statistics.rows,
            "mined_negatives": statistics.mined,
            "rows_with_too_few": statistics.short,
            "rows_with_none": statistics.none,
            "mean_similarity": {
                "positives": mean(statistics.positive),
                "mined": mean(statistics.hard),
                "random": mean(statistics.random),
            },
            "filtered": {reason.value: statistics.filtered[reason.value] for reason in Filter},
            "settings": config,
        }

    def _report(self) -> dict[str, Any]:
        """The report that stands at its place; empty where there is none that can be read."""
        try:
            loaded = parse_yaml(self.report_path.read_bytes())
        except (FileNotFoundError, ValueError):
            return {}
        return loaded if isinstance(loaded, dict) else {}

    def _reported_key(self) -> str | None:
        return self._report().get("job")

    def _refuse_other_output(self) -> None:
        if self.is_complete:
            return
        if self.out.is_file() and not self.out.is_symlink():
            raise DataError(f"{self.out} exists and belongs to another job: remove it, or choose another --out.")
        check_files([self.out, self.report_path])


def check_places(outputs: Iterable[Path]) -> None:
    """Check that mined rows may go to files, as far as that is known without their jobs: to be called before a model is loaded.

    Raises:
        DataError: a name does not end in .jsonl.
        OutputError: a file or its report would replace what this package did not write.
    """
    for out in outputs:
        if out.suffix != ".jsonl":
            raise DataError(f"cannot write {out}: mined rows go to a file whose name ends in .jsonl.")
        if not (out.is_file() and _report_of(out).is_file()):  # those of a job, which says whether it is this one
            check_files([out, _report_of(out)])


def _report_of(out: Path) -> Path:
    return out.with_name(f"{out.stem}.report.yaml")


class _Gather:
    """Access to rows of vectors stored in pieces of equal length (the last may be shorter)."""

    def __init__(self, pieces: Sequence[np.ndarray], length: int) -> None:
        self._pieces, self._length = pieces, length

    def __call__(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """float32 `[indices, D]`."""
        dimensions = self._pieces[0].shape[1]
        rows = [self._pieces[i // self._length][i % self._length] for i in map(int, indices)]
        return np.stack(rows) if rows else np.empty((0, dimensions), np.float32)


def _count_same(filtered: Counter[str], query: np.ndarray, vectors: _Gather, forbidden: np.ndarray, scores: np.ndarray) -> None:
    """Count the documents that were excluded for their text and would otherwise have been ranked."""
    if len(forbidden):
        least = scores[-1] if len(scores) else -np.inf
        filtered[Filter.SAME_TEXT.value] += int((vectors(forbidden) @ query >= least).sum())


def _random_documents(count: int, forbidden: np.ndarray, seed: int) -> np.ndarray:
    drawn = np.random.default_rng(seed).integers(0, count, _RANDOM_PER_ROW)
    return np.setdiff1d(drawn, forbidden)


def _counted(values: np.ndarray) -> tuple[int, float]:
    return len(values), float(np.sum(values, dtype=np.float64))


def _job_key(
    source: RecordSource, corpus: RecordSource | None, embedder: Embedder, config: MiningConfig, block_rows: int
) -> str:
    settings = {name: getattr(value, "value", value) for name, value in asdict(config).items()}
    parts = [_VERSION, source.fingerprint, corpus.fingerprint if corpus else None, embedder.key, settings, block_rows]
    return blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()
