"""The table of settings in the documentation is what the estimator computes."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def settings_table():
    spec = importlib.util.spec_from_file_location("settings_table", ROOT / "launch" / "settings_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_row_of_the_page_is_what_is_computed(settings_table):
    cells = ["Mistral-7B", "2", *settings_table.row("grit_mistral7b", 16)]
    assert "| " + " | ".join(cells) + " |" in settings_table.PAGE.read_text(encoding="utf-8").splitlines(), (
        "run `python launch/settings_table.py --write`"
    )


@pytest.mark.slow
def test_the_page_holds_the_table(settings_table):
    page = settings_table.PAGE.read_text(encoding="utf-8")
    assert settings_table.replace(page, settings_table.table()) == page, "run `python launch/settings_table.py --write`"


def test_the_table_is_put_between_its_marks(settings_table):
    page = f"before\n{settings_table.BEGIN}\nold\n{settings_table.END}\nafter\n"
    once = settings_table.replace(page, "| new |")
    assert once.startswith("before\n")
    assert once.endswith("\nafter\n")
    assert "old" not in once
    assert settings_table.replace(once, "| new |") == once
