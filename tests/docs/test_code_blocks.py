"""Python code in the documentation runs, and prints what the page says.

The blocks of a page run in order, in one namespace, in an empty directory. A comment on the line before a block says otherwise:
`<!-- not run: REASON -->` for code that needs what a test has not (then it is compiled, and its imports are checked).
`<!-- output -->` before a text block: it is exactly what the block before it prints.
"""

import ast
import importlib
import importlib.util
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from tests.docs.pages import Block, blocks, pages

NOT_RUN = "not run: "
NOISE = "real_accelerator.py"
"""DeepSpeed prints which device it found, on its first import in a process."""


def python_pages() -> list[Any]:
    """Pages with code. That of `python-api.md` trains five runs; `test_python_api.py` is its fast test."""
    found = [page for page in pages() if any(block.language == "python" for block in blocks(page))]
    return [pytest.param(page, marks=[pytest.mark.slow] if page.stem == "python-api" else []) for page in found]


def run_page(page_blocks: list[Block]) -> None:
    """Run the Python blocks of a page and compare their output with the blocks that show it."""
    namespace: dict[str, object] = {"__name__": "__main__"}
    printed = ""
    for block in page_blocks:
        if block.directive == "output":
            assert printed == block.code, f"{block.place}: the block before it prints\n{printed}"
        elif block.language == "python" and block.directive.startswith(NOT_RUN):
            check_imports(block)
        elif block.language == "python":
            out = StringIO()
            with redirect_stdout(out):
                exec(compile("\n" * (block.line - 1) + block.code, block.page, "exec"), namespace)
            printed = "".join(line for line in out.getvalue().splitlines(keepends=True) if NOISE not in line)


def check_imports(block: Block) -> None:
    """Compile a block, and import what it imports of this project and of installed packages."""
    assert block.directive.removeprefix(NOT_RUN).strip(), f"{block.place}: say why it is not run"
    for node in ast.walk(ast.parse(block.code)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module or "")
            missing = [a.name for a in node.names if not hasattr(module, a.name) and not _is_module(f"{node.module}.{a.name}")]
            assert not missing, f"{block.place}: {node.module} has no {', '.join(missing)}"


def _is_module(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


@pytest.mark.parametrize("page", python_pages(), ids=lambda page: page.stem)
def test_python_blocks(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_page(blocks(page))


def test_every_comment_before_a_block_is_understood() -> None:
    known = ("output", "test: fails")
    for page in pages():
        for block in blocks(page):
            ours = not block.directive or block.directive in known or block.directive.startswith(NOT_RUN)
            assert ours, f"{block.place}: unknown comment '{block.directive}'"


def test_wrong_code_is_found(tmp_path: Path) -> None:
    page = Path(__file__)

    def block(language: str, code: str, directive: str = "") -> Block:
        return Block(page, 1, language, directive, code)

    run_page([block("python", "x = 1\n"), block("python", "print(x)\n"), block("text", "1\n", "output")])
    with pytest.raises(NameError):
        run_page([block("python", "undefined\n")])
    with pytest.raises(AssertionError, match="prints"):
        run_page([block("python", "print(1)\n"), block("text", "2\n", "output")])
    with pytest.raises(AssertionError, match="has no Batches"):
        run_page([block("python", "from unified_lm.batch import Batches\n", "not run: it needs a GPU")])
    with pytest.raises(AssertionError, match="say why"):
        run_page([block("python", "", "not run: ")])
