"""`make bench`: the ratios that this project claims, measured here and now, as one table in docs/benchmarks.md.

Every row is a command that anyone can repeat; it runs both sides in one process, in turn, on the same work, and prints
"N times as fast [least, most]". The table says on which machine and with which versions.

Usage: python benchmarks/table.py [--only NAME ...] [--out docs/benchmarks.md]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "transformers", "sentence-transformers", "peft")
RATIO = re.compile(r"(?P<ratio>\d+\.\d+) times (?:as fast|faster)[^\[(\n]*[\[(](?P<spread>[^\])]*)[\])]")


@dataclass(frozen=True)
class Claim:
    """One comparison.

    Attributes:
        what: the work, and who is compared.
        command: a file of this folder with its arguments.
        line: what the line with the ratio contains; of several the first counts.
    """

    what: str
    command: str
    line: str = ""


OPTIONS = "step_options.py --dtype bfloat16 --repetitions 2"
MNTP = "peers.py mntp --rows 20 --repetitions 2 --dtype bfloat16"
CLAIMS: Mapping[str, Claim] = {
    "step": Claim("GRIT step, packed, against padded batches through stock transformers, bfloat16", "packed_vs_padded.py 3"),
    "cached loss": Claim(
        "contrastive step, 24 pairs, against sentence-transformers' `CachedMultipleNegativesRankingLoss`, bfloat16",
        "peers.py step --rows 24 --repetitions 2 --dtype bfloat16",
        "unified_lm: ",
    ),
    "cached loss, all graphs": Claim(
        "the same, all graphs kept", "peers.py step --rows 24 --repetitions 2 --dtype bfloat16", "unified_lm, all graphs kept: "
    ),
    "encode": Claim(
        "encoding 100 texts against sentence-transformers' best batch size, bfloat16",
        "peers.py encode --rows 100 --repetitions 2 --dtype bfloat16",
        "unified_lm: ",
    ),
    "encode float32": Claim("the same in float32", "peers.py encode --rows 100 --repetitions 2", "unified_lm: "),
    "mntp": Claim(
        "MNTP step, all weights, against stock transformers with the logits of every position (LLM2Vec's class), bfloat16",
        MNTP,
        "unified_lm: ",
    ),
    "mntp lora": Claim("the same with LoRA, ours and peft's", f"{MNTP} --lora", "unified_lm: "),
    "graphs": Claim(
        "GradCache step in 8 packs, all graphs kept, against one, bfloat16",
        OPTIONS,
        "all graphs kept ",
    ),
    "compile": Claim("the same step, compiled blocks against plain ones", OPTIONS, "compiled  "),
    "products": Claim(
        "checkpoints that keep products, against those that keep inputs",
        OPTIONS,
        "products kept against checkpointed",
    ),
    "lora": Claim("LoRA step against full fine-tuning, bfloat16", "lora_step.py --repetitions 8", "LoRA (ours)"),
}


def machine() -> str:
    """Processor, cores and versions."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").is_file() else ""
    found = re.search(r"model name\s*:\s*(.*)", text)
    units = [name for name in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if re.search(rf"\b{name}\b", text)][:1]
    name = found[1].strip() if found else platform.processor()
    versions = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    return f"{name} ({', '.join(units)}), {os.cpu_count()} cores; Python {platform.python_version()}, {versions}"


def measure(commands: list[str]) -> dict[str, str]:
    """What each command prints; an error ends the whole."""
    printed = {}
    for command in commands:
        print(f"python benchmarks/{command}", flush=True)
        done = subprocess.run(
            [sys.executable, *f"benchmarks/{command}".split()], cwd=ROOT, capture_output=True, text=True, check=False
        )
        if done.returncode:
            sys.exit(f"{done.stdout}{done.stderr}\nbenchmarks/{command} ended with {done.returncode}")
        print(done.stdout, flush=True)
        printed[command] = done.stdout
    return printed


def ratio_of(claim: Claim, printed: str) -> tuple[float, float, float]:
    """Median, least and most of the first line that has the claim's words and a ratio.

    Raises:
        SystemExit: there is no such line.
    """
    for line in printed.splitlines():
        if claim.line in line and (found := RATIO.search(line)):
            spread = [float(value) for value in re.findall(r"\d+\.\d+", found["spread"])]
            return float(found["ratio"]), min(spread), max(spread)
    sys.exit(f"benchmarks/{claim.command} printed no ratio in a line with '{claim.line}':\n{printed}")


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(CLAIMS), choices=list(CLAIMS))
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks.md")
    options = parser.parse_args()
    claims = {name: CLAIMS[name] for name in options.only}
    started = time.strftime("%Y-%m-%d")
    printed = measure(list(dict.fromkeys(claim.command for claim in claims.values())))
    rows = []
    for claim in claims.values():
        ratio, least, most = ratio_of(claim, printed[claim.command])
        rows.append(f"| {claim.what} | **{ratio:.2f}** | {least:.2f} to {most:.2f} | `benchmarks/{claim.command}` |")
    intro = (
        "Ratios of speed on the same work, both sides in one process in turn: medians, and least and most of the repetitions."
    )
    options.out.write_text(
        "\n".join(
            [
                "# Benchmarks",
                "",
                f"{intro} Written by `make bench` on {started}; machine: {machine()}.",
                "",
                "| work | times as fast | repetitions | command |",
                "| --- | --- | --- | --- |",
                *rows,
                "",
            ]
        ),
        encoding="utf-8",
    )
    print(json.dumps({"written": str(options.out)}))


if __name__ == "__main__":
    main()
