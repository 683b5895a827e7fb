"""Which settings a run may change when it goes on from a checkpoint: the one table that answers for every key of the schema.

A checkpoint goes on as the run that wrote it. A setting that decides what is trained, on what and how makes it another run. The
others may change: silently where they change no number, and said where they may.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum


class Change(Enum):
    """What becomes of a resume whose setting differs from the checkpoint's.

    Attributes:
        FREE: it goes on; the setting changes no number of the training.
        REPORTED: it goes on, and the difference is printed. Either it changes numbers that do not make another run (how often
            something is measured, rounding, the last step), or content decides, wherever it lies: that of the rows
            (`data.streams.Stream.fingerprint`), of the weights and the tokenizer (`checkpoint.state.Identity`).
        REFUSED: it is another run.
    """

    FREE = "free"
    REPORTED = "reported"
    REFUSED = "refused"


CHANGES: Mapping[str, Change] = {
    "recipe": Change.REFUSED,
    "description": Change.FREE,
    "run_dir": Change.FREE,
    "seed": Change.REFUSED,
    "max_steps": Change.REPORTED,
    "dry_run": Change.FREE,
    "resume": Change.FREE,
    "notices": Change.FREE,
    "model.source": Change.REPORTED,
    "model.name": Change.REPORTED,
    "model.revision": Change.REPORTED,
    "model.family": Change.REPORTED,
    "model.architecture": Change.FREE,
    "model.init_seed": Change.REFUSED,
    "model.tiny_random": Change.REPORTED,
    "model.init_from": Change.REPORTED,
    "model.tokenizer": Change.REPORTED,
    "model.trust_remote_code": Change.FREE,
    "model.dtype": Change.REPORTED,
    "model.autocast": Change.REPORTED,
    "model.attention_kernel": Change.REPORTED,
    "model.attention_dropout": Change.REFUSED,
    "model.gradient_checkpointing": Change.FREE,
    "model.checkpoint_keeps": Change.FREE,
    "model.compile": Change.REPORTED,
    "model.pooling": Change.REFUSED,
    "model.projection_dim": Change.REFUSED,
    "model.normalize": Change.REPORTED,
    "lora": Change.REFUSED,
    "streams": Change.REFUSED,
    "streams.*.sources": Change.REPORTED,
    "optim": Change.REFUSED,
    "optim.max_skipped_steps": Change.REPORTED,
    "parallel": Change.FREE,
    "packing": Change.REPORTED,
    "packing.num_retained": Change.FREE,
    "logging": Change.FREE,
    "checkpoint": Change.FREE,
    "validation": Change.REPORTED,
    "export": Change.REPORTED,
    "export.verify": Change.FREE,
}
"""Dotted key -> what a change of it means; `*` is any one name. The longest entry that leads to a key answers for it."""


def change_of(key: str) -> Change:
    """What a change of a setting means for a resume.

    Args:
        key: dotted, as "streams.embedding.objective.temperature".

    Raises:
        KeyError: the table has no answer; every key of the schema has one.
    """
    parts = key.split(".")
    for length in range(len(parts), 0, -1):
        for entry, change in CHANGES.items():
            names = entry.split(".")
            if len(names) == length and all(name in ("*", part) for name, part in zip(names, parts, strict=False)):
                return change
    raise KeyError(key)
