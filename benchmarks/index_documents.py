"""What keeping keys and values costs when documents are indexed, and whether a restart answers the same.

The built-in documentation, read by the embedded model in groups of `--group` documents: embedded alone, and added to an index
with keys and values, in turns, so that a slow minute of the machine meets both. Then the index is opened by a new process,
which answers the same questions.

Usage: python benchmarks/index_documents.py [--documents 5000] [--max-tokens 64] [--form int8] [--folder FOLDER]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from unified_lm.config.streams import SourceConfig
from unified_lm.data.rows.records import PairRecord, RecordKind
from unified_lm.data.sources import open_source
from unified_lm.inference import UnifiedLM
from unified_lm.models.embedded import SMOLLM2_135M, embedded_directory
from unified_lm.retrieval.documents import Document
from unified_lm.retrieval.index import Index

MODES = ("document_cache", "query_document_cache")


def load() -> UnifiedLM:
    """The embedded model."""
    return UnifiedLM.from_pretrained(embedded_directory(SMOLLM2_135M), template="grit", device="cpu", dtype="float32")


def rows(count: int) -> list[PairRecord]:
    """Pairs of the built-in documentation; their positives are the documents."""
    source = open_source(SourceConfig(builtin="pydocs", split="train", limit=count), RecordKind.PAIR, seed=0)
    return [row for row in source if isinstance(row, PairRecord)]


def answers(index: Index, questions: list[str]) -> list[dict[str, object]]:
    """What each question is answered in each mode."""
    found = []
    for question in questions:
        for mode in MODES:
            answer = index.answer(question, mode=mode, k=2, max_new_tokens=8)
            shown = {"text": answer.text, "cached": answer.cached_tokens}
            found.append(shown | {"passages": [(passage.document.id, passage.score) for passage in answer.passages]})
    return found


def timed(work: object) -> float:
    """Seconds of a call."""
    started = time.perf_counter()
    work()  # type: ignore[operator]
    return time.perf_counter() - started


def build(folder: Path, options: argparse.Namespace) -> None:
    """Index, compare times, and write the answers down."""
    model, pairs = load(), rows(options.documents)
    documents = [Document(f"{number}", row.positives[0].text) for number, row in enumerate(pairs)]
    alone = added = 0.0
    with Index.create(folder, model, form=options.form, max_tokens=options.max_tokens) as index:
        for number, first in enumerate(range(0, len(documents), options.group)):
            part = documents[first : first + options.group]
            texts = [document.text for document in part]
            for turn in (number % 2, 1 - number % 2):
                if turn:
                    added += timed(lambda part=part: index.add(part))
                else:
                    alone += timed(lambda texts=texts: model.encode(texts, max_tokens=options.max_tokens))
            done = first + len(part)
            print(f"{done} documents: alone {alone:.1f} s, indexed {added:.1f} s, ratio {added / alone:.3f}", flush=True)
        print(f"{len(index)} documents, {index.num_bytes / 1e6:.0f} MB of keys and values ({options.form})")
        said = answers(index, [row.query.text for row in pairs[:: max(1, len(pairs) // 10)]])
    (folder.parent / "answers.json").write_text(json.dumps(said))


def check(folder: Path, options: argparse.Namespace) -> None:
    """Open the index, and compare its answers with those written down."""
    before = json.loads((folder.parent / "answers.json").read_text())
    pairs = rows(options.documents)
    with Index.open(folder, load()) as index:
        again = json.loads(json.dumps(answers(index, [row.query.text for row in pairs[:: max(1, len(pairs) // 10)]])))
    print(
        f"after a restart {sum(one == other for one, other in zip(before, again, strict=True))} of {len(before)} are the same"
    )


def main() -> None:
    """Build, then check in a new process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=5000)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--group", type=int, default=250)
    parser.add_argument("--form", default="int8")
    parser.add_argument("--folder", type=Path, default=None, help="an empty folder to work in; a temporary one if left out")
    parser.add_argument("--check", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.check:
        check(options.folder / "index", options)
        return
    with tempfile.TemporaryDirectory() as scratch:
        options.folder = options.folder or Path(scratch)
        options.folder.mkdir(parents=True, exist_ok=True)
        build(options.folder / "index", options)
        subprocess.run([sys.executable, *sys.argv, "--check", "--folder", str(options.folder)], check=True)


if __name__ == "__main__":
    main()
