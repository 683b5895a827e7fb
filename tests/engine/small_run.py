"""A run that takes milliseconds a step, for tests that start it many times."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open

TIMING = ("seconds", "per_second", "_share", "mfu", "hfu", "memory", "compute")


def small_run(data: Path, run_dir: Path, *more: str) -> list[str]:
    """Arguments of a GRIT run on a tiny random model with attention dropout; the data is written when it is missing."""
    if not (data / "pairs.jsonl").exists():
        pairs = [{"query": f"what is {i}?", "pos": [f"{i} is {i * i % 97} and {'more ' * (i % 5)}"]} for i in range(60)]
        chats = [
            {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"{i} " * (1 + i % 6)}]}
            for i in range(50)
        ]
        (data / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
        (data / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    return [
        "recipe=grit_smollm2",
        "model=tiny_random",
        "model.attention_dropout=0.1",
        f"streams.embedding.sources=[{{path: {data}/pairs.jsonl}}]",
        f"streams.generation.sources=[{{path: {data}/chats.jsonl}}]",
        "~validation.sources",
        "~validation.retrieval",
        "export.enabled=false",
        "logging.progress=false",
        f"run_dir={run_dir}",
        *more,
    ]


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint: weights and moments, whatever file they are in."""
    found = {}
    for path in sorted(checkpoint.glob("optimizer-*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
    return found


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Whether two checkpoints agree bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def metrics(run_dir: Path) -> list[dict]:
    """The run's metrics without what depends on the machine."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not any(part in k for part in TIMING)} for line in lines]
