"""A mkdocs hook: the pages of the configuration reference, made from the dataclasses that define it.

A class of settings has one sentence under each field, as a string literal. Python throws these away, so they are read from the
source. To document another class, name it in `pages`; a class whose keys differ by kind (objectives, formats) goes on the page
of its base.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from functools import cache
from pathlib import Path
from textwrap import dedent
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from unified_lm.config import schema
from unified_lm.data.formats import FORMATS, MaskingConfig
from unified_lm.objectives import OBJECTIVES

FOLDER = "reference/configuration"
"""Where the pages are, below `docs/` (and nowhere on the disk)."""


@dataclass(frozen=True)
class Page:
    """One page of the reference.

    Attributes:
        name: its file, without the ending.
        title: its heading.
        prefix: what comes before a key on the command line, dot included.
        classes: the dataclasses, a base before the classes that add to it.
    """

    name: str
    title: str
    prefix: str
    classes: tuple[type, ...]


@dataclass(frozen=True)
class Key:
    """One field of a dataclass.

    Attributes:
        name: its name.
        type: its annotation, as written.
        default: its default, as code; "required" where there is none.
        sentence: the string under it.
        owner: the class that defines it.
    """

    name: str
    type: str
    default: str
    sentence: str
    owner: type


def pages() -> list[Page]:
    """Every page, in the order of the navigation."""
    return [
        Page("run", "Run", "", (schema.RunConfig,)),
        Page("model", "Model", "model.", (schema.ModelConfig,)),
        Page("lora", "LoRA", "lora.", (schema.LoraConfig,)),
        Page("stream", "Streams", "streams.NAME.", _kinds(schema.StreamConfig, FORMATS)),
        Page("source", "Sources", "streams.NAME.sources", (schema.SourceConfig,)),
        Page("objective", "Objectives", "streams.NAME.objective.", _kinds(schema.ObjectiveConfig, OBJECTIVES)),
        Page("masking", "Masking", "streams.NAME.masking.", (MaskingConfig,)),
        Page("optim", "Optimizer", "optim.", (schema.OptimConfig,)),
        Page("parallel", "Parallelism", "parallel.", (schema.ParallelConfig,)),
        Page("packing", "Packing", "packing.", (schema.PackingConfig,)),
        Page("logging", "Logging", "logging.", (schema.LoggingConfig,)),
        Page("checkpoint", "Checkpoints", "checkpoint.", (schema.CheckpointConfig,)),
        Page("validation", "Validation", "validation.", (schema.ValidationConfig, schema.RetrievalConfig)),
        Page("export", "Export", "export.", (schema.ExportConfig,)),
    ]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Called by mkdocs: adds the generated pages to those on the disk."""
    every = pages()
    for page in every:
        files.append(File.generated(config, f"{FOLDER}/{page.name}.md", content=render(page, every)))
    return files


def render(page: Page, every: list[Page]) -> str:
    """The Markdown of a page.

    Args:
        page: what to render.
        every: all pages, to link a key whose value is a class of another one.
    """
    parts = [f"# {page.title}", "", _command_line(page.prefix)]
    for index, owner in enumerate(page.classes):
        if index:
            parts += ["", f"## {_heading(owner)}"]
        parts += ["", _first_paragraph(owner)]
        base = next((earlier for earlier in reversed(page.classes[:index]) if issubclass(owner, earlier)), None)
        keys = [key for key in keys_of(owner) if base is None or key.owner not in base.__mro__]
        if base is not None:
            parts += ["", f"It has every key of `{base.__name__}` (above)" + (", and:" if keys else ".")]
        if keys:
            parts += ["", "| key | type | default | meaning |", "| --- | --- | --- | --- |"]
            parts += [_row(key, page, every) for key in keys]
    files = dict.fromkeys(_file(owner) for owner in page.classes)
    return "\n".join([*parts, "", f"Made from {', '.join(f'`{file}`' for file in files)}.", ""])


def _kinds(base: type, table: Mapping[str, type]) -> tuple[type, ...]:
    """The base of a part's descriptions, and every kind with what it extends, a base before the classes that add to it."""
    found = dict.fromkeys(owner for kind in table.values() for owner in reversed(kind.__mro__) if issubclass(owner, base))
    return tuple(found)


def keys_of(owner: type) -> list[Key]:
    """The fields of a dataclass, inherited ones included, with their sentences.

    A class that only changes the default of an inherited field may leave the sentence to its base.

    Raises:
        ValueError: a field has no string literal under it.
    """
    found = []
    for field in dataclasses.fields(owner):
        definitions = [base for base in owner.__mro__ if field.name in vars(base).get("__annotations__", {})]
        sentence = next((text for base in definitions if (text := _sentences(base).get(field.name))), None)
        if sentence is None:
            raise ValueError(f"{owner.__name__}.{field.name} has no sentence under it ({_file(definitions[0])}).")
        annotation = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type))
        found.append(Key(field.name, annotation, _default(field), sentence, definitions[0]))
    return found


@cache
def _sentences(owner: type) -> dict[str, str]:
    """The string literal under each field that a class itself defines."""
    (tree,) = ast.parse(dedent(inspect.getsource(owner))).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for field, below in zip(tree.body, tree.body[1:]):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and _is_text(below):
            found[field.target.id] = " ".join(below.value.value.split())  # type: ignore[attr-defined]
    return found


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not MISSING:
        return repr(field.default)
    if field.default_factory is not MISSING:
        made = field.default_factory()
        return f"{type(made).__name__}()" if dataclasses.is_dataclass(made) else repr(made)
    return "required"


def _heading(owner: type) -> str:
    """The class; where it describes a kind that a recipe chooses by name, after that name."""
    kind = next((key.default.strip("'") for key in keys_of(owner) if key.name in ("name", "format")), "required")
    return owner.__name__ if kind == "required" else f"`{kind}`: {owner.__name__}"


def _command_line(prefix: str) -> str:
    if not prefix:
        return "On the command line: `key=value`."
    if not prefix.endswith("."):
        return f"A list, in a recipe or on the command line: `{prefix}=[{{key: value, ...}}, ...]`."
    return f"On the command line: `{prefix}key=value`."


def _row(key: Key, page: Page, every: list[Page]) -> str:
    default = key.default if key.default == "required" else f"`{key.default}`"
    sentence = key.sentence.replace("|", "\\|")  # a bar ends a cell, except inside code
    return f"| `{key.name}` | {_type(key.type, page, every)} | {default} | {sentence} |"


def _type(annotation: str, page: Page, every: list[Page]) -> str:
    """The annotation, followed by links to the pages of the classes in it."""
    named = set(re.findall(r"\w+", annotation))
    there = [other for other in every if other is not page and named & {owner.__name__ for owner in other.classes}]
    return f"`{annotation}`" + "".join(f" ([{other.title}]({other.name}.md))" for other in there)


def _first_paragraph(owner: type) -> str:
    return " ".join(inspect.cleandoc(owner.__doc__ or "").split("\n\n")[0].split())


def _file(owner: type) -> str:
    """The source file of a class, from the package's folder on."""
    path = Path(inspect.getsourcefile(owner) or "").resolve()
    return "/".join(path.parts[path.parts.index("unified_lm") :]) if "unified_lm" in path.parts else path.name
