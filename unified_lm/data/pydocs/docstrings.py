"""Extraction of docstrings from source files, without importing them, and removal of their markup.

Included are public functions, classes, methods and modules, and the `add_docstr` / `add_newdoc` calls by which numpy and torch
document their C code.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass

_MAX_SIGNATURE = 200
# Sections of code or links rather than prose.
_DROPPED_SECTIONS = {"example", "examples", "references", "see also", "usage", "doctest", "reference", "benchmarks"}
_SECTION = re.compile(r"^(?:#+\s*)?([A-Z][A-Za-z ]{2,30}):{0,2}$")
_UNDERLINE = re.compile(r"^([-=~^*\"'`#+])\1{2,}$")
_SIGNATURE = re.compile(r"^[\w.]+\s?\(.*\)(\s*->\s*.*)?$", re.DOTALL)
_DIRECTIVE = re.compile(r"^\.\.\s")
# Directives whose indented content is kept as prose.
_ADMONITION = re.compile(r"^\.\.\s+(?:note|warning|tip|important|hint|attention|caution|admonition)::\s*", re.IGNORECASE)
# Sphinx renders only the last component of a target that begins with a tilde.
_ROLE = re.compile(r":(?:[a-z]+:)?[a-z]+:`(?:~[\w.]*\.)?~?([^`<]*?)(?:\s*<[^`>]*>)?`")
_LINK = re.compile(r"`([^`<]+?)\s*<[^`>]*>`_{0,2}")
_MARKDOWN_LINK = re.compile(r"\[([^\]]+)\]\([^)]*\)")
_TICKS = re.compile(r"`+([^`]*)`+_{0,2}")
_PLACEHOLDER = re.compile(r"\{\w*\}")
_TABLE = re.compile(r"[+|=-]{4,}")
_LISTING = re.compile(
    r"^(?:args?|arguments|parameters|other parameters|keyword args|keyword arguments|kwargs|returns?|yields?|raises|warns|"
    r"attributes|methods|shape|inputs?|outputs?|params|fields|members):|^[\w*, ]{1,40} : ",
    re.IGNORECASE,
)
_PARAGRAPH_BREAK = re.compile(r"\n\s*\n")


@dataclass(frozen=True, slots=True)
class Docstring:
    """A cleaned docstring.

    Attributes:
        name: qualified name without private components: ``numpy.linalg.norm``.
        signature: parameters in parentheses; "" for a module or an unknown signature.
        summary: first paragraph, as one line.
        paragraphs: the other paragraphs, one line each.
    """

    name: str
    signature: str
    summary: str
    paragraphs: tuple[str, ...]

    @property
    def prose(self) -> tuple[str, ...]:
        """The paragraphs of sentences, without lists of parameters, results or errors."""
        return tuple(text for text in self.paragraphs if not _LISTING.match(text) and text.endswith((".", "!", "?", ":")))


def extract(source: bytes, module: str) -> Iterator[Docstring]:
    """Yield the docstrings of a source file in file order.

    Args:
        source: Python source. A file that this Python version cannot parse (a template, old syntax) yields nothing.
        module: dotted name of the module.
    """
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    yield from _one(module, "", ast.get_docstring(tree, clean=False))
    yield from _members(tree, module)


def _members(node: ast.AST, prefix: str) -> Iterator[Docstring]:
    """Yield the public definitions in a body, including those under if and try but not those in functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if child.name.startswith("_"):
                continue
            name = f"{prefix}.{child.name}"
            is_class = isinstance(child, ast.ClassDef)
            yield from _one(
                name, "" if isinstance(child, ast.ClassDef) else _signature(child), ast.get_docstring(child, clean=False)
            )
            if is_class:
                yield from _members(child, name)
        elif isinstance(child, ast.If | ast.Try):
            yield from _members(child, prefix)
        elif isinstance(child, ast.Expr) and isinstance(child.value, ast.Call):
            yield from _attached(child.value)


def _attached(call: ast.Call) -> Iterator[Docstring]:
    """Yield that of ``add_docstr(torch.abs, r"...".format(...))`` or ``add_newdoc("numpy", "ndarray", ("sum", "..."))``."""
    function = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if function == "add_docstr" and len(call.args) == 2:
        name = ast.unparse(call.args[0])
    elif function == "add_newdoc" and len(call.args) == 3:
        module, target, last = call.args
        parts = [module, target, *(last.elts[:1] if isinstance(last, ast.Tuple) else [])]
        name = ".".join(part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str))
    else:
        return
    texts = (node.value for node in ast.walk(call.args[-1]) if isinstance(node, ast.Constant))
    text = next((value for value in texts if isinstance(value, str) and "\n" in value), None)
    if text is not None and not any(part.startswith("__") for part in name.split(".")):
        yield from _one(name, "", _PLACEHOLDER.sub("", text))


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """Parameters with their defaults but without annotations, which would double the length."""
    arguments = node.args
    for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg):
        if argument is not None:
            argument.annotation = None
    text = re.sub(r"^(self|cls)(, |$)", "", ast.unparse(arguments))
    return f"({text if len(text) <= _MAX_SIGNATURE else text[:_MAX_SIGNATURE].rpartition(', ')[0] + ', ...'})"


def _one(name: str, signature: str, text: str | None) -> Iterator[Docstring]:
    if text is None:
        return
    public = ".".join(part for part in name.split(".") if not part.startswith("_"))
    paragraphs = clean(text)
    # Docstrings of C functions begin with a line that holds the signature.
    if paragraphs and _SIGNATURE.match(paragraphs[0]):
        signature = "(" + paragraphs.pop(0).partition("(")[2].strip()
    if public and paragraphs:
        yield Docstring(public, signature[:_MAX_SIGNATURE], paragraphs[0], tuple(paragraphs[1:]))


def clean(text: str) -> list[str]:
    """The paragraphs of a docstring, one line each, without doctests, code blocks, directives and inline markup."""
    lines = inspect.cleandoc(text).expandtabs().splitlines()
    return [cleaned for block in _PARAGRAPH_BREAK.split("\n".join(_prose_lines(lines))) if (cleaned := _inline(block))]


def _prose_lines(lines: list[str]) -> Iterator[str]:
    """Drop lines that are not prose. A skipped block lasts until the indentation returns to that of its first line."""
    skip_deeper_than: int | None = None
    in_dropped_section = in_doctest = in_fence = False
    for i, line in enumerate(lines):
        stripped = line.strip()
        indent = len(line) - len(line.lstrip())
        if stripped.startswith("```"):
            in_fence = not in_fence
            continue
        in_doctest = stripped.startswith(">>>") or (in_doctest and bool(stripped))
        if in_fence or in_doctest:
            continue
        if not stripped:
            yield ""
            continue
        if skip_deeper_than is not None and indent > skip_deeper_than:
            continue
        skip_deeper_than = None
        underlined = i + 1 < len(lines) and bool(_UNDERLINE.match(lines[i + 1].strip()))
        if title := _SECTION.match(stripped) if underlined or stripped.endswith(":") or stripped.startswith("#") else None:
            in_dropped_section = title[1].lower() in _DROPPED_SECTIONS
            yield ""
            if underlined and not in_dropped_section:
                yield f"{title[1]}:"
            if underlined or in_dropped_section:
                continue
        if in_dropped_section or _UNDERLINE.match(stripped):
            continue
        if _DIRECTIVE.match(stripped):
            if not _ADMONITION.match(stripped):
                skip_deeper_than = indent
                continue
            line = _ADMONITION.sub("", stripped)
        elif stripped.endswith("::"):
            skip_deeper_than = indent
        yield line


def _inline(block: str) -> str:
    """Join a paragraph into one line, without markup and repeated white space."""
    text = " ".join(block.split())
    if _TABLE.search(text):
        return ""
    for pattern in (_ROLE, _LINK, _MARKDOWN_LINK, _TICKS):
        text = pattern.sub(r"\1", text)
    text = re.sub(r"::$", ":", text).replace("**", "")
    text = re.sub(r"\\\s|\\(?=[*_`])", "", text)
    return text.strip() if re.search(r"[A-Za-z]{2}", text) else ""
