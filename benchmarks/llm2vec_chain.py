"""Effect of the LLM2Vec chain on sentence similarity: STS-B dev before, after MNTP, and after SimCSE on the embedded model.

Spearman correlation of cosine similarity and human scores, mean pooling, no prompt. The training text is a WikiText file,
without its tokenization (" @-@ ", spaces before punctuation), headings and unknown words. STS-B is not trained on; the recipe's
template and SimCSE's learning rate were chosen on pairs of its training split, with bidirectional attention. Both stages take
the attention of `--attention`; `--stages simcse` trains SimCSE alone. With `checkpoint.every=20 checkpoint.keep_last=99` every
checkpoint is measured too, which gives a learning curve.

Usage: python benchmarks/llm2vec_chain.py WIKITEXT.txt STS_DEV.csv RUN_DIR [--attention NAME] [--stages simcse] [key=value ...]
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from scipy.stats import spearmanr

from unified_lm import UnifiedLM
from unified_lm.assembly.checkpoints import load_trained
from unified_lm.checkpoint.state import PREFIX
from unified_lm.checkpoint.store import list_checkpoints
from unified_lm.cli.main import run_command
from unified_lm.cli.script import train
from unified_lm.config.schema import ModelConfig
from unified_lm.core.files import write_json
from unified_lm.models.loading import load_model

_UNDO = (
    (re.compile(r" @([-,.])@ "), r"\1"),
    (re.compile(r" ([,.;:!?%)\]])"), r"\1"),
    (re.compile(r"([(\[]) "), r"\1"),
    (re.compile(r'" ([^"]*?) "'), r'"\1"'),
    (re.compile(r" ('s|n't|'re|'ve|'ll|'d|'m)\b"), r"\1"),
)
_SENTENCE_END = re.compile(r"(?<=[.!?]) (?=[A-Z])")
_WORDS = range(6, 31)


def prepare(wikitext: Path, folder: Path) -> tuple[Path, Path]:
    """Write paragraphs and sentences, one a line; returns the two files."""
    paragraphs, sentences = [], []
    for line in wikitext.read_text(encoding="utf-8").splitlines():
        text = line.strip()
        if not text or text.startswith("="):
            continue
        for pattern, replacement in _UNDO:
            text = pattern.sub(replacement, text)
        sentences += [s for s in _SENTENCE_END.split(text) if "<unk>" not in s and len(s.split()) in _WORDS]
        paragraphs.append(" ".join(text.replace("<unk>", "").split()))
    folder.mkdir(parents=True, exist_ok=True)
    files = folder / "paragraphs.txt", folder / "sentences.txt"
    for file, texts in zip(files, (paragraphs, sentences), strict=True):
        file.write_text("\n".join(texts) + "\n", encoding="utf-8")
    print(f"{len(paragraphs)} paragraphs, {len(sentences)} sentences")
    return files


def similarity(model: UnifiedLM, rows: list[list[str]]) -> float:
    """Spearman correlation, times 100."""
    texts = [row[5] for row in rows] + [row[6] for row in rows]
    vectors = model.encode(texts, normalize=True, token_budget=4096)
    cosine = np.sum(vectors[: len(rows)] * vectors[len(rows) :], axis=1)
    return float(spearmanr(cosine, [float(row[4]) for row in rows]).statistic) * 100


def measure_curve(run_dir: Path, measure: Callable[[str, UnifiedLM], None]) -> None:
    """Measure the checkpoints of a run, oldest first, except the last, which has the weights of the export."""
    for checkpoint in list_checkpoints(run_dir / "checkpoints")[:-1]:
        step = int(checkpoint.name.removeprefix(PREFIX))
        trained = load_trained(run_dir, Console(quiet=True), step)
        (stream,) = trained.config.streams.values()
        model = UnifiedLM(
            trained.backbone.causal_lm,
            trained.loaded.tokenizer,
            template=stream.template,
            pooling="mean",
            attention=stream.attention,
        )
        measure(f"{run_dir.name}, step {step}", model)


def main(argv: Sequence[str]) -> None:
    """Run the chain and print the table."""
    parser = argparse.ArgumentParser(prog="llm2vec_chain.py", description="LLM2Vec's stages on the embedded model")
    parser.add_argument("wikitext", type=Path, metavar="WIKITEXT.txt")
    parser.add_argument("sts", type=Path, metavar="STS_DEV.csv")
    parser.add_argument("folder", type=Path, metavar="RUN_DIR")
    parser.add_argument("--attention", default="bidirectional", help="of both stages (bidirectional)")
    parser.add_argument("--stages", choices=["mntp,simcse", "mntp", "simcse"], default="mntp,simcse")
    options, overrides = parser.parse_known_args(argv)
    paragraphs, sentences = prepare(options.wikitext, options.folder / "text")
    with open(options.sts, encoding="utf-8", newline="") as handle:
        rows = [row for row in csv.reader(handle, delimiter="\t", quoting=csv.QUOTE_NONE) if len(row) >= 7]
    started = time.perf_counter()
    scores = {}

    def measure(name: str, model: UnifiedLM) -> None:
        """Score a model, and save all scores so far."""
        scores[name] = round(similarity(model, rows), 2)
        print(f"{name}: {scores[name]} after {(time.perf_counter() - started) / 60:.1f} minutes", flush=True)
        write_json(options.folder / "scores.json", scores)

    for attention in dict.fromkeys(("causal", options.attention)):
        loaded = load_model(ModelConfig(source="embedded", name="smollm2-135m", family="llama"))
        model = UnifiedLM(loaded.causal_lm, loaded.tokenizer, template="plain", pooling="mean", attention=attention)
        measure(f"{attention}, untrained", model)
    common = ["model=smollm2_135m", "data=files", f"data.text_path={paragraphs}", f"data.sentences_path={sentences}"]
    before: list[str] = []
    stages = options.stages.split(",")
    for number, stage in enumerate(stages, 1):
        run_dir = options.folder / f"{number}-{stage}"
        recipe = [f"recipe=llm2vec_{stage}", f"run_dir={run_dir}", f"streams.{stage}.attention={options.attention}"]
        train([*recipe, *before, *common, "logging.progress=false", *overrides])
        measure_curve(run_dir, measure)
        measure(", ".join(stages[:number]), UnifiedLM.from_pretrained(run_dir / "export"))
        before = [f"model.init_from={run_dir}"]


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))
