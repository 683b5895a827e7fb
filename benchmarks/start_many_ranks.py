"""What eight ranks of one machine spend on data at a start, and on waiting for batches: together, or each for itself.

Writes rows of pairs into files, lets one process parse and tokenize them, and then times eight processes that open the stream
at once, as ranks of a run do: each reading everything (as it was before `core.reading_once`), and sharing. Then one of them
draws batches for steps of a given length, with and without drawing ahead. At last eight shares of an optimizer state are read,
and eight wholes.

Usage: python benchmarks/start_many_ranks.py [--rows 1000000] [--files 8] [--ranks 8] [--step-seconds 0.5] [--parameters 2e8]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from unified_lm.checkpoint.tensor_shards import ShardReader, ShardWriter
from unified_lm.composition.compose import compose_run
from unified_lm.config.schema import RunConfig
from unified_lm.core import distributed, reading_once
from unified_lm.data.loader import StepLoader
from unified_lm.data.prefetch import PrefetchingLoader
from unified_lm.data.streams import build_streams
from unified_lm.models.tiny import tiny_tokenizer

WORDS = ("the", "of", "and", "to", "in", "that", "for", "it", "as", "was", "with", "be", "by", "on", "not", "he", "his", "but")


def write_rows(folder: Path, rows: int, files: int) -> None:
    """Pairs with texts of 4 to 16 words, in equal files."""
    random = torch.Generator().manual_seed(0)
    for index in range(files):
        with open(folder / f"{index}.jsonl", "w", encoding="utf-8") as file:
            for row in range(rows // files):
                picks = torch.randint(len(WORDS), (20,), generator=random).tolist()
                words = [WORDS[pick] for pick in picks]
                pair = {"query": f"{index} {row} " + " ".join(words[:4]), "pos": [" ".join(words[4 : 8 + row % 12])]}
                file.write(json.dumps(pair) + "\n")


def settings(folder: Path) -> RunConfig:
    """A recipe over the folder."""
    return compose_run(
        [
            "recipe=embedding_only",
            "model=tiny_random",
            f"streams.embedding.sources=[{{path: {folder}}}]",
            "streams.embedding.batch_size=256",
            "streams.embedding.num_hard_negatives=0",
            "~validation.sources",
            "~validation.retrieval",
        ]
    )


def open_stream(folder: Path, name: str | None, rank: int, ranks: int, queue: Any, gate: Any) -> None:
    """What a rank does at the start `name`; None: alone, as every rank was before."""
    config, tokenizer = settings(folder), tiny_tokenizer()
    if name is not None:
        # ranks without a process group: only the name of the start, and who is who, matter here
        reading_once._start = name
        distributed.rank, distributed.world_size = (lambda: rank), (lambda: ranks)
    gate.wait()
    started = time.perf_counter()
    build_streams(config, tokenizer)
    queue.put((time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_utime))


def start(folder: Path, ranks: int, name: str | None) -> tuple[float, float]:
    """Seconds until the last rank has its stream, and CPU seconds of all ranks, imports included."""
    context = multiprocessing.get_context("fork")
    queue, gate = context.Queue(), context.Barrier(ranks)
    processes = [context.Process(target=open_stream, args=(folder, name, rank, ranks, queue, gate)) for rank in range(ranks)]
    for process in processes:
        process.start()
    found = [queue.get() for _ in processes]
    for process in processes:
        process.join()
    return max(seconds for seconds, _ in found), sum(cpu for _, cpu in found)


def waiting(loader: StepLoader | PrefetchingLoader, steps: int, seconds: float) -> float:
    """Mean seconds that a step waits for its batch, the first one left out."""
    waits = []
    for _ in range(steps):
        started = time.perf_counter()
        loader.next_batch()
        waits.append(time.perf_counter() - started)
        time.sleep(seconds)  # a device computes
    return sum(waits[1:]) / (steps - 1)


def read_state(folder: Path, parameters: int, ranks: int) -> tuple[float, float]:
    """Seconds to read an optimizer state once per rank in whole, and in shares."""
    rows = parameters // 4096
    writer = ShardWriter(folder / "state.safetensors")
    for name in ("weight", "exp_avg", "exp_avg_sq"):
        writer.add(name, torch.zeros(rows, 4096))
    writer.close()
    names = ("weight", "exp_avg", "exp_avg_sq")
    part = -(-rows * 4096 // ranks)

    def timed(read: Callable[[ShardReader, str, int], torch.Tensor]) -> float:
        started = time.perf_counter()
        for rank in range(ranks):
            with ShardReader(folder, {"state.safetensors": names}) as reader:
                for name in names:
                    read(reader, name, rank).to(torch.float32, copy=True)
        return time.perf_counter() - started

    whole = timed(lambda reader, name, _: reader(name))
    return whole, timed(lambda reader, name, rank: reader.part(name, rank * part, min((rank + 1) * part, rows * 4096)))


def main() -> None:
    """Print seconds and ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--files", type=int, default=8)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--step-seconds", type=float, default=0.5)
    parser.add_argument("--parameters", type=float, default=2e8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        os.environ["UNIFIED_LM_CACHE"] = f"{place}/cache"
        folder = Path(place) / "rows"
        folder.mkdir()
        write_rows(folder, options.rows, options.files)
        started = time.perf_counter()
        streams = build_streams(settings(folder), tiny_tokenizer())
        print(f"first start, one process parses and tokenizes: {time.perf_counter() - started:.1f} s")
        (each, cpu_each), (shared, cpu_shared) = start(folder, options.ranks, None), start(folder, options.ranks, "shared")
        print(f"start of {options.ranks} ranks: {each:.2f} s each for itself, {shared:.2f} s shared: {each / shared:.1f}x")
        print(f"CPU of all ranks: {cpu_each:.1f} s, {cpu_shared:.1f} s: {cpu_each / cpu_shared:.1f}x")
        loader = StepLoader(streams, token_budget=8192, rank=0, world_size=options.ranks)
        plain = waiting(loader, 8, options.step_seconds)
        loader.reset()
        ahead = waiting(PrefetchingLoader(loader, 8), 8, options.step_seconds)
        print(f"wait for a batch: {plain * 1000:.1f} ms, drawn ahead {ahead * 1000:.1f} ms: {plain / ahead:.0f}x")
        whole, shares = read_state(Path(place), int(options.parameters), options.ranks)
        print(
            f"optimizer state for {options.ranks} ranks: {whole:.2f} s whole, {shares:.2f} s in shares: {whole / shares:.1f}x"
        )


if __name__ == "__main__":
    main()
