"""Steps whose loss or gradient is not finite: counted, their rows saved, and the end of the run when they do not stop."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from unified_lm.batch import Batch, Pack
from unified_lm.core import distributed
from unified_lm.core.errors import ModelError
from unified_lm.core.files import write_text
from unified_lm.core.random import RngState
from unified_lm.engine.training_module import PackOutput

_MAX_FILES = 20


@dataclass
class SkippedSteps:
    """Counts steps without an update.

    Attributes:
        limit: the run ends when this many follow one another.
        total: skipped steps of the run.
        in_a_row: those since the last good step.
    """

    limit: int
    total: int = 0
    in_a_row: int = 0

    def count(self, *, skipped: bool) -> None:
        """Count one step."""
        self.total += skipped
        self.in_a_row = self.in_a_row + 1 if skipped else 0

    def require_progress(self, step: int, losses: Mapping[str, float], norm: float, rows: Path) -> None:
        """End the run after too many skipped steps in a row.

        Args:
            step: the step just skipped.
            losses: per stream.
            norm: of the gradient; NaN where the loss was not finite.
            rows: where the step's rows are.

        Raises:
            ModelError: the limit is reached.
        """
        if self.in_a_row < self.limit:
            return
        parts = ", ".join(f"{name} {value}" for name, value in losses.items())
        raise ModelError(
            f"step {step}: the loss or its gradient was not finite {self.in_a_row} times in a row (losses: {parts}; gradient "
            f"norm {norm}). The weights are those of the last good step. The rows are in {rows}. Lower "
            "optim.learning_rate or mend the rows, then continue with resume=auto; optim.max_skipped_steps sets the limit."
        )


def finite(values: Mapping[str, float]) -> dict[str, float]:
    """The values that are finite; JSON has no others."""
    return {name: value for name, value in values.items() if math.isfinite(value)}


def save_rows(
    run_dir: Path,
    step: int,
    batch: Batch,
    decode: Callable[[Sequence[int]], str],
    forward: Callable[[Pack], PackOutput] | None,
) -> Path:
    """Write the rows of a step on every rank to `run_dir/offending-step-K.jsonl`, one sample a line. Collective.

    Args:
        run_dir: the folder of the run; it gets at most 20 such files.
        step: number of the step.
        batch: this rank's share, on its device.
        decode: token ids -> text.
        forward: runs a pack, to tell the packs apart whose forward is not finite; None where ranks may not forward alone.

    Returns:
        The file (of rank 0).
    """
    path = run_dir / f"offending-step-{step}.jsonl"
    rows = [
        row
        for index, pack in enumerate(batch.packs)
        for row in _rows(pack, index, decode, None if forward is None else _is_finite(pack, forward))
    ]
    gathered = distributed.all_gather_objects(rows)
    if distributed.is_rank0() and len(list(run_dir.glob("offending-step-*.jsonl"))) < _MAX_FILES:
        lines = [json.dumps({"rank": rank, **row}, ensure_ascii=False) for rank, part in enumerate(gathered) for row in part]
        write_text(path, "\n".join(lines) + "\n")
    return path


def _rows(pack: Pack, index: int, decode: Callable[[Sequence[int]], str], finite_forward: bool | None) -> list[dict[str, Any]]:
    told = {} if finite_forward is None else {"finite_forward": finite_forward}
    return [
        {
            "pack": index,
            **told,
            "stream": sample.stream,
            "group": sample.group,
            "slot": sample.slot,
            "num_tokens": len(sample),
            "text": decode(sample.input_ids.tolist()),
        }
        for sample in pack.samples
    ]


@torch.no_grad()
def _is_finite(pack: Pack, forward: Callable[[Pack], PackOutput]) -> bool:
    state = RngState.capture()
    try:
        output = forward(pack)
    finally:
        state.restore()
    values = [output.embeddings, *(term.sum for term in output.terms.values())]
    values += [tensor for tensors in output.readouts.values() for tensor in tensors.values()]
    return all(bool(value.isfinite().all()) for value in values)
