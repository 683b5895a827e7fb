"""Draws `images/modes.svg`: who sees whom in every mode, with the masks that the kernels compute.

Usage: python docs/draw_modes.py
"""

from __future__ import annotations

import re
from pathlib import Path

from unified_lm.batch.plan import consecutive_blocks, sequence_mask
from unified_lm.data.prompts.layouts import DOCUMENTS, LAYOUTS, QUESTION, Layout

FILE = Path(__file__).with_name("images") / "modes.svg"
CELL, LABEL, PANEL_WIDTH, PANEL_HEIGHT, COLUMNS = 14, 20, 204, 210, 4
PARTS = {QUESTION: [("q", 2)], DOCUMENTS: [("d1", 3), ("d2", 2)]}
"""What stands for a question and for two documents: label and tokens."""
STYLE = """<style>
  #modes { --ink: #1f2733; --soft: #5b6778; --grid: #dbe2ec; --cached: #9db7e8; --read: #2f6fde; --answer: #d9822b;
    display: block; width: 100%; height: auto;
    font-family: system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
  @media (prefers-color-scheme: dark) { #modes { --ink: #e8ecf2; --soft: #a3afc0; --grid: #3a4354; --cached: #4a6396;
    --read: #7fb0ff; --answer: #f0a35a; } }
  [data-md-color-scheme="default"] #modes { --ink: #1f2733; --soft: #5b6778; --grid: #dbe2ec; --cached: #9db7e8;
    --read: #2f6fde; --answer: #d9822b; }
  [data-md-color-scheme="slate"] #modes { --ink: #e8ecf2; --soft: #a3afc0; --grid: #3a4354; --cached: #4a6396;
    --read: #7fb0ff; --answer: #f0a35a; }
  #modes text { fill: var(--soft); font-size: 11px; text-anchor: middle; }
  #modes .name { fill: var(--ink); font-size: 13px; font-weight: 650; text-anchor: start; }
  #modes .word { text-anchor: start; font-size: 12px; }
  #modes .none { fill: none; stroke: var(--grid); }
  #modes .cached { fill: var(--cached); }
  #modes .read { fill: var(--read); }
  #modes .answer { fill: var(--answer); }
</style>"""


def draw() -> str:
    """The picture."""
    panels = [(name, layout, True) for name, layout in LAYOUTS.items()]
    panels.append(("document_cache, causal", LAYOUTS["document_cache"], False))
    rows = -(-len(panels) // COLUMNS)
    height = rows * PANEL_HEIGHT + 30
    lines = [
        f'<svg id="modes" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {COLUMNS * PANEL_WIDTH} {height}" role="img" '
        'aria-labelledby="modes-title modes-text">',
        '<title id="modes-title">Who sees whom in every mode</title>',
        '<desc id="modes-text">A grid for each mode: a row per token, its columns are the tokens that it sees. Blocks see only '
        "themselves; what follows them sees everything before it.</desc>",
        STYLE,
    ]
    for number, (name, layout, bidirectional) in enumerate(panels):
        row, column = divmod(number, COLUMNS)
        lines += [f'<g transform="translate({column * PANEL_WIDTH + 6} {row * PANEL_HEIGHT})">']
        lines += [f'<text class="name" x="0" y="16">{name}</text>', *_grid(layout, bidirectional), "</g>"]
    legend = [("cached", "computed when the text was embedded"), ("read", "read for the answer"), ("answer", "answer")]
    for number, (kind, words) in enumerate(legend):
        x, y = 6 + number * 280, height - 20
        lines += [f'<rect class="{kind}" x="{x}" y="{y}" width="12" height="12"/>']
        lines += [f'<text class="word" x="{x + 18}" y="{y + 11}">{words}</text>']
    return "\n".join([*lines, "</svg>"]) + "\n"


def _grid(layout: Layout, bidirectional: bool) -> list[str]:
    blocks = [item for part in layout.blocks for item in PARTS[part]]
    turn = [item for part in re.findall(r"\{(\w+)\}", layout.turn) for item in PARTS[part]]
    parts = [*blocks, *turn, ("u", 1), ("a", 2)]  # the turn's own words, and the answer
    length, cached = sum(size for _, size in parts), sum(size for _, size in blocks)
    borders = consecutive_blocks([size for _, size in blocks], "bidirectional" if bidirectional else "causal")
    seen = sequence_mask(length, (0, 0), blocks=borders)
    lines, start = [], 0
    for label, size in parts:
        middle = LABEL + (start + size / 2) * CELL
        lines += [f'<text x="{middle:g}" y="36">{label}</text>', f'<text x="{LABEL / 2:g}" y="{middle + 24:g}">{label}</text>']
        start += size
    for row in range(length):
        kind = "cached" if row < cached else "answer" if row >= length - 2 else "read"
        for column in range(length):
            shown = kind if bool(seen[row, column]) else "none"
            x, y = LABEL + column * CELL, 40 + row * CELL
            lines.append(f'<rect class="{shown}" x="{x}" y="{y}" width="{CELL - 2}" height="{CELL - 2}"/>')
    return lines


if __name__ == "__main__":
    FILE.write_text(draw(), encoding="utf-8")
