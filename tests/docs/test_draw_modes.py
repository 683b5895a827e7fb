"""The picture of the modes is what their layouts and the masks say."""

from __future__ import annotations

from docs.draw_modes import FILE, draw
from unified_lm.data.prompts.layouts import LAYOUTS


def test_the_picture_is_drawn_from_the_table() -> None:
    drawn = draw()
    assert drawn == FILE.read_text(encoding="utf-8"), "run: python docs/draw_modes.py"
    assert all(f">{name}</text>" in drawn for name in LAYOUTS)
