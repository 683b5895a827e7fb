"""Log-probabilities of whole sources under the initial weights, computed once and kept in the cache.

Full fine-tuning has no adapters to switch off, and a second copy of the model would take its memory. The samples of a row do
not depend on the batch, so the reference model can read all of them before training and is not needed afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress

from unified_lm.batch import Pack, Sample, empty_pack, make_pack
from unified_lm.batch.pack import first_fit
from unified_lm.core import distributed
from unified_lm.core.agreement import run_on_rank0
from unified_lm.core.errors import DataError
from unified_lm.core.files import cache_dir, read_array, write_array
from unified_lm.data.streams import TableStream
from unified_lm.data.token_cache import table_key
from unified_lm.engine.sequences import sample_scores
from unified_lm.engine.training_module import PackOutput, TrainingModule

CHUNK_ROWS = 256
"""Rows scored between two writes to the cache: what a run that is killed loses at most."""

_VERSION = 1


class ReferenceCache:
    """Scores the rows of streams under a model as it is now; call it before the first update.

    Args:
        forward: pack -> `PackOutput`.
        trainable: the module behind `forward`.
        model_key: what tells this model's numbers from those of others: configuration, weights, dtype, kernel.
        token_budget: tokens of one forward.
        equal_forwards: whether every rank must run the same number of forwards (ZeRO-2 and 3).
        progress: whether rank 0 shows a progress bar.
    """

    def __init__(
        self,
        forward: Callable[[Pack], PackOutput],
        trainable: TrainingModule,
        model_key: str,
        token_budget: int,
        *,
        equal_forwards: bool = False,
        progress: bool = True,
    ) -> None:
        self.forward = forward
        self.trainable = trainable
        self.model_key = model_key
        self.token_budget = token_budget
        self.equal_forwards = equal_forwards
        self.progress = progress

    def attach(self, stream: TableStream) -> None:
        """Give a stream the log-probabilities of all its rows; what the cache lacks is computed. Collective."""
        stream.references = [self._source(stream, index, key) for index, key in enumerate(stream.table_keys())]

    def _source(self, stream: TableStream, index: int, table: str) -> np.ndarray:
        key = table_key(version=_VERSION, table=table, model=self.model_key, attention=stream.config.attention)
        folder = cache_dir("references", key)
        num_rows = len(stream.tables[index])
        values = np.zeros((num_rows, 2), dtype=np.float32)
        quiet = not (self.progress and distributed.is_rank0())
        with Progress(console=Console(stderr=True), transient=True, disable=quiet) as bar:
            task = bar.add_task(f"reference log-probabilities of {stream.source_names[index]}", total=num_rows)
            for start in range(0, num_rows, CHUNK_ROWS):
                rows = range(start, min(start + CHUNK_ROWS, num_rows))
                values[rows.start : rows.stop] = self._chunk(stream, index, rows, folder / f"{start:09d}.npy")
                bar.update(task, completed=rows.stop)
        return values

    def _chunk(self, stream: TableStream, index: int, rows: range, path: Path) -> np.ndarray:
        found = run_on_rank0(lambda: _read(path, len(rows)))
        if found is not None:
            return found
        rng = np.random.default_rng(0)  # these formats draw nothing from it
        mine = [
            (row, sample)
            for row in rows[distributed.rank() :: distributed.world_size()]
            for sample in stream.format.samples(stream.tables[index], row, row, rng)
        ]
        scores = self._score([sample for _, sample in mine])
        values = torch.zeros(len(rows), 2, dtype=torch.float32, device=distributed.local_device())
        for (row, sample), score in zip(mine, scores, strict=True):
            values[row - rows.start, sample.slot] = score
        result = distributed.all_reduce_sum(values).cpu().numpy()  # every entry is of one rank, and 0 on the others
        run_on_rank0(lambda: _write(path, result))
        return result

    def _score(self, samples: Sequence[Sample]) -> list[float]:
        packs = [make_pack(content) for content in first_fit(samples, self.token_budget)]
        if self.equal_forwards:
            (most,) = distributed.all_reduce_max([len(packs)])
            packs += [empty_pack()] * (most - len(packs))
        found: dict[int, float] = {}
        with self.trainable.scoring():
            for pack in packs:
                found |= sample_scores(pack, self.forward(pack.to(distributed.local_device())))
        return [found[id(sample)] for sample in samples]


def _read(path: Path, num_rows: int) -> np.ndarray | None:
    """A stored chunk, or None where there is none or it is damaged (it is then computed again)."""
    values = read_array(path)
    return np.array(values) if values is not None and values.shape == (num_rows, 2) else None


def _write(path: Path, values: np.ndarray) -> None:
    """Write a chunk so that it is whole or not there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_array(path, values)
    except OSError as error:
        raise DataError(
            f"cannot write the cache of reference log-probabilities, {path}: {error}. Set UNIFIED_LM_CACHE."
        ) from error
