"""Peak memory of loading a model, of a run's start and of exports, in bytes per parameter, with a random Llama model.

Each measurement is in a process of its own, above what the process takes once its libraries are imported: `load_model`;
`start`, a run until its first step (rows read, leaks probed, nothing trained), with adapters or `full`; `resume`, the same of a
finished run, whose checkpoint is read; `export_model` beside a loaded model with adapters, as a run exports itself; and
`unified-lm export RUN`. Resident memory counts pages of memory-mapped files, which the system takes back when it needs them;
anonymous memory is what must be there.

Usage: python benchmarks/export_memory.py [--parameters 1e9] [--dtype bfloat16]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from unified_lm.assembly import build_run
from unified_lm.assembly.checkpoints import export_checkpoint
from unified_lm.cli.script import train
from unified_lm.composition.compose import compose_run
from unified_lm.config.schema import VERIFICATIONS, LoraConfig, ModelConfig
from unified_lm.data.prompts.templates import get_template
from unified_lm.export.directory import export_model
from unified_lm.export.manifest import Manifest
from unified_lm.models.loading import LoadedModel, load_model
from unified_lm.models.lora import apply_lora
from unified_lm.models.tiny import tiny_tokenizer

LORA = LoraConfig(r=16, alpha=32.0, dropout=0.0)
STAGES = ("load", "start", "resume", "export", "command")
_WIDTH, _WIDE, _VOCABULARY = 2048, 5632, 32_000


def memory(field: str) -> int:
    """A field of this process's /proc status, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


@contextmanager
def peaks(found: dict[str, int]) -> Iterator[None]:
    """Note the largest resident and anonymous memory while the block runs, above what it was before."""
    fields = {"resident": "VmRSS", "anonymous": "RssAnon"}
    before, done = {name: memory(field) for name, field in fields.items()}, threading.Event()
    found |= dict.fromkeys(fields, 0)

    def watch() -> None:
        """Sample until the block ends."""
        while not done.wait(0.01):
            for name, field in fields.items():
                found[name] = max(found[name], memory(field) - before[name])

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def write_base(folder: Path, parameters: float, dtype: str) -> None:
    """A random Llama model of about this size, with a byte-level tokenizer."""
    layer = 3 * _WIDTH * _WIDE + 3 * _WIDTH * _WIDTH
    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=_WIDTH,
        intermediate_size=_WIDE,
        num_hidden_layers=max(1, round((parameters - 2 * _VOCABULARY * _WIDTH) / layer)),
        num_attention_heads=16,
        num_key_value_heads=8,
        dtype=dtype,
    )
    torch.set_default_dtype(getattr(torch, dtype))
    LlamaForCausalLM(config).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)
    tiny_tokenizer().save_pretrained(folder)


def load(base: Path, dtype: str) -> LoadedModel:
    """The model as a run starts with it."""
    return load_model(ModelConfig(name=str(base), family="llama", dtype=dtype))


def run_arguments(base: Path, folder: Path, dtype: str, *, full: bool = False) -> list[str]:
    """A run of one step, with adapters or all weights, not exported."""
    rows = folder / "rows.jsonl"
    rows.write_text('{"text": "one sentence"}\n{"text": "another one"}\n')
    model = ["model.source=hub", f"model.name={base}", "model.family=llama", f"model.dtype={dtype}"]
    stream = ["streams.simcse.batch_size=2", f"streams.simcse.sources=[{{path: {rows}}}]"]
    lora = ["lora=all_linear", f"lora.r={LORA.r}", f"lora.alpha={LORA.alpha}", f"lora.dropout={LORA.dropout}"]
    run = ["max_steps=1", "export.enabled=false", "logging.progress=false", f"run_dir={folder / ('full' if full else 'run')}"]
    return ["recipe=llm2vec_simcse", *model, *stream, *(["lora=none"] if full else lora), *run]


def measure(stage: str, folder: Path, dtype: str, verify: str) -> None:
    """Run one stage in this process, and print its peaks in bytes per parameter."""
    found: dict[str, int] = {}
    base, out = folder / "base", folder / f"{stage}-{verify}"
    started = time.perf_counter()
    with peaks(found):
        if stage == "command":
            export_checkpoint(folder / "run", out, Console(stderr=True), verify=verify)
        elif stage == "start":
            build_run(compose_run([*run_arguments(base, folder, dtype, full=verify == "full"), f"run_dir={out}"]))
        elif stage == "resume":
            train([*run_arguments(base, folder, dtype), "resume=auto"])
        else:
            loaded = load(base, dtype)
        if stage == "export":
            apply_lora(loaded.causal_lm, LORA, seed=0)
            manifest = Manifest(recipe="memory", base_model="random", family="llama", template="grit", template_fields={})
            template = get_template("grit")
            export_model(loaded.causal_lm, loaded.tokenizer, out, manifest=manifest, template=template, verify=verify)
    size = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    parameters = size / getattr(torch, dtype).itemsize
    per_parameter = "  ".join(f"{name} {value / parameters:5.2f}" for name, value in found.items())
    print(f"{stage:8} {parameters / 1e9:.2f}e9 {dtype} {verify:8} {per_parameter}  {time.perf_counter() - started:5.1f} s")


def main() -> None:
    """Write the model and the run, then measure each stage in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=1e9)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--verify", choices=VERIFICATIONS, default="off", help=argparse.SUPPRESS)
    parser.add_argument("--stage", choices=("base", "run", *STAGES), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage == "base":
        write_base(options.folder / "base", options.parameters, options.dtype)
    elif options.stage == "run":
        train(run_arguments(options.folder / "base", options.folder, options.dtype))
    elif options.stage:
        measure(options.stage, options.folder, options.dtype, options.verify)
    else:
        with tempfile.TemporaryDirectory() as folder:
            starts = [("load", "off"), ("start", "off"), ("resume", "off"), ("start", "full")]
            measured = [*starts, *((stage, verify) for verify in VERIFICATIONS for stage in ("export", "command"))]
            for stage, verify in [("base", "off"), ("run", "off"), *measured]:
                arguments = [*sys.argv[1:], "--stage", stage, "--folder", folder, "--verify", verify]
                quiet = stage in ("base", "run")
                subprocess.run([sys.executable, __file__, *arguments], check=True, stdout=subprocess.DEVNULL if quiet else None)


if __name__ == "__main__":
    main()
