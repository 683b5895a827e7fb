"""One table of several `unified-lm analyze methods` results: every method, raw and standardized, mean over seeds.

A group is one model trained with several seeds; a cell shows the mean and, in brackets, the range over seeds, in percent. All
results must have been measured on the same data.

Usage: python benchmarks/moee_table.py "PromptEOL=seed1/methods.json,seed2/methods.json" "as trained=..."
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

SCORES = {"spearman": "STS", "ndcg@10": "retrieval", "ami": "AMI", "accuracy": "accuracy"}


def read_group(text: str) -> tuple[str, list[dict[str, Any]]]:
    """The name of a group, and the numbers of each of its arms."""
    name, separator, files = text.partition("=")
    if not separator:
        raise SystemExit(f"{text!r}: expected NAME=FILE[,FILE...]")
    results = [json.loads(Path(file).read_text()) for file in files.split(",")]
    for file, result in zip(files.split(","), results, strict=True):
        if len(result["arms"]) != 1:
            raise SystemExit(f"{file} has the models {', '.join(result['arms'])}; a file of a group has one, and is one seed.")
    return name, [{**arm, "measured_on": result["measured_on"]} for result in results for arm in result["arms"].values()]


def cell(arms: list[dict[str, Any]], way: str, score: str, method: str) -> str:
    """Mean and range of one score over the arms of a group; "" where it was not measured."""
    found = [arm["scores"][way].get(score, {}).get(method) for arm in arms]
    values = [100 * each["value"] for each in found if each is not None]
    if len(values) < len(arms):
        return ""
    spread = f" [{min(values):.1f}, {max(values):.1f}]" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def main() -> None:
    """Print the table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="+", help="NAME=FILE[,FILE...]")
    parser.add_argument("--scores", nargs="+", choices=SCORES, default=list(SCORES))
    options = parser.parse_args()
    groups = [read_group(text) for text in options.groups]
    if len({json.dumps(arm["measured_on"], sort_keys=True) for _, arms in groups for arm in arms}) > 1:
        raise SystemExit("these results were measured on different data; measure them with the same options.")
    print("| model | vectors | method | " + " | ".join(SCORES[score] for score in options.scores) + " |")
    print("| --- " * (3 + len(options.scores)) + "|")
    for name, arms in groups:
        for way, scores in arms[0]["scores"].items():
            for method in dict.fromkeys(method for score in options.scores for method in scores.get(score, {})):
                cells = [cell(arms, way, score, method) for score in options.scores]
                print(f"| {name} | {way} | `{method}` | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
