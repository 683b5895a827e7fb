"""Every page is in the navigation once, every entry has its page, and every link of the pages leads somewhere."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from docs import generate_reference
from tests.docs.pages import DOCS, ROOT, pages

GROUPS = ["Start", "Train", "Use", "Measure", "Extend"]


def navigation() -> list[dict[str, Any]]:
    return yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]


def entries(part: Any) -> list[str]:
    """The pages below a part of the navigation."""
    if isinstance(part, str):
        return [part]
    values = part.values() if isinstance(part, dict) else part
    return [entry for value in values for entry in entries(value)]


def generated() -> list[str]:
    return [f"{generate_reference.FOLDER}/{page.name}.md" for page in generate_reference.pages()]


def test_groups() -> None:
    assert [name for group in navigation() for name in group] == GROUPS


def test_no_page_is_an_orphan() -> None:
    listed = entries(navigation())
    assert len(listed) == len(set(listed))
    assert set(listed) == {page.relative_to(DOCS).as_posix() for page in pages()} | set(generated())


def test_the_log_lists_every_entry_of_its_pages() -> None:
    index = (DOCS / "log.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| (\d{4}-\d\d-\d\d) \| \[(.*)\]\((log/\w+\.md)#", index, re.MULTILINE)
    written = [
        (*title.split(": ", 1), page.relative_to(DOCS).as_posix())
        for page in sorted((DOCS / "log").glob("*.md"))
        for title in re.findall(r"^## (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert sorted(listed) == sorted(written)
    dates = [date for date, *_ in listed]
    assert dates == sorted(dates, reverse=True)


@pytest.mark.parametrize("page", [*pages(), ROOT / "README.md"], ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:|mailto:|#)([^)#\s]+)", page.read_text(encoding="utf-8")):
        path = (page.parent / target).resolve()
        assert path.exists() or (path.is_relative_to(DOCS) and path.relative_to(DOCS).as_posix() in generated()), target


@pytest.mark.parametrize("suffix", ["py", "yaml", "toml", "sh"])
def test_pages_that_the_code_names_exist(suffix: str) -> None:
    """Messages and comments send readers to docs/*.md."""
    for top in ("unified_lm", "recipes", "configs", "launch", "benchmarks"):
        for path in (ROOT / top).rglob(f"*.{suffix}"):
            for name in re.findall(r"\bdocs/[\w/-]+\.md", path.read_text(encoding="utf-8")):
                assert (ROOT / name).is_file(), f"{path.relative_to(ROOT)} names {name}"
