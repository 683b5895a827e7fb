"""One table of several `unified-lm eval rag` results: every mode before and after training, over seeds.

A group of several files is one model trained with several seeds: its cell shows the mean and, in brackets, the range over the
seeds. A group of one file shows the 95 % interval over questions. All files must have asked the same number of questions.

Usage: python benchmarks/rag_table.py "ordinary GRIT=grit.json" "trained=seed1.json,seed2.json,seed3.json"
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

MEASURES = {"loss": "answer loss", "beside": "beside plain", "f1": "F1", "exact_match": "exact match"}
"""What a column shows; "beside" is the loss minus that of `document_then_query` in the same file, question by question."""


def read_group(text: str) -> tuple[str, list[dict[str, Any]]]:
    """The name of a group, and its results."""
    name, separator, files = text.partition("=")
    if not separator:
        raise SystemExit(f"{text!r}: expected NAME=FILE[,FILE...]")
    return name, [json.loads(Path(file).read_text()) for file in files.split(",")]


def cell(results: list[dict[str, Any]], mode: str, states: str, measure: str) -> str:
    """Mean and range over the results of a group, or value and interval of its only one; "" where it was not measured."""
    same = [each for result in results for each in result["modes"] if (each["mode"], each["states"]) == (mode, states)]
    found = [each[measure] for each in same if each.get(measure) is not None]
    if len(found) < len(results):
        return ""
    values = [each["value"] for each in found]
    low, high = (min(values), max(values)) if len(values) > 1 else (found[0]["low"], found[0]["high"])
    return f"{statistics.mean(values):.2f} [{low:.2f}, {high:.2f}]"


def main() -> None:
    """Print the table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="+", help="NAME=FILE[,FILE...]")
    parser.add_argument("--measures", nargs="+", choices=MEASURES, default=["loss", "beside", "f1"])
    options = parser.parse_args()
    groups = [read_group(text) for text in options.groups]
    if len(asked := {(result["questions"], result["k"]) for _, results in groups for result in results}) > 1:
        raise SystemExit(f"these results asked differently (questions, documents): {sorted(asked)}")
    rows = list(dict.fromkeys((each["mode"], each["states"]) for _, results in groups for r in results for each in r["modes"]))
    heads = [f"{name}: {MEASURES[measure]}" for measure in options.measures for name, _ in groups]
    print("| mode | states | " + " | ".join(heads) + " |")
    print("| --- " * (2 + len(heads)) + "|")
    for mode, states in rows:
        cells = [cell(results, mode, states, measure) for measure in options.measures for _, results in groups]
        print(f"| `{mode}` | {states} | " + " | ".join(cells) + " |")
    for name, results in groups:
        recalls = {key: statistics.mean(result["recall"][key] for result in results) for key in results[0]["recall"]}
        print(f"\n{name}: " + ", ".join(f"recall@{key} {value:.2f}" for key, value in recalls.items()))


if __name__ == "__main__":
    main()
