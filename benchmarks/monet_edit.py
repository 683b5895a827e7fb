"""Deleting the experts of each kind of text from a MONET model: what its own kind loses, and what the others do.

For every kind: experts that it uses at least `--ratio` times as much as any other (told from the training texts) are left out.
Held-out texts of all kinds are read with them, without them, without as many random ones, and without as many random ones that
are used as much. One table: nats a token, target and the mean of the others.

Usage: python benchmarks/monet_edit.py RUN --texts corpora/domains [--documents 12] [--out table.json]
(`corpora/domains/train/NAME.jsonl` and `test/NAME.jsonl` as `benchmarks/monet_corpora.py` writes them)
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from unified_lm.evaluation.experts.domains import RATIO, mask_without, owners
from unified_lm.evaluation.experts.edit import edit_effects
from unified_lm.evaluation.experts.statistics import routing_statistics
from unified_lm.evaluation.generation.perplexity import Domain, read_domain
from unified_lm.inference.unified import UnifiedLM


def read(folder: Path, documents: int) -> list[Domain]:
    """The kinds of a folder, some documents of each, evenly spread."""
    found = []
    for path in sorted(folder.glob("*.jsonl")):
        domain = read_domain(path.stem, path)
        every = max(1, len(domain.documents) // documents)
        found.append(Domain(domain.name, domain.documents[::every][:documents]))
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--documents", type=int, default=12, help="held-out texts of each kind")
    parser.add_argument("--read", type=int, default=60, help="training texts of each kind, for the statistics")
    parser.add_argument("--ratio", type=float, default=RATIO)
    parser.add_argument("--draws", type=int, default=1)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    model = UnifiedLM.from_pretrained(str(options.model), device="cpu", template="plain")
    training, held_out = read(options.texts / "train", options.read), read(options.texts / "test", options.documents)
    found = routing_statistics(model, training, context=options.context)
    names, owner = owners(found, options.ratio)
    print("| kind | experts | share | edit: target, others | ratio | random: target, others | as used: target, others |")
    print("| --- " * 7 + "|")
    rows = []
    for number, name in enumerate(names):
        mask = mask_without(found, owner, number, name)
        share = sum(mask.num_left_out) / mask.keep.size
        effects = edit_effects(
            model, held_out, mask, context=options.context, draws=options.draws, use=list(found.means.values())
        )
        ways = {}
        each = {}
        for way in ("edit", "random", "as_used"):
            change = {
                effect.name: statistics.mean([effect.after] if way == "edit" else getattr(effect, way)) - effect.before
                for effect in effects
            }
            others = [value for kind, value in change.items() if kind != name]
            ways[way], each[way] = {"target": change[name], "others": statistics.mean(others)}, change
        rows.append({"kind": name, "experts": mask.num_left_out, "share": share, **ways, "each": each})
        cells = [f"{changes['target']:+.3f}, {changes['others']:+.3f}" for changes in ways.values()]
        lost = ways["edit"]
        ratio = f"{lost['target'] / lost['others']:.1f}" if lost["others"] > 0 else "no loss elsewhere"
        print(f"| {name} | {sum(mask.num_left_out):,} | {100 * share:.1f} % | {cells[0]} | {ratio} | {cells[1]} | {cells[2]} |")
    if options.out:
        options.out.write_text(json.dumps({"ratio": options.ratio, "tokens": dict(found.tokens), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
