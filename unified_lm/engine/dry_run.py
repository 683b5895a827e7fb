"""`dry_run=true`: what a run would do, printed, without loading weights or data."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from unified_lm.config.convert import to_yaml
from unified_lm.config.schema import ChainConfig, RunConfig
from unified_lm.core import distributed
from unified_lm.engine.estimate import Estimate, estimate


def print_dry_run(config: RunConfig | ChainConfig, console: Console, world_size: int | None = None) -> None:
    """Print the resolved configuration, the tokens of a step, the steps, and the memory per GPU by part.

    Args:
        config: a run, or a chain, whose stages are printed one after another.
        console: where to print.
        world_size: ranks; None takes those of this process's group, or 1.

    Raises:
        ModelError: the model's configuration cannot be found.
    """
    ranks = distributed.world_size() if world_size is None else world_size
    if isinstance(config, ChainConfig):
        for index, stage in enumerate(config.stages):
            console.rule(f"stage {index + 1} of {len(config.stages)}: {stage.recipe}")
            print_dry_run(stage, console, ranks)
        return
    console.print(to_yaml(config), markup=False, highlight=False)
    found = estimate(config, ranks)
    console.print(_work_table(config, found))
    console.print(_memory_table(found))
    console.print(
        "Parameters are counted; activations and logits are formulas for the largest pack. Leave some room: the allocator's "
        "waste and the kernels' workspace are not in the table.",
        style="dim",
    )


def _work_table(config: RunConfig, found: Estimate) -> Table:
    table = Table(title="work", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    share = found.num_trainable / found.num_parameters
    table.add_row("parameters", f"{found.num_parameters:,}")
    table.add_row("trained", f"{found.num_trainable:,} ({share:.2%})")
    table.add_row("optimizer steps", f"{found.optimizer_steps:,}")
    for name, tokens in found.tokens_by_stream.items():
        batch = config.streams[name].batch_size
        unit = "pairs" if config.streams[name].format == "pairs" else "samples"
        table.add_row(f"stream {name}", f"{batch:,} {unit}, at most {tokens:,} tokens a step")
    table.add_row("tokens per step", f"at most {found.tokens_per_step:,}")
    table.add_row("tokens in all", f"at most {found.tokens_per_step * found.optimizer_steps:,}")
    table.add_row(f"packs per step on each of {found.world_size} GPU(s)", f"about {found.packs_per_rank:,} or fewer")
    return table


def _memory_table(found: Estimate) -> Table:
    table = Table(title="memory per GPU (estimate)", title_justify="left")
    table.add_column("part")
    table.add_column("size", justify="right")
    table.add_column("share", justify="right")
    for part, size in found.bytes_by_part.items():
        table.add_row(part, _size(size), f"{size / found.total_bytes:.0%}")
    table.add_section()
    table.add_row("total", _size(found.total_bytes), "", style="bold")
    return table


def _size(size: int) -> str:
    gib = size / 2**30
    return f"{gib:,.2f} GiB" if gib >= 0.1 else f"{gib * 1024:.2f} MiB"
