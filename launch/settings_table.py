"""The table of settings in docs/distributed.md: GRIT on nodes of 8 x A100-80GB, computed by the estimator, not run.

    python launch/settings_table.py            print it
    python launch/settings_table.py --write    put it into docs/distributed.md

For every model and number of nodes the first of `BACKENDS` that fits is taken, with the largest token budget that still does.
"""

from __future__ import annotations

import sys
from pathlib import Path

from unified_lm.composition.compose import compose
from unified_lm.config.schema import RunConfig
from unified_lm.engine.accounting.estimate import Estimate, estimate, pack_tokens

PAGE = Path(__file__).resolve().parents[1] / "docs" / "distributed.md"
BEGIN, END = "<!-- settings: launch/settings_table.py --write -->", "<!-- end of settings -->"
RECIPES = {"Mistral-7B": "grit_mistral7b", "Mixtral-8x7B": "grit_mixtral8x7b"}
NODES = (1, 2, 4, 8)
GPUS_PER_NODE = 8
BACKENDS = ("ddp", "zero1", "zero2", "zero3", "zero3_offload")
"""In the order of preference: from the least communication to the most."""
BUDGETS = (4096, 8192, 16384, 32768)
"""Tokens of a pack that are tried."""
USABLE_GIB = 0.9 * 79
"""What a job may plan with: 79 GiB are free on an A100-80GB, a tenth is left to the allocator and the kernels."""
PARTS = ("weights", "gradients", "optimizer", "activations")


def main(arguments: list[str]) -> None:
    """Print the table, or write it into the page."""
    text = table()
    if arguments == ["--write"]:
        PAGE.write_text(replace(PAGE.read_text(encoding="utf-8"), text), encoding="utf-8")
    else:
        print(text)


def replace(page: str, text: str) -> str:
    """The page with the table between its marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


def table() -> str:
    """The table as Markdown."""
    head = ["model", "nodes", "`parallel=`", "`token_budget`", "packs a step", *PARTS, "other", "**total**"]
    lines = [head, ["---"] * 3 + ["---:"] * (len(head) - 3)]
    for model, recipe in RECIPES.items():
        for nodes in NODES:
            lines.append([model, str(nodes), *row(recipe, nodes * GPUS_PER_NODE)])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def row(recipe: str, gpus: int) -> list[str]:
    """What is recommended for a recipe on a number of GPUs."""
    for backend in BACKENDS:
        fitting = [
            (budget, found) for budget, found in candidates(recipe, backend, gpus) if gib(found.total_bytes) <= USABLE_GIB
        ]
        if fitting:
            budget, found = fitting[-1]
            parts = [gib(found.bytes_by_part[part]) for part in PARTS]
            other = gib(found.total_bytes) - sum(parts)
            sizes = [f"{size:.1f}" for size in (*parts, other)]
            return [backend, f"{budget:,}", f"{found.packs_per_rank:,}", *sizes, f"**{gib(found.total_bytes):.1f}**"]
    return ["does not fit", *[""] * (len(PARTS) + 4)]


def candidates(recipe: str, backend: str, gpus: int) -> list[tuple[int, Estimate]]:
    """Estimates by token budget, smallest first; none larger than a rank's whole step."""
    found = []
    for budget in BUDGETS:
        config = compose([f"recipe={recipe}", f"parallel={backend}", f"packing.token_budget={budget}"])
        assert isinstance(config, RunConfig)
        found.append((budget, estimate(config, gpus)))
        if pack_tokens(config, gpus) < budget:
            break
    return found


def gib(size: int) -> float:
    """Bytes in GiB."""
    return size / 2**30


if __name__ == "__main__":
    main(sys.argv[1:])
