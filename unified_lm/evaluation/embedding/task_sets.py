"""Sets of benchmark tasks that papers report on, as data."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache

from unified_lm.evaluation.embedding.instructions import TABLES


@dataclass(frozen=True, kw_only=True)
class RegistryTask:
    """A task of mteb's registry, narrowed to what is reported.

    Attributes:
        name: its name there.
        splits: evaluation splits; empty for the task's own.
        subsets: subsets (languages); empty for all.
    """

    name: str
    splits: tuple[str, ...] = ()
    subsets: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TaskSet:
    """A named set.

    Attributes:
        name: what the command line calls it.
        description: one line.
        source: the publication.
        tasks: its tasks.
    """

    name: str
    description: str
    source: str
    tasks: tuple[RegistryTask, ...]


@cache
def task_sets() -> dict[str, TaskSet]:
    """Name -> set."""
    content = json.loads((TABLES / "task_sets.json").read_text(encoding="utf-8"))
    return {
        name: TaskSet(
            name=name,
            description=value["description"],
            source=value["source"],
            tasks=tuple(
                RegistryTask(
                    name=task, splits=(options.get("split", value["split"]),), subsets=tuple(options.get("subsets", ()))
                )
                for task, options in value["tasks"].items()
            ),
        )
        for name, value in content.items()
    }
