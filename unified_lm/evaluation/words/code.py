"""A small tagged data set that needs no download: functions of Python's standard library, tagged from their syntax trees.

Words are code tokens. The tags are exact, since the parser provides them, and most of them depend on context:

- ``pos``: the role of a token, such as CALL (a name before its brackets), PARAM, KWARG, TARGET, ATTR, METHOD;
- ``chunk``: maximal dotted names as spans, typed by their use, which often shows only in later tokens: CALL, TARGET, REF; and
  parameters with their defaults: PARAM;
- ``ner``: what a name is bound to in its module: MODULE (with the dotted rest), CLASS, EXCEPTION, FUNCTION, CONSTANT. A local
  name that shadows one has no tag.

This does not replace CoNLL-2003: code is not prose, and a rule-based tagger would be perfect on the first two tasks.
"""

from __future__ import annotations

import ast
import builtins
import io
import keyword
import os
import sys
import sysconfig
import token
import tokenize
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path

from unified_lm.core.errors import DataError
from unified_lm.evaluation.words.data import TASKS, Sentence, WordData

MAX_WORDS, MIN_WORDS = 40, 12
"""Bounds on the words of a sentence, which is made of consecutive logical lines of one function."""
NUM_TRAIN, NUM_TEST = 500, 200
"""Default numbers of sentences in the two splits."""

_PER_MODULE = 4
_TEST_SHARE = 0.3
_MAX_STRING = 40
_MAX_BYTES = 60_000  # longer files take long to parse for the few sentences taken from each
_SKIPPED = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "site-packages", "dist-packages", "__pycache__", "encodings"}
_CONSTANTS = ("None", "True", "False")

Position = tuple[int, int]
"""Line (counted from 1) and column (counted from 0) of a token."""


@lru_cache(maxsize=1)
def code_words(num_train: int = NUM_TRAIN, num_test: int = NUM_TEST) -> WordData:
    """Build the data set, which is the same on every machine with the same version of Python.

    All sentences of a module are in one split, chosen by the hash of its name.

    Args:
        num_train, num_test: number of sentences per split.

    Raises:
        DataError: the sources of the standard library are not installed.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    wanted = {"train": num_train, "test": num_test}
    found: dict[str, list[Sentence]] = {"train": [], "test": []}
    seen: set[tuple[str, ...]] = set()
    for path in _modules(root):
        split = _split_of(path.relative_to(root).as_posix())
        if len(found[split]) >= wanted[split]:
            continue
        fresh = [sentence for sentence in module_sentences(path.read_bytes()) if sentence.words not in seen]
        chosen = [fresh[i * len(fresh) // _PER_MODULE] for i in range(_PER_MODULE)] if len(fresh) > _PER_MODULE else fresh
        seen.update(sentence.words for sentence in chosen)
        found[split] += chosen[: wanted[split] - len(found[split])]
    if any(len(found[split]) < count for split, count in wanted.items()):
        raise DataError(
            f"the built-in tagged set needs the sources of Python's standard library; {root} gave {len(found['train'])} and "
            f"{len(found['test'])} sentences of {num_train} and {num_test}. Use conll:PATH or hub:NAME."
        )
    version = ".".join(map(str, sys.version_info[:3]))
    about = f"functions of Python {version}'s standard library, held out by module"
    return WordData(f"code-{version}", tuple(found["train"]), tuple(found["test"]), TASKS, about)


def _digest(name: str) -> int:
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little")


def _split_of(name: str) -> str:
    return "test" if _digest(name) < _TEST_SHARE * 2**64 else "train"


def _modules(root: Path) -> list[Path]:
    """Yield module files in an order that mixes the parts of the library."""
    files: list[Path] = []
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if name not in _SKIPPED]  # may hold a hundred times more files
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    files = [path for path in files if path.stat().st_size <= _MAX_BYTES]
    # not the hash of the split, which would put one whole split first
    return sorted(files, key=lambda path: _digest("order:" + path.relative_to(root).as_posix()))


def module_sentences(source: bytes) -> list[Sentence]:
    """Tagged sentences of a module; none if it does not parse in this version of Python or is not plain ASCII.

    Args:
        source: the file's content.
    """
    if not source.isascii():  # the parser counts columns in bytes, the tokenizer in characters: they agree on ASCII only
        return []
    try:
        tree = ast.parse(source)
        tokens = list(tokenize.generate_tokens(io.StringIO(source.decode(), newline=None).readline))
    except (SyntaxError, ValueError, tokenize.TokenError):
        return []
    bindings = _module_bindings(tree)
    lines = [item.start[0] for item in tokens]
    sentences = []
    for function in _functions(tree):
        tags = _Tags(bindings, _local_names(function))
        tags.visit(function)
        own = tokens[bisect_left(lines, function.lineno) : bisect_right(lines, function.end_lineno or function.lineno)]
        sentences += list(_cut(_logical_lines(own), tags))
    return sentences


def _functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield the functions of the module and the methods of its classes."""
    for node in tree.body:
        members = node.body if isinstance(node, ast.ClassDef) else [node]
        yield from (member for member in members if isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef))


def _module_bindings(tree: ast.Module) -> dict[str, str]:
    """What names are bound to at module level, as far as the file shows it; later bindings win."""
    bindings = {name: _builtin_kind(getattr(builtins, name)) for name in dir(builtins) if not name.startswith("_")}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            bindings |= {alias.asname or alias.name.partition(".")[0]: "MODULE" for alias in node.names}
    for statement in tree.body:
        match statement:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                bindings[name] = "FUNCTION"
            case ast.ClassDef(name=name, bases=bases):
                errors = any(isinstance(base, ast.Name) and bindings.get(base.id) == "EXCEPTION" for base in bases)
                bindings[name] = "EXCEPTION" if errors else "CLASS"
            case ast.Assign(targets=[ast.Name(id=name)]):
                bindings[name] = "CONSTANT"
    return {name: kind for name, kind in bindings.items() if kind}


def _builtin_kind(value: object) -> str:
    if isinstance(value, type):
        return "EXCEPTION" if issubclass(value, BaseException) else "CLASS"
    return "FUNCTION" if callable(value) else ""


def _local_names(function: ast.AST) -> set[str]:
    """Names that a function, or a function nested in it, binds locally."""
    shared = {name for node in ast.walk(function) if isinstance(node, ast.Global) for name in node.names}
    names = {node.arg for node in ast.walk(function) if isinstance(node, ast.arg)}
    names |= {node.id for node in ast.walk(function) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    names |= {node.name for node in ast.walk(function) if isinstance(node, ast.ExceptHandler) and node.name}
    return names - shared


@dataclass
class _Tags(ast.NodeVisitor):
    """Collects roles of tokens and spans, both by the position of their first token.

    Attributes:
        bindings: what names are bound to in the module.
        local: names that the function rebinds.
        roles: position -> tag of "pos".
        spans: task -> first position -> (position after the last token, type).
    """

    bindings: Mapping[str, str]
    local: set[str]
    roles: dict[Position, str] = field(default_factory=dict)
    spans: dict[str, dict[Position, tuple[Position, str]]] = field(default_factory=lambda: {"chunk": {}, "ner": {}})

    def visit_Name(self, node: ast.Name) -> None:
        """A name alone."""
        self._dotted(node, "")

    def visit_Attribute(self, node: ast.Attribute) -> None:
        """A dotted name that is read."""
        self._dotted(node, "")

    def visit_Call(self, node: ast.Call) -> None:
        """The called name is CALL; the arguments are visited separately."""
        self._dotted(node.func, "CALL")
        for argument in (*node.args, *node.keywords):
            self.visit(argument)

    def visit_keyword(self, node: ast.keyword) -> None:
        """The name of a keyword argument is KWARG."""
        if node.arg is not None:
            self.roles[_start(node)] = "KWARG"
        self.visit(node.value)

    def visit_arguments(self, node: ast.arguments) -> None:
        """Parameters, with their defaults in one PARAM span."""
        positional = [*node.posonlyargs, *node.args]
        missing = [None] * (len(positional) - len(node.defaults))
        pairs = [
            *zip(positional, [*missing, *node.defaults], strict=True),
            *zip(node.kwonlyargs, node.kw_defaults, strict=True),
        ]
        pairs += [(extra, None) for extra in (node.vararg, node.kwarg) if extra is not None]
        for argument, default in pairs:
            self.roles[_start(argument)] = "PARAM"
            self.spans["chunk"][_start(argument)] = (_end(default or argument), "PARAM")
            # names in a default are inside the parameter's chunk, so they get roles and entities but no chunk of their own
            for part in (argument.annotation, default):
                if part is not None:
                    inner = _Tags(self.bindings, self.local)
                    inner.visit(part)
                    self.roles |= inner.roles
                    self.spans["ner"] |= inner.spans["ner"]

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        """A sign or `~` before its operand is UNARY; `not` keeps its keyword's role."""
        if not isinstance(node.op, ast.Not):
            self.roles[_start(node)] = "UNARY"
        self.visit(node.operand)

    def _dotted(self, node: ast.expr, use: str) -> None:
        """Tag a name or an attribute access, with everything before its dots."""
        context = getattr(node, "ctx", None)
        use = use or ("REF" if isinstance(context, ast.Load) else "TARGET")
        if isinstance(node, ast.Attribute):
            end_line, end_column = _end(node)
            attribute = {"CALL": "METHOD", "REF": "ATTR", "TARGET": "ATTR_TARGET"}[use]
            self.roles[end_line, end_column - len(node.attr)] = attribute
        elif isinstance(node, ast.Name):
            self.roles[_start(node)] = {"CALL": "CALL", "REF": "VAR", "TARGET": "TARGET"}[use]
        root: ast.expr = node
        while isinstance(root, ast.Attribute):
            root = root.value
            if isinstance(root, ast.Attribute):
                line, column = _end(root)
                self.roles[line, column - len(root.attr)] = "ATTR"
        if not isinstance(root, ast.Name):
            self.visit(root)
            return
        if root is not node:
            self.roles[_start(root)] = "VAR"
        self.spans["chunk"][_start(node)] = (_end(node), use)
        kind = "" if root.id in self.local else self.bindings.get(root.id, "")
        if kind:
            self.spans["ner"][_start(node)] = (_end(node if kind == "MODULE" else root), kind)


def _start(node: ast.expr | ast.arg | ast.keyword) -> Position:
    return node.lineno, node.col_offset


def _end(node: ast.expr | ast.arg) -> Position:
    line, column = node.end_lineno, node.end_col_offset
    assert isinstance(line, int), "the parser fills it in"
    assert isinstance(column, int), "the parser fills it in"
    return line, column


def _logical_lines(tokens: list[tokenize.TokenInfo]) -> Iterator[list[tokenize.TokenInfo]]:
    """Yield the tokens of each logical line, without comments and layout tokens."""
    line: list[tokenize.TokenInfo] = []
    for item in tokens:
        if item.type == token.NEWLINE:
            yield line
            line = []
        elif item.type not in (token.INDENT, token.DEDENT, tokenize.NL, tokenize.COMMENT):
            line.append(item)
    if line:
        yield line


def _cut(lines: Iterator[list[tokenize.TokenInfo]], tags: _Tags) -> Iterator[Sentence]:
    """Join lines into sentences; a line that fits in none (a docstring, a long string) ends the current sentence."""
    held: list[list[tokenize.TokenInfo]] = []
    for line in (*lines, []):
        fits = bool(line) and all(_is_plain(item) for item in line) and not (len(line) == 1 and line[0].type == token.STRING)
        if not fits or sum(map(len, held)) + len(line) > MAX_WORDS:
            if sum(map(len, held)) >= MIN_WORDS:
                yield _sentence(held, tags)
            held = []
        if fits and len(line) <= MAX_WORDS:
            held.append(line)


def _is_plain(item: tokenize.TokenInfo) -> bool:
    """Whether a token can be a word. F-strings cannot: they are one token or several, depending on the version of Python."""
    if item.type == token.STRING:
        is_format = "f" in item.string[: item.string.index(item.string[-1])].lower()
        return not is_format and len(item.string) <= _MAX_STRING and len(item.string.split()) == 1
    return item.type in (token.NAME, token.NUMBER, token.OP)


def _sentence(lines: list[list[tokenize.TokenInfo]], tags: _Tags) -> Sentence:
    items = [item for line in lines for item in line]
    breaks, length = [], 0
    for line in lines[:-1]:
        length += len(line)
        breaks.append(length)
    roles = [role for line in lines for role in _roles(line, tags)]
    spans = {task: _bio(items, tags.spans[task]) for task in tags.spans}
    return Sentence(tuple(item.string for item in items), {"pos": tuple(roles), **spans}, frozenset(breaks))


def _roles(line: list[tokenize.TokenInfo], tags: _Tags) -> Iterator[str]:
    depth = 0
    for index, item in enumerate(line):
        depth += (item.string in "([{") - (item.string in ")]}") if item.type == token.OP else 0
        role = _role(item, line[index - 1].string if index else "", depth, tags)
        yield "IMPORT" if role == "OTHER" and line[0].string in ("import", "from") else role


def _role(item: tokenize.TokenInfo, before: str, depth: int, tags: _Tags) -> str:
    if item.string in _CONSTANTS:
        return "CONST"
    if item.type == token.NAME and keyword.iskeyword(item.string):
        return "KEYWORD"
    if item.type in (token.NUMBER, token.STRING):
        return "NUM" if item.type == token.NUMBER else "STR"
    if (known := tags.roles.get(item.start)) is not None:
        return known
    if item.type == token.OP:
        if item.string == "=":
            return "BIND" if depth else "ASSIGN"
        return "PUNCT" if item.string in "()[]{},:." else "OP"
    if before in ("def", "class"):
        return "DEF"
    return "TARGET" if before == "as" else "OTHER"  # "as" here is that of `except`; OTHER: `global`, patterns


def _bio(items: list[tokenize.TokenInfo], spans: Mapping[Position, tuple[Position, str]]) -> tuple[str, ...]:
    """Convert spans to B-, I- and O tags; a span inside another is dropped."""
    result = []
    end: Position = (0, 0)
    kind = ""
    for item in items:
        if item.start < end:
            result.append(f"I-{kind}")
        elif item.start in spans:
            end, kind = spans[item.start]
            result.append(f"B-{kind}")
        else:
            result.append("O")
    return tuple(result)
