"""Time to the first token, and to 16 tokens, of every mode against the same prompt read as a whole, by length; keys and values
come from disk, warm and cold, search included.

Two sweeps: a document of N tokens with a short question, and a question of N tokens with a short document; and both long. The
index holds `--documents` of the long kind, so that each run reads another one. Ratios are within one run of this script.

"reader" is the time to the first token without the search, whose embedding of a long question no cache can save.

Usage: python benchmarks/answers_from_cache.py [--model MODEL] [--lengths 250 1000 4000] [--repeats 3] [--form bfloat16]
       [--sweeps "long document" ...] [--out numbers.json] [--plot plot.svg [--drawn-from numbers.json ...]]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from unified_lm.inference import UnifiedLM
from unified_lm.models.embedded import SMOLLM2_135M, embedded_directory
from unified_lm.retrieval.answering import Answer
from unified_lm.retrieval.documents import Document
from unified_lm.retrieval.index import Index

PLAIN = "document_then_query"
TOKENS = 16
SHORT = "Which word comes first in the text?"
SWEEPS = {
    "long document": ("document_cache", "document_query_cache"),
    "long question": ("query_cache", "query_document_cache"),
    "both long": ("document_query_cache", "query_document_cache"),
}


def words(model: UnifiedLM, tokens: int, seed: int) -> str:
    """A text of so many tokens: random common tokens, decoded, which may be read as more of them, and cut."""
    rng = np.random.default_rng(seed)
    tokenizer = model.prompt_encoder.tokenizer
    text = str(tokenizer.decode(rng.integers(500, 20_000, size=tokens))).strip()
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return text[: offsets[:tokens][-1][1]].strip()


def drop_from_memory(folder: Path) -> None:
    """Have the system forget the pages of all files of a folder, so that they are read from disk."""
    for path in folder.rglob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def measure(index: Index, questions: list[str], mode: str, states: str, *, cold: bool = False) -> list[Answer]:
    """An answer of 16 tokens to each question."""
    answers = []
    for question in questions:
        if cold:
            drop_from_memory(index.folder / "key_values")
        options = {"instruction": "", "max_new_tokens": TOKENS, "min_new_tokens": TOKENS}
        answers.append(index.answer(question, mode=mode, states=states, **options))
    return answers


def seconds(answers: list[Answer]) -> tuple[float, float, float]:
    """Median time to the first token, of the whole call, and to the first token without the search."""
    return (
        statistics.median(a.first_token_seconds for a in answers),
        statistics.median(a.seconds for a in answers),
        statistics.median(a.first_token_seconds - a.search_seconds for a in answers),
    )


def sweep(model: UnifiedLM, name: str, length: int, options: argparse.Namespace, folder: Path, table: Table) -> list[dict]:
    """All modes of a sweep at one length."""
    long_document, long_question = name != "long question", name != "long document"
    size = length if long_document else 60
    states = model.attention
    with Index.create(folder, model, form=options.form, max_tokens=max(size, length) + 60) as index:
        index.add([Document(f"d{i}", words(model, size, 7 + i)) for i in range(options.repeats)])
        questions = [words(model, length, 100 + i) if long_question else f"{SHORT} {i}" for i in range(options.repeats)]
        measure(index, [f"{SHORT} 0"], SWEEPS[name][0], states)  # what happens once is not counted
        plain_first, plain_16, plain_reader = seconds(measure(index, questions, PLAIN, states))
        found = []
        for mode in SWEEPS[name]:
            for cold in (False, True):
                answers = measure(index, questions, mode, states, cold=cold)
                first, whole, reader = seconds(answers)
                row = {
                    "sweep": name,
                    "length": length,
                    "mode": mode,
                    "disk": "cold" if cold else "warm",
                    "prompt_tokens": answers[0].prompt_tokens,
                    "cached_tokens": answers[0].cached_tokens,
                    "plain_first": plain_first,
                    "first": first,
                    "first_ratio": plain_first / first,
                    "plain_reader": plain_reader,
                    "reader": reader,
                    "reader_ratio": plain_reader / reader,
                    "plain_16": plain_16,
                    "sixteen": whole,
                    "ratio_16": plain_16 / whole,
                    "bytes_per_token": index.num_bytes / (options.repeats * max(1, size)),
                }
                found.append(row)
                shown = ("plain_first", "first", "first_ratio", "reader_ratio", "plain_16", "sixteen", "ratio_16")
                cells = (f"{row[key]:.3f}" for key in shown)
                table.add_row(name, str(length), mode, row["disk"], *cells)
    return found


def plot(rows: list[dict], out: Path) -> None:
    """Time to the first token by length, a panel for each sweep, keys and values from a warm disk."""
    from matplotlib import pyplot

    names = [name for name in SWEEPS if any(row["sweep"] == name for row in rows)]
    figure, axes = pyplot.subplots(1, len(names), figsize=(4 * len(names), 3.4), squeeze=False, layout="constrained")
    for axis, name in zip(axes[0], names, strict=True):
        found = [row for row in rows if row["sweep"] == name and row["disk"] == "warm"]
        for mode in SWEEPS[name]:
            line = sorted((row["length"], row["first"], row["plain_first"]) for row in found if row["mode"] == mode)
            axis.plot([x for x, _, _ in line], [y for _, y, _ in line], marker="o", label=mode)
        axis.plot([x for x, _, _ in line], [y for _, _, y in line], marker="o", color="black", label=PLAIN)
        axis.set(title=name, xlabel="tokens", ylabel="seconds to the first token", xscale="log", yscale="log")
        axis.set_xticks([x for x, _, _ in line], [f"{x:,}" for x, _, _ in line])
        axis.xaxis.minorticks_off()
        axis.yaxis.set_major_formatter("{x:g}")
        axis.legend(fontsize=7)
    with pyplot.rc_context({"svg.fonttype": "none", "svg.hashsalt": "unified_lm"}):
        figure.savefig(out, dpi=150, metadata={"Date": None} if out.suffix == ".svg" else None)


def main() -> None:
    """Run all sweeps and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="an export; the embedded model if left out")
    parser.add_argument("--lengths", type=int, nargs="+", default=[250, 1000, 4000])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--form", default="bfloat16")
    parser.add_argument("--sweeps", nargs="+", choices=SWEEPS, default=list(SWEEPS), help="which sweeps")
    parser.add_argument("--out", type=Path, default=None, help="a JSON file for the numbers")
    parser.add_argument("--plot", type=Path, default=None, help="a picture of the time to the first token by length")
    parser.add_argument("--drawn-from", type=Path, nargs="+", default=None, help="draw earlier numbers, measure nothing")
    options = parser.parse_args()
    if options.drawn_from is not None:
        plot([row for path in options.drawn_from for row in json.loads(path.read_text())], options.plot)
        return
    folder = embedded_directory(SMOLLM2_135M) if options.model is None else Path(options.model)
    model = UnifiedLM.from_pretrained(folder, template=None if options.model else "grit", device="cpu")
    columns = (
        "sweep",
        "tokens",
        "mode",
        "disk",
        "plain, first s",
        "first s",
        "times",
        "reader, times",
        "plain, 16 s",
        "16 s",
        "times",
    )
    table = Table(*columns, title=f"answers from cached keys and values ({options.form})")
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in options.sweeps:
            for length in options.lengths:
                rows += sweep(model, name, length, options, Path(scratch) / f"{name.replace(' ', '-')}-{length}", table)
                Console(width=180).print(f"{name}, {length} tokens: done")
                if options.out is not None:
                    options.out.write_text(json.dumps(rows, indent=1))
    Console(width=180).print(table)
    if options.plot is not None:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
