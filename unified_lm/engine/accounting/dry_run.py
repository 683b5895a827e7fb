"""`dry_run=true`: what a run, or an ablation, would do, printed, without loading weights or data."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from unified_lm.composition.convert import to_yaml
from unified_lm.config.schema import ArmConfig, ChainConfig, RunConfig, SweepConfig
from unified_lm.core import distributed
from unified_lm.engine.accounting.estimate import Estimate, estimate, packs_twice, recomputes_layers

_PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")
_H100_TERAFLOPS = 989.0
"""Dense bfloat16 peak of an H100 SXM (NVIDIA H100 data sheet)."""
_H100_SHARE = 0.4
"""The share of the peak that the table of an ablation assumes."""


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


def print_sweep(sweep: SweepConfig, console: Console, world_size: int | None = None) -> None:
    """Print the arms of an ablation with their steps, tokens, arithmetic and memory.

    Args:
        sweep: the ablation.
        console: where to print.
        world_size: ranks; None takes those of this process's group, or 1.

    Raises:
        ModelError: a model's configuration cannot be found.
    """
    ranks = distributed.world_size() if world_size is None else world_size
    for notice in dict.fromkeys(notice for arm in sweep.arms for notice in arm.run.notices):
        console.print(f"note: {notice}", highlight=False, soft_wrap=True)
    table = Table(title=f"{sweep.recipe}: {sweep.base} in {sweep.run_dir}", title_justify="left")
    table.add_column("arm", no_wrap=True)
    for name in ("seed", "steps", "tokens/step", "tokens", "FLOP", "H100 h", "GiB/GPU"):
        table.add_column(name, justify="right")
    total = 0.0
    for arm in sweep.arms:
        found = estimate(arm.run, ranks)
        total += training_teraflop(arm.run, found)
        table.add_row(*_arm_row(arm, found))
    console.print(table)
    for name, changes in {arm.name: arm.changes for arm in sweep.arms}.items():
        console.print(f"{name}: {' '.join(changes) or 'the base as it is'}", markup=False, highlight=False, soft_wrap=True)
    console.print(
        f"In all about {_short(total * 1e12)} FLOP: {max(_h100_hours(total), 0.01):,.2f} hours (or less) of one H100 at "
        f"{_H100_SHARE:.0%} of its {_H100_TERAFLOPS:,.0f} bfloat16 TFLOP/s. Tokens are upper bounds (samples at their limit), "
        "validation and loading are not counted.",
        style="dim",
        highlight=False,
    )


def _arm_row(arm: ArmConfig, found: Estimate) -> tuple[str, ...]:
    run, work = arm.run, training_teraflop(arm.run, found)
    numbers = (found.tokens_per_step, found.tokens_per_step * run.max_steps, work * 1e12)
    hours, memory = _h100_hours(work), f"{found.total_bytes / 2**30:,.1f}"
    return (
        arm.name,
        str(run.seed),
        str(run.max_steps),
        *map(_short, numbers),
        f"{hours:,.3g}" if hours >= 0.01 else "<0.01",
        memory,
    )


def _short(number: float) -> str:
    """Three digits and a unit prefix."""
    prefix = 0
    while number >= 999.5 and prefix < len(_PREFIXES) - 1:
        number, prefix = number / 1000, prefix + 1
    return f"{number:.3g}{_PREFIXES[prefix]}"


def training_teraflop(config: RunConfig, found: Estimate) -> float:
    """Arithmetic of a whole run's matrix products with weights, over all ranks, in TFLOP; attention scores are left out.

    2 operations per parameter and token for a forward; the backward takes 2 for the inputs' gradients and 2 for those of
    trained weights (PaLM, arXiv:2204.02311, appendix B). Checkpointed layers take another forward, and so do the samples of
    a contrastive stream that does not fit one pack (GradCache), and all samples where routers are balanced.
    """
    per_token = 4 * found.num_parameters + 2 * found.num_trainable
    if recomputes_layers(config.model):
        per_token += 2 * found.num_parameters
    work = per_token * found.tokens_per_step
    again = packs_twice(config, found.world_size) - (config.packing.num_retained or 1)
    if again > 0:
        work += 2 * found.num_parameters * again * config.packing.token_budget * found.world_size
    return work * found.optimizer_steps / 1e12


def _h100_hours(teraflop: float) -> float:
    return teraflop / (_H100_TERAFLOPS * _H100_SHARE) / 3600


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
        unit = config.streams[name].unit
        table.add_row(f"stream {name}", f"{batch:,} {unit}, at most {tokens:,} tokens a step")
    table.add_row("tokens per step", f"at most {found.tokens_per_step:,}")
    table.add_row("tokens in all", f"at most {found.tokens_per_step * found.optimizer_steps:,}")
    table.add_row(f"packs per step on each of {found.world_size} GPU(s)", f"about {found.packs_per_rank:,} or fewer")
    if (twice := packs_twice(config, found.world_size)) > 1:
        kept = min(twice, config.packing.num_retained or 1)
        table.add_row("of these, forwarded twice", f"{max(0, twice - kept):,} ({kept:,} more keep their graphs)")
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
