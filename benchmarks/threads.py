"""Encoding on a CPU by one process with all threads, or by one process a core with a thread each.

SmolLM2-135M and docstrings of up to 256 tokens, of which each process takes every n-th. Processes stay; each repetition both
ways encode the same texts, one after the other while the other's processes wait, and a ratio is that of one repetition.

Usage: python benchmarks/threads.py [--rows 200] [--dtype bfloat16] [--repetitions 5]
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
from multiprocessing.connection import Connection

import torch
from peers import MAX_TOKENS, TEMPLATE, pairs

from unified_lm import UnifiedLM
from unified_lm.config.schema import ModelConfig
from unified_lm.engine.accounting.throughput import describe_device
from unified_lm.models.loading import load_model


def work(threads: int, texts: list[str], dtype: str, end: Connection) -> None:
    """A process: encode its texts at each request."""
    torch.set_num_threads(threads)
    loaded = load_model(ModelConfig(source="embedded", name="smollm2-135m", family="llama", dtype=dtype))
    model = UnifiedLM(loaded.causal_lm, loaded.tokenizer, template=TEMPLATE)
    end.send("ready")
    while end.recv():
        model.encode(texts, max_tokens=MAX_TOKENS)
        end.send("done")


def main() -> None:
    """Time both ways in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    texts = [document for _, document in pairs(options.rows)]
    context = multiprocessing.get_context("spawn")
    ways: dict[str, list[Connection]] = {}
    for name, processes in (("one process", 1), ("a process a core", cores)):
        ways[name] = []
        for number in range(processes):
            mine, theirs = context.Pipe()
            share = (cores // processes, texts[number::processes], options.dtype, theirs)
            context.Process(target=work, args=share, daemon=True).start()
            ways[name].append(mine)
            mine.recv()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repetition in range(options.repetitions + 1):
        for name, ends in ways.items():
            started = time.perf_counter()
            for end in ends:
                end.send(True)
            for end in ends:
                end.recv()
            if repetition:
                seconds[name].append(time.perf_counter() - started)
    for end in (end for ends in ways.values() for end in ends):
        end.send(False)
    print(f"{describe_device()}, {cores} cores, {options.dtype}, {len(texts)} texts")
    for name, values in seconds.items():
        print(f"{name:20} median {statistics.median(values):6.2f} s of {[round(v, 2) for v in values]}")
    ratios = [one / many for one, many in zip(*seconds.values(), strict=True)]
    print(f"a process a core is {statistics.median(ratios):.2f} times as fast [{min(ratios):.2f}, {max(ratios):.2f}]")


if __name__ == "__main__":
    main()
