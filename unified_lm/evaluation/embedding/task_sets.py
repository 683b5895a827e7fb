"""Sets of benchmark tasks that papers report, as data."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache

from unified_lm.evaluation.embedding.instructions import TABLES


@dataclass(frozen=True, kw_only=True)
class RegistryTask:
    """A task of mteb's registry, restricted to the reported splits and subsets.

    Attributes:
        name: its name there.
        splits: evaluation splits; empty selects the task's own.
        subsets: subsets (languages); empty selects all.
    """

    name: str
    splits: tuple[str, ...] = ()
    subsets: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TaskSet:
    """A named set of tasks.

    Attributes:
        name: its name on the command line.
        description: one-line description.
        source: the publication.
        tasks: its tasks.
    """

    name: str
    description: str
    source: str
    tasks: tuple[RegistryTask, ...]


@cache
def task_sets() -> dict[str, TaskSet]:
    """Name -> set of tasks."""
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
