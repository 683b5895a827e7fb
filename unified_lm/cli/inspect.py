"""`unified-lm inspect recipe=X`: show the exact input of the model before training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from itertools import groupby
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from unified_lm.batch import IGNORE, AttentionMode, Batch, Pack, Sample
from unified_lm.batch.pack import padded_tokens
from unified_lm.batch.plan import mode_of
from unified_lm.cli.mask_picture import save_mask_picture
from unified_lm.config.schema import RunConfig
from unified_lm.core.outputs import check_file
from unified_lm.data.loader import StepLoader
from unified_lm.data.stream import Stream
from unified_lm.data.streams import build_streams

_MAX_SHOWN = 160
"""Maximum tokens of a sample to print."""


class Part(Enum):
    """The purpose of a token; the value is its style in the terminal."""

    PROMPT = "dim cyan"
    POOLED = "green"
    LEARNED = "bold yellow"
    HIDDEN = "bold white on red"
    KEPT = "bold magenta"


_LEGEND = {
    Part.PROMPT: "read only",
    Part.POOLED: "pooled into the embedding",
    Part.LEARNED: "learned (predicted from the token before it)",
    Part.HIDDEN: "hidden and predicted: what is read → what is expected",
    Part.KEPT: "visible, but predicted too (MNTP's 10 %)",
}


def inspect_run(config: RunConfig, console: Console, out_dir: Path) -> None:
    """Show samples, packing and a mask of a run without loading its weights.

    Args:
        config: the run.
        console: where to print.
        out_dir: folder for the picture.
    """
    from unified_lm.models.loading import load_tokenizer  # `run_inspect` itself needs no model code

    run_inspect(config, load_tokenizer(config.model), console, out_dir)


def run_inspect(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    console: Console,
    out_dir: Path,
    *,
    samples_per_stream: int = 2,
    num_batches: int = 4,
) -> Path:
    """Like `inspect_run`, with a given tokenizer.

    Args:
        config: the run.
        tokenizer: the tokenizer of its model.
        console: where to print.
        out_dir: folder of the picture.
        samples_per_stream: number of groups or samples to print per stream.
        num_batches: number of steps for the packing statistics.

    Returns:
        The picture's path.
    """
    path = out_dir / "attention_mask.png"
    check_file(path)
    streams = build_streams(config, tokenizer)
    console.print(stream_table(streams))
    console.print(Text("  ").join([Text(f" {part.name.lower()} ", style=part.value) + f" {_LEGEND[part]}" for part in Part]))
    for stream in streams.values():
        _print_samples(stream, tokenizer, console, samples_per_stream)
    loader = StepLoader(streams, token_budget=config.packing.token_budget)
    loader.reset()
    batches = [loader.next_batch() for _ in range(num_batches)]
    console.print(packing_table(batches, config.packing.token_budget))
    save_mask_picture(most_varied_pack(batches), path)
    console.print(f"attention mask of one pack: {path}", soft_wrap=True)
    return path


def stream_table(streams: Mapping[str, Stream]) -> Table:
    """One line per source: rows, truncated texts, rejections."""
    table = Table(title="streams")
    for column in ("stream", "format", "attention", "template", "source", "rows", "probability", "truncated", "rejected"):
        table.add_column(column, justify="right" if column in ("rows", "probability", "truncated") else "left", overflow="fold")
    for name, stream in streams.items():
        stats, config = stream.stats, stream.config
        rejected = "\n".join(f"{count} x {reason}" for reason, count in sorted(stats.rejected.items())) or "none"
        for index, source in enumerate(stats.rows):
            head = (name, config.format, config.attention, config.template) if index == 0 else ("", "", "", "")
            rows = stats.rows[source]
            count = "read along" if rows is None else f"{rows:,}"
            numbers = (count, f"{stream.probabilities[index]:.1%}", f"{stats.truncated[source]:,}")
            table.add_row(*head, source, *numbers, rejected if index == 0 else "")
    return table


def packing_table(batches: Sequence[Batch], token_budget: int) -> Table:
    """Fill of the packs, and the cost of padding every sample to the longest of its kind instead."""
    tokens = sum(batch.num_tokens for batch in batches)
    packs = sum(len(batch.packs) for batch in batches)
    padded = sum(padded_tokens([s for pack in batch.packs for s in pack.samples]) for batch in batches)
    lengths = [len(s) for batch in batches for pack in batch.packs for s in pack.samples]
    table = Table(title=f"packing over {len(batches)} steps", show_header=False)
    table.add_row("samples per step", f"{len(lengths) / len(batches):,.1f}")
    table.add_row(
        "tokens per sample", f"{np.mean(lengths):,.1f} mean, {np.median(lengths):,.0f} median, {max(lengths):,} longest"
    )
    table.add_row("tokens per step", f"{tokens / len(batches):,.0f}")
    table.add_row("packs per step", f"{packs / len(batches):,.1f} of at most {token_budget:,} tokens")
    table.add_row("fill", f"{tokens / (packs * token_budget):.1%} of the budget")
    table.add_row("waste", "0 tokens (packs carry no padding)")
    table.add_row("padded instead", f"{padded / len(batches):,.0f} tokens per step, {1 - tokens / padded:.1%} of them padding")
    table.add_row("truncated samples", f"{sum(batch.num_truncated for batch in batches):,} of {len(lengths):,}")
    return table


def most_varied_pack(batches: Sequence[Batch]) -> Pack:
    """The first pack with the most attention modes."""
    packs = [pack for batch in batches for pack in batch.packs]
    return max(packs, key=lambda pack: len({run.mode for run in pack.plan.runs}))


def _print_samples(stream: Stream, tokenizer: PreTrainedTokenizerBase, console: Console, count: int) -> None:
    console.rule(f"{stream.name}: {stream.config.format}, objective {stream.config.objective.name}")
    for sample in stream.draw(count):
        console.print(Text(describe(sample, pooled=stream.pooled), style="bold"))
        console.print(colored(sample, tokenizer))


def describe(sample: Sample, *, pooled: bool) -> str:
    """One line: role in its group, length, mask."""
    role = ("query", "positive")[sample.slot] if sample.slot < 2 else f"negative {sample.slot - 1}"
    mode = mode_of(len(sample), sample.bidirectional)
    mask = mode.value if mode is not AttentionMode.SPAN else f"bidirectional in {sample.bidirectional}, else causal"
    purpose = f"pooled {sample.pool}" if pooled else f"{sample.num_supervised} tokens learned"
    head = f"[group {sample.group}] {role}" if pooled else f"[sample {sample.group}]"
    return f"{head}: {len(sample)} tokens, {mask}, {purpose}" + (", truncated" if sample.truncated else "")


def parts(sample: Sample) -> list[Part]:
    """The purpose of each token of a sample."""
    found = [Part.PROMPT] * len(sample)
    if sample.pool is not None:
        found[sample.pool[0] : sample.pool[1]] = [Part.POOLED] * (sample.pool[1] - sample.pool[0])
    if sample.labels is None:
        return found
    masked = bool((sample.labels != IGNORE).any()) and bool((sample.labels != sample.input_ids)[sample.labels != IGNORE].any())
    for index in np.flatnonzero(sample.labels != IGNORE).tolist():
        if sample.labels[index] != sample.input_ids[index]:
            found[index] = Part.HIDDEN
        else:
            found[index] = Part.KEPT if masked else Part.LEARNED
    return found


def colored(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> Text:
    """The text of a sample, with every token in the style of its part; line breaks are shown as ↵."""
    text = Text()
    for part, piece in _pieces(sample, tokenizer):
        text.append(piece.replace("\n", "↵\n"), style=part.value)
    if len(sample) > _MAX_SHOWN:
        text.append(f" … {len(sample) - _MAX_SHOWN} more tokens", style="dim")
    return text


def _pieces(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[Part, str]]:
    """Yield runs of tokens of one part, decoded together so that multi-token characters stay whole; hidden tokens singly."""
    kinds = parts(sample)[:_MAX_SHOWN]
    for part, group in groupby(range(len(kinds)), key=kinds.__getitem__):
        indices = list(group)
        if part is Part.HIDDEN:
            assert sample.labels is not None
            for index in indices:
                read, expected = (str(tokenizer.decode([int(ids[index])])) for ids in (sample.input_ids, sample.labels))
                yield part, f"{read}→{expected.strip()}"
        else:
            yield part, str(tokenizer.decode(sample.input_ids[indices].tolist(), skip_special_tokens=False))
