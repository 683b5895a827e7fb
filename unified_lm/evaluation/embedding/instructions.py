"""Which instruction precedes a text of an evaluation task: tables as data, and the rules that apply them.

Embedding papers publish one instruction per task. Queries always have it; whether documents do depends on the paper, so the
table says so in a field.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from hashlib import blake2b
from pathlib import Path
from typing import Protocol

from unified_lm.core.errors import ConfigError, DataError, did_you_mean
from unified_lm.core.typed import require_typed
from unified_lm.core.user_files import read_json, user_path

TABLES = Path(__file__).parent / "tables"
"""Folder of the built-in tables."""

ASYMMETRIC_TYPES = ("Retrieval", "Reranking", "InstructionRetrieval", "InstructionReranking")
"""Task types of mteb that distinguish queries from documents."""

_VARIANT = re.compile(r"(HardNegatives)?(\.v\d+)?$")


class Role(Enum):
    """The role of a text in its task."""

    QUERY = "query"
    DOCUMENT = "document"
    TEXT = "text"
    """A text of a task that makes no such distinction: similarity, classification, clustering."""


@dataclass(frozen=True)
class TaskKey:
    """The properties of a task that decide its instruction.

    Attributes:
        name: the task's name.
        type: mteb's task type, "Retrieval", "STS"...
        prompt: the task's own instruction: one for all texts, or one per role; None if it has none.
    """

    name: str
    type: str
    prompt: str | Mapping[str, str] | None = None


class Instructions(Protocol):
    """A source of instructions."""

    @property
    def label(self) -> str:
        """Distinguishes results; "" for an export's own instructions."""
        ...

    def find(self, task: TaskKey, role: Role) -> str | None:
        """The instruction; "" for deliberately none, None if the source does not know the task."""
        ...


@dataclass(frozen=True)
class ExportInstructions:
    """The export's own: its "query" instruction before queries, its "document" instruction before all other texts.

    Stock sentence-transformers behaves like this under mteb.
    """

    instructions: Mapping[str, str]
    label: str = ""

    def find(self, task: TaskKey, role: Role) -> str:
        """The export's instruction for the role."""
        return self.instructions.get("query" if role is Role.QUERY else "document", "")


@dataclass(frozen=True)
class NoInstructions:
    """No instruction before any text."""

    label: str = "none"

    def find(self, task: TaskKey, role: Role) -> str:
        """Always ""."""
        return ""


@dataclass(frozen=True)
class TaskInstructions:
    """Each task's own instruction; documents have none unless the task gives them one."""

    label: str = "task"

    def find(self, task: TaskKey, role: Role) -> str | None:
        """The task's own instruction, None if it has none."""
        if task.prompt is None:
            return None
        if isinstance(task.prompt, str):
            return "" if role is Role.DOCUMENT else task.prompt
        return task.prompt.get(role.value, "") if role is not Role.TEXT else next(iter(task.prompt.values()), None)


@dataclass(frozen=True, kw_only=True)
class InstructionTable:
    """The instructions of a paper.

    Attributes:
        label: name of the table, with a hash of its content for a user's table.
        tasks: task name -> instruction, or role -> instruction.
        types: task type -> instruction, for tasks that `tasks` does not list.
        documents_with_instruction: task types whose documents have the instruction of the queries; documents of other types
            have none.
        source: where the instructions were published.
    """

    label: str
    tasks: Mapping[str, str | Mapping[str, str]]
    types: Mapping[str, str | Mapping[str, str]] = field(default_factory=dict)
    documents_with_instruction: tuple[str, ...] = ()
    source: str = ""

    def find(self, task: TaskKey, role: Role) -> str | None:
        """The table's instruction; a variant of a task (".v2", "HardNegatives") has the instruction of the task.

        A task that is not in the table has its own instruction (for an offline task, that of its task.yaml), or None.
        """
        base = _VARIANT.sub("", task.name)
        for entry in (self.tasks.get(task.name), self.tasks.get(base), self.types.get(task.type)):
            if entry is not None:
                return self._for_role(entry, task, role)
        return TaskInstructions().find(task, role)

    def _for_role(self, entry: str | Mapping[str, str], task: TaskKey, role: Role) -> str:
        if not isinstance(entry, str):
            return entry.get(role.value, "")
        bare = role is Role.DOCUMENT and task.type not in self.documents_with_instruction
        return "" if bare else entry


def table_names() -> list[str]:
    """Names of the built-in tables."""
    return sorted(path.stem for path in TABLES.glob("*.json") if path.stem != "task_sets")


def load_table(name_or_path: str) -> InstructionTable:
    """Read a built-in table, or a JSON file of the same form.

    Raises:
        ConfigError: no such table.
        DataError: the file is not a table.
    """
    own = name_or_path.endswith(".json")
    path = user_path(name_or_path) if own else TABLES / f"{name_or_path}.json"
    if not own and name_or_path not in table_names():
        known = ["export", "none", "task", *table_names()]
        raise ConfigError(f"unknown instructions '{name_or_path}'.{did_you_mean(name_or_path, known)} Or give a .json file.")
    value = read_json(path, fix="Write a table as docs/evaluation.md says.")
    fix = 'Expected "tasks": {task: instruction} and what else docs/evaluation.md says.'
    table = require_typed(_Table, value, path, DataError, fix=fix)
    _check_roles(table, path)
    name = table.name or path.stem
    return InstructionTable(
        label=f"{name}-{blake2b(path.read_bytes(), digest_size=4).hexdigest()}" if own else name,
        tasks=table.tasks,
        types=table.types,
        documents_with_instruction=table.documents_with_instruction,
        source=table.source,
    )


@dataclass(frozen=True, kw_only=True)
class _Table:
    """The content of a table's file."""

    tasks: Mapping[str, str | Mapping[str, str]]
    types: Mapping[str, str | Mapping[str, str]] = field(default_factory=dict)
    documents_with_instruction: tuple[str, ...] = ()
    name: str = ""
    source: str = ""


def _check_roles(table: _Table, path: Path) -> None:
    roles = {role.value for role in Role}
    for part, entries in (("tasks", table.tasks), ("types", table.types)):
        for task, entry in entries.items():
            for role in entry if isinstance(entry, Mapping) else ():
                if role not in roles:
                    raise DataError(
                        f"{path}: {part}.{task} has the unknown role '{role}'.{did_you_mean(role, roles)} Expected a string, "
                        'or {"query": ..., "document": ..., "text": ...} with strings.'
                    )


def instructions_of(name: str, export: Mapping[str, str]) -> Instructions:
    """The source of instructions that a user names.

    Args:
        name: "export", "none", "task", a table's name, or a .json file.
        export: the export's own instructions.

    Raises:
        ConfigError: unknown name.
        DataError: the file is not a table.
    """
    if name == "export":
        return ExportInstructions(export)
    if name == "none":
        return NoInstructions()
    if name == "task":
        return TaskInstructions()
    return load_table(name)


def roles_of(task_type: str) -> tuple[Role, ...]:
    """The roles of the texts of a task type."""
    return (Role.QUERY, Role.DOCUMENT) if task_type in ASYMMETRIC_TYPES else (Role.TEXT,)


def require_known(instructions: Instructions, tasks: list[TaskKey]) -> None:
    """Refuse tasks without an instruction before any task runs.

    Raises:
        ConfigError: the source does not know some of the tasks.
    """
    missing = [task.name for task in tasks if any(instructions.find(task, role) is None for role in roles_of(task.type))]
    if missing:
        raise ConfigError(
            f"the instructions '{instructions.label}' have none for {', '.join(missing)}. Write a table (.json, see "
            "docs/evaluation.md) that lists them, put `instruction:` into an offline task's task.yaml, or choose "
            "--instructions export or none."
        )
