"""Losses and exported weights of small runs, bit for bit as they were recorded: a refactoring leaves them alone.

The same arithmetic on another processor, or under another torch, rounds otherwise. There the losses must agree closely, and
hashes are not compared; `recorded/runs.json` says what machine it is of. A change that is meant to alter numbers records anew:

    OMP_NUM_THREADS=1 python -m tests.assembly.test_recorded_runs
"""

from __future__ import annotations

import json
import tempfile
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from tests.processes import Group

RECORDED = Path(__file__).parent / "recorded" / "runs.json"
QUIET = ("logging.progress=false", "max_steps=3", "streams.{}.sources=[{{path: {}}}]")
TEXT = (
    "a packed forward sees samples laid end to end while masks keep them apart and every token finds its place "
    "gradients add up over ranks until the step is whole and nothing depends on how the work was split"
)
WORDS = TEXT.split()

RUNS: dict[str, tuple[list[str], dict[str, str]]] = {
    "grit_smollm2": (["recipe=grit_smollm2"], {"embedding": "pairs", "generation": "chat"}),
    "grit_smollm2 in several packs, with adapters": (
        ["recipe=grit_smollm2", "lora=all_linear", "packing.token_budget=300", "model.dtype=bfloat16"],
        {"embedding": "pairs", "generation": "chat"},
    ),
    "llm2vec_mntp": (["recipe=llm2vec_mntp"], {"mntp": "text"}),
    "llm2vec_simcse": (["recipe=llm2vec_simcse"], {"simcse": "text"}),
    "llm2vec_supervised": (["recipe=llm2vec_supervised", "streams.embedding.num_hard_negatives=1"], {"embedding": "pairs"}),
    "kto_smollm2": (["recipe=kto_smollm2"], {"preference": "preference"}),
    "kto_smollm2 in full": (["recipe=kto_smollm2", "lora=none"], {"preference": "preference"}),
    "grit_mixtral8x7b": (
        ["recipe=grit_mixtral8x7b", "packing.token_budget=400"],
        {"embedding": "pairs", "generation": "chat"},
    ),
}
"""Per run its arguments, and for each stream what kind of rows it reads."""


def sentence(number: int, length: int) -> str:
    """Words that depend on the number alone."""
    return " ".join(WORDS[(number * 7 + i * i) % len(WORDS)] for i in range(length))


def write_rows(folder: Path) -> None:
    """The rows of every kind, the same on every machine."""
    rows = {
        "pairs": [
            {
                "query": ["Find what it says", sentence(i, 4 + i % 3)],
                "pos": [["", sentence(i + 1, 9 + i % 5)]],
                "neg": [["", sentence(i + 40, 8 + i % 4)], ["", sentence(i + 70, 7)]],
            }
            for i in range(24)
        ],
        "chat": [
            {
                "messages": [
                    {"role": "user", "content": sentence(i + 3, 5 + i % 4)},
                    {"role": "assistant", "content": sentence(i + 5, 8 + i % 7)},
                ]
            }
            for i in range(16)
        ],
        "preference": [
            {"prompt": sentence(i, 5), "completion": sentence(i + 9, 6 + i % 5), "label": i % 3 != 0} for i in range(24)
        ],
        "text": [{"text": sentence(i + 11, 12 + i % 9)} for i in range(40)],
    }
    for kind, found in rows.items():
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))


def arguments_of(name: str, folder: Path) -> list[str]:
    """The whole command line of a run in a folder that holds the rows."""
    own, kinds = RUNS[name]
    sources = [QUIET[2].format(stream, folder / f"{kind}.jsonl") for stream, kind in kinds.items()]
    budget = [] if any("token_budget" in argument for argument in own) else ["packing.token_budget=1024"]
    limits = [f"streams.{stream}.batch_size=4" for stream in kinds]
    drop = ["~validation.retrieval", "~validation.sources"]
    if "kto" in name or "mntp" in name:
        drop = drop[1:]
    if "simcse" in name or "supervised" in name:
        drop = drop[:1]
    return [*own[:1], "model=tiny_random", *own[1:], *budget, *limits, *QUIET[:2], *sources, *drop, f"run_dir={folder / 'run'}"]


def measured(run_dir: Path) -> dict[str, list[str] | str]:
    """The losses of the steps and their gradient norms as exact text, and a hash of the exported weights."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "gradient_norm" in line]
    digest = sha256()
    for path in sorted((run_dir / "export").rglob("*.safetensors")):
        digest.update(path.read_bytes())
    return {
        "losses": [float(line["loss"]).hex() for line in steps],
        "gradient_norms": [float(line["gradient_norm"]).hex() for line in steps],
        "weights": digest.hexdigest(),
    }


def run(name: str, folder: Path) -> dict[str, list[str] | str]:
    """Run one of `RUNS`, or the one of two processes, in processes of its own with one thread each."""
    write_rows(folder)
    two = name == "grit_smollm2 with ZeRO-2 and two processes"
    arguments = arguments_of("grit_smollm2" if two else name, folder) + (["parallel=zero2"] if two else [])
    group = Group(arguments, 2 if two else 1, folder / "log")
    assert set(group.wait()) == {0}, group.output()
    return measured(folder / "run")


def machine() -> dict[str, str]:
    """What exact bits depend on, as far as it is known."""
    packages = {name: version(name) for name in ("torch", "transformers", "peft", "deepspeed", "numpy")}
    return {"cpu_capability": torch.backends.cpu.get_cpu_capability(), "mkldnn": _cpu_flags(), **packages}


def _cpu_flags() -> str:
    try:
        flags = Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split()
    except OSError:
        return "unknown"
    return " ".join(sorted(flag for flag in flags if flag.startswith(("amx", "avx512_bf16", "avx512_fp16", "avx512_vnni"))))


NAMES = [*RUNS, "grit_smollm2 with ZeRO-2 and two processes"]


@pytest.mark.parametrize("name", NAMES)
def test_losses_and_weights_are_those_recorded(name, tmp_path):
    recorded = json.loads(RECORDED.read_text())
    expected, found = recorded["runs"][name], run(name, tmp_path)
    if recorded["machine"] == machine():
        assert found == expected
        return
    for key in ("losses", "gradient_norms"):
        assert [float.fromhex(text) for text in found[key]] == pytest.approx(
            [float.fromhex(text) for text in expected[key]], rel=2e-2 if "adapters" in name else 1e-3
        )


def record() -> None:
    """Write `RECORDED` anew."""
    runs = {}
    for name in NAMES:
        with tempfile.TemporaryDirectory() as folder:
            runs[name] = run(name, Path(folder))
        print(name, runs[name]["losses"])
    RECORDED.parent.mkdir(exist_ok=True)
    RECORDED.write_text(json.dumps({"machine": machine(), "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    record()
