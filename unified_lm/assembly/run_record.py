"""`RUN/run.json`: what a run was made of and where it ran. Written when it starts; every later start adds an entry."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path
from typing import Any

from torch import nn

from unified_lm.assembly.build import Run
from unified_lm.checkpoint.state import load_state
from unified_lm.core import distributed
from unified_lm.core.errors import DataError
from unified_lm.core.files import write_json
from unified_lm.core.user_files import read_json
from unified_lm.core.version import code_version
from unified_lm.engine.accounting.throughput import describe_device

FILE_NAME = "run.json"


def write_record(run: Run) -> None:
    """Write the record of a run that is about to start. Call it on one rank.

    Raises:
        DataError: an earlier start left a file that cannot be read.
    """
    training = run.training
    path = training.run_dir / FILE_NAME
    step = 0 if training.resume_from is None else load_state(training.resume_from, training.identity).step
    starts = [start for start in _earlier_starts(path) if start["from_step"] < step]  # later ones left nothing behind
    record = {
        "recipe": training.config.recipe,
        "model": _model(run),
        "data": data_entries(run),
        "starts": [*starts, _start(run, step)],
    }
    write_json(path, record)


def record_what_was_read(run: Run) -> None:
    """Bring the entries of sources up to date whose rows were read along while training. Call it on one rank."""
    path = run.training.run_dir / FILE_NAME
    write_json(path, _read(path) | {"data": data_entries(run)})


_ENTRY_KEYS = {"stream", "source", "rows", "fingerprint"}
"""What the entry of a source has at least."""


def recorded_data(run_dir: Path) -> list[dict[str, Any]] | None:
    """What a run's record says of its sources (see `data_entries`); None where there is no record.

    Raises:
        DataError: the record cannot be read.
    """
    path = run_dir / FILE_NAME
    return list(_read(path)["data"]) if path.is_file() else None


def _earlier_starts(path: Path) -> list[dict[str, Any]]:
    return list(_read(path)["starts"]) if path.is_file() else []


def _read(path: Path) -> dict[str, Any]:
    """A record with its lists.

    Raises:
        DataError: it is damaged.
    """
    fix = "Remove it; the report and later exports will lack what it says of the data."
    content = read_json(path, fix=fix)
    if not isinstance(content, dict):
        raise DataError(f"{path} is damaged: it holds {type(content).__name__}, expected an object. {fix}")
    starts, data = content.get("starts"), content.get("data")
    if not isinstance(starts, list) or not all(isinstance(s, dict) and isinstance(s.get("from_step"), int) for s in starts):
        raise DataError(f"{path} is damaged: it has no list of starts with the steps they began at. {fix}")
    if not isinstance(data, list) or not all(isinstance(entry, dict) and entry.keys() >= _ENTRY_KEYS for entry in data):
        raise DataError(f"{path} is damaged: it has no list of the data with {', '.join(sorted(_ENTRY_KEYS))}. {fix}")
    return content


def _model(run: Run) -> dict[str, Any]:
    trainable = run.training.trainable
    provenance = run.loaded.provenance
    return {
        "name": provenance["name"],
        "revision": provenance.get("revision") or "",
        "family": provenance["family"],
        "fingerprint": provenance["fingerprint"],
        "parameters": _count(trainable, trained=False),
        "trained_parameters": _count(trainable, trained=True),
        "attention_kernel": trainable.backbone.kernel,
        "notices": [*provenance["notices"], *(run.lora.notices if run.lora else ())],
    }


def _count(module: nn.Module, *, trained: bool) -> int:
    """Parameters; those that ZeRO-3 has shared out remember their size."""
    return sum(int(getattr(p, "ds_numel", p.numel())) for p in module.parameters() if p.requires_grad or not trained)


def data_entries(run: Run) -> list[dict[str, Any]]:
    """One entry per source: rows in use, what was left out and why, cut texts, and a hash of the content."""
    found = []
    for name, stream in run.streams.items():
        for entry in stream.entries:
            found.append(
                {
                    "stream": name,
                    "source": entry.name,
                    "rows": entry.rows,
                    "rejected": dict(entry.rejected),
                    "truncated": entry.truncated,
                    "ignored": dict(entry.ignored),
                    "fingerprint": entry.fingerprint,
                }
            )
    return found


def _start(run: Run, step: int) -> dict[str, Any]:
    training = run.training
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "from_step": step,
        "num_ranks": distributed.world_size(),
        "backend": training.backend.name,
        "device_type": distributed.local_device().type,
        "device": describe_device(),
        "peak_teraflops_per_device": training.meter.peak.flops / 1e12,
        "peak_source": training.meter.peak.source,
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "versions": code_version(),
    }
