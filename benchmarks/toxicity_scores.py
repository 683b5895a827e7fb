"""Sentences with a score of how offensive they are, by a small classifier: pseudo-labels for `unified-lm experts correlate`.

The classifier is that of the wheel `hatesonar` (ONNX; trained on tweets, Davidson et al. 2017, arXiv:1703.04009); the score is
one less its probability of "neither". What it says of news or documentation is what it has learned about words in tweets: such
scores tell which experts go with words that it takes for offensive, not which experts are toxic.

Usage: python benchmarks/toxicity_scores.py corpora/domains/train/*.jsonl --out scored.jsonl
(needs hatesonar, onnxruntime and the locale en_US.UTF-8)
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import numpy as np

SHORTEST, LONGEST = 20, 300


def sentences(path: Path) -> list[str]:
    """The sentences of a file of rows, those of a usual length."""
    texts = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
    found = [part.strip() for text in texts for part in re.split(r"(?<=[.!?])\s+|\n+", text)]
    return [part for part in found if SHORTEST <= len(part) <= LONGEST]


def main() -> None:
    """Score and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--most", type=int, default=1000, help="sentences of a file (1000), evenly spread")
    options = parser.parse_args()
    from hatesonar import Sonar

    sonar = Sonar()
    rows = []
    for path in options.files:
        every = sentences(path)
        for text in every[:: max(1, len(every) // options.most)][: options.most]:
            classes = {each["class_name"]: float(each["confidence"]) for each in sonar.ping(text)["classes"]}
            rows.append({"text": text, "kind": path.stem, "score": 1 - classes["neither"]})
    options.out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    scores = np.array([row["score"] for row in rows])
    print(f"{len(rows):,} sentences, mean score {scores.mean():.3f}, {(scores > 0.5).sum():,} above a half")


if __name__ == "__main__":
    main()
