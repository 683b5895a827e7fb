"""The picture of the modes is what their layouts and the masks say."""

from __future__ import annotations

from docs.draw_modes import FILE, draw
from tests.docs.pages import pages
from unified_lm.data.prompts.layouts import LAYOUTS


def test_the_picture_is_drawn_from_the_table() -> None:
    drawn = draw()
    assert drawn == FILE.read_text(encoding="utf-8"), "run: python docs/draw_modes.py"
    assert all(f">{name}</text>" in drawn for name in LAYOUTS)


def test_pictures_in_pages_are_blocks_of_html() -> None:
    """Markdown would take one that is not for a paragraph, and throw its tags away."""
    lines = [page.read_text(encoding="utf-8").split("\n") for page in pages()]
    before = [page[number - 1] for page in lines for number, line in enumerate(page) if line.startswith("--8<--")]
    assert len(before) == 2
    assert set(before) == {"<div>"}
