"""The shape of the source tree: every test is collected, and rooms, files and functions stay small enough to read."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "unified_lm"
SOURCES = sorted(PACKAGE.rglob("*.py"))

SMALL_WITH_A_REASON = {
    "core/allocator.py": "settles one thing about the process, which belongs to no layer above",
}
"""Modules under 40 lines with one caller, and why they are apart. Commands always are: `cli/main.py` has their table."""


def imports_of(path: Path) -> set[Path]:
    """The modules of the package that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "unified_lm":
            for alias in node.names:
                found |= {_file(f"{node.module}.{alias.name}") or _file(str(node.module))}
    return {path for path in found if path is not None}


def _file(module: str) -> Path | None:
    path = ROOT.joinpath(*module.split("."))
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()), None)


def test_every_test_file_is_collected(pytestconfig: pytest.Config) -> None:
    """pytest skips folders by name (build, dist, ...): a test there would never run."""
    skipped = pytestconfig.getini("norecursedirs")
    for path in (ROOT / "tests").rglob("test_*.py"):
        folders = path.relative_to(ROOT).parts[:-1]
        assert not any(Path(folder).match(pattern) for folder in folders for pattern in skipped), path
        assert all((ROOT.joinpath(*folders[: depth + 1]) / "__init__.py").is_file() for depth in range(len(folders))), (
            f"{path}: a folder without __init__.py, where equal file names shadow each other"
        )


def test_tests_mirror_the_rooms() -> None:
    others = {"benchmarks", "docs", "extending", "gpu", "launch", "parity", "properties"}  # not of one room
    rooms = {path.parent.relative_to(PACKAGE) for path in SOURCES}
    for path in (ROOT / "tests").rglob("test_*.py"):
        folder = path.parent.relative_to(ROOT / "tests")
        if folder.parts and folder.parts[0] not in others:
            assert folder in rooms, f"{path}: there is no room unified_lm/{folder}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            size = (node.end_lineno or 0) - node.lineno + 1 - (docstring.count("\n") + 1 if docstring else 0)
            assert size <= 60, f"{node.name}: {size} lines"


def test_no_module_is_apart_without_a_reason() -> None:
    callers: dict[Path, set[Path]] = defaultdict(set)
    for path in SOURCES:
        for used in imports_of(path) - {path}:
            callers[used].add(path)
    small = {
        str(path.relative_to(PACKAGE))
        for path in SOURCES
        if path.name not in ("__init__.py", "__main__.py") and path.parent.name != "cli"
        if path.read_text(encoding="utf-8").count("\n") < 40 and len(callers[path]) <= 1
    }
    assert small == set(SMALL_WITH_A_REASON)


def test_no_two_modules_import_each_other() -> None:
    imports = {path: imports_of(path) for path in SOURCES}
    mutual = {(str(a), str(b)) for a, used in imports.items() for b in used if a != b and a in imports.get(b, ()) and a < b}
    assert not mutual
