"""Encoding and steps of training against what others do with the same model, texts and threads.

An export of SmolLM2-135M that embeds bidirectionally, with mean pooling and no prompt; texts of pydocs. The peers are
sentence-transformers, and for MNTP stock transformers as LLM2Vec's class uses it.

- encode: `UnifiedLM.encode` beside `SentenceTransformer.encode` at several batch sizes (it sorts by length, as we do); vectors
  are compared.
- step: forward and backward of the contrastive loss over pairs, temperature 0.05, beside `CachedMultipleNegativesRankingLoss`
  at several sizes of its small batches (GradCache, padded batches of each column); losses are compared. Ours forwards packs of
  2,048 tokens twice but one, or once with all graphs kept.
- mntp: forward and backward of masked next-token prediction over blocks of 128 tokens, 20 % masked, bidirectional, all weights
  (`--lora`: adapters of rank 16 with dropout 0.05 on every linear layer, ours and peft's). The other side computes the logits
  of every position, as the stock class does, in batches of 8 blocks; there is no padding. Losses are compared.

Each repetition runs all sides one after another, and a ratio is that of one repetition; the best size of the other side counts.

Usage: python benchmarks/peers.py encode|step|mntp [--lora] [--dtype bfloat16] [--rows 500] [--repetitions 3] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
from transformers import AutoModelForCausalLM, PreTrainedModel

from unified_lm.batch import IGNORE, Batch, Sample, make_batch
from unified_lm.config.schema import LoraConfig, ModelConfig
from unified_lm.core.allocator import keep_freed_memory
from unified_lm.core.distributed import local_device
from unified_lm.data.prompts.encoding import PromptEncoder
from unified_lm.data.prompts.templates import get_template
from unified_lm.data.pydocs.dataset import pydocs_file
from unified_lm.data.rows.records import RecordKind
from unified_lm.engine.accounting.throughput import describe_device
from unified_lm.engine.embedding_term import EmbeddingTerm
from unified_lm.engine.step import GradCacheStep
from unified_lm.engine.training_module import TrainingModule
from unified_lm.export.directory import export_model
from unified_lm.export.manifest import Manifest
from unified_lm.export.samples import embedding_sample
from unified_lm.inference import UnifiedLM
from unified_lm.inference.embedder import encode_texts
from unified_lm.models.backbone import Backbone
from unified_lm.models.loading import LoadedModel, load_model
from unified_lm.models.lora import apply_lora
from unified_lm.objectives import ContrastiveConfig, MaskedNextTokenConfig, build_objective

TEMPLATE, MAX_TOKENS, TEMPERATURE, BUDGET = "plain", 256, 0.05, 2048
BATCH_SIZES = (16, 32, 64, 128)
BLOCK = 128
STREAM = "pairs"

Sides = Mapping[str, Callable[[], object]]


def pairs(count: int) -> list[tuple[str, str]]:
    """A description and its object's documentation, some of each length."""
    _, file = pydocs_file("pairs", "train", RecordKind.PAIR)
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    chosen = rows[:: max(1, len(rows) // count)][:count]

    def text(value: object) -> str:
        """A text, or that of [instruction, text]."""
        return str(value[-1] if isinstance(value, list) else value)

    return [(text(row["query"]), text(row["pos"][0])) for row in chosen]


def _embedded(dtype: str) -> LoadedModel:
    return load_model(ModelConfig(source="embedded", name="smollm2-135m", family="llama", dtype=dtype))


def make_export(folder: Path, dtype: str) -> Path:
    """The embedded model as an export of both modes."""
    loaded = _embedded(dtype)
    manifest = Manifest(
        recipe="benchmark",
        base_model="smollm2-135m",
        family="llama",
        template=TEMPLATE,
        template_fields={},
        instructions={},
        max_tokens=MAX_TOKENS,
        dtype=dtype,
    )
    export_model(loaded.causal_lm, loaded.tokenizer, folder, manifest=manifest, template=get_template(TEMPLATE), verify="off")
    return folder


def timed(sides: Sides, repetitions: int) -> dict[str, list[float]]:
    """Seconds of each side, in turn; the first repetition is a warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for repetition in range(repetitions + 1):
        for name, run in sides.items():
            started = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if repetition:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def encode_sides(folder: Path, dtype: str, texts: list[str]) -> tuple[Sides, str]:
    """Both sides, and how much their vectors differ."""
    ours = UnifiedLM.from_pretrained(folder, dtype=dtype)
    theirs = SentenceTransformer(str(folder), model_kwargs={"dtype": getattr(torch, dtype)})
    sides: dict[str, Callable[[], object]] = {"unified_lm": lambda: ours.encode(texts)}
    for size in BATCH_SIZES:
        sides[f"sentence-transformers, batches of {size}"] = lambda size=size: theirs.encode(
            texts, batch_size=size, show_progress_bar=False
        )
    cosine = (ours.encode(texts) * theirs.encode(texts, show_progress_bar=False).astype(np.float32)).sum(-1)
    return sides, f"least cosine of their vectors {cosine.min():.6f}"


def step_sides(folder: Path, dtype: str, rows: list[tuple[str, str]]) -> tuple[Sides, str]:
    """Both sides, and their losses."""
    loaded = UnifiedLM.from_pretrained(folder, dtype=dtype)
    with loaded.borrow_backbone() as backbone:
        trainable = TrainingModule(backbone, "mean", {}).train()
    batch = _batch(loaded.prompt_encoder, rows)
    theirs = SentenceTransformer(str(folder), model_kwargs={"dtype": getattr(torch, dtype)}).train()
    columns = [theirs.preprocess([row[side] for row in rows]) for side in (0, 1)]
    columns = [{key: value.to(theirs.device) for key, value in c.items() if torch.is_tensor(value)} for c in columns]
    labels = torch.arange(len(rows), device=theirs.device)
    objective = build_objective(ContrastiveConfig(temperature=TEMPERATURE))

    def our_step(retained: int) -> float:
        """Loss of a step whose gradients are thrown away."""
        trainable.zero_grad(set_to_none=False)
        terms = [EmbeddingTerm({STREAM: objective}, {STREAM: 1.0})]
        return GradCacheStep(trainable, torch.Tensor.backward, {STREAM: 1.0}, terms, retained)(batch).total

    def their_step(size: int) -> float:
        """The same of the other side."""
        theirs.zero_grad(set_to_none=False)
        loss = CachedMultipleNegativesRankingLoss(theirs, scale=1 / TEMPERATURE, mini_batch_size=size)(columns, labels)
        loss.backward()
        return float(loss.detach())

    sides: dict[str, Callable[[], object]] = {
        "unified_lm": lambda: our_step(1),
        "unified_lm, all graphs kept": lambda: our_step(len(batch.packs)),
    }
    for size in BATCH_SIZES[:3]:
        sides[f"sentence-transformers' cached loss, {size}"] = lambda size=size: their_step(size)
    return sides, f"losses {our_step(1):.5f} and {their_step(16):.5f}"


def mntp_sides(folder: Path, dtype: str, rows: list[tuple[str, str]], lora: bool) -> tuple[Sides, str]:
    """Both sides, and their losses."""
    loaded, theirs = _embedded(dtype), _stock(folder, dtype)
    ids = np.array(loaded.tokenizer("\n".join(document for _, document in rows))["input_ids"])
    ids = ids[: BLOCK * (len(ids) // BLOCK)].reshape(-1, BLOCK)
    chosen = np.random.default_rng(0).random(ids.shape) < 0.2
    chosen[:, 0] = False
    labels, masked = np.where(chosen, ids, IGNORE), np.where(chosen, loaded.tokenizer.convert_tokens_to_ids("_"), ids)
    count = int(chosen.sum())
    model = loaded.causal_lm
    if lora:
        apply_lora(model, LoraConfig(r=16, alpha=32.0, dropout=0.05), seed=0)
        settings = PeftConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear")
        theirs = get_peft_model(theirs, settings).base_model.model
    objective = build_objective(MaskedNextTokenConfig())
    trainable = TrainingModule(Backbone(model, "auto"), "mean", {STREAM: objective}).train()
    step = GradCacheStep(trainable, torch.Tensor.backward, {STREAM: 1.0})
    blocks = zip(masked, labels, strict=True)
    samples = [
        Sample(input_ids=row, stream=STREAM, labels=label, bidirectional=(0, BLOCK), group=i)
        for i, (row, label) in enumerate(blocks)
    ]
    batch = make_batch(samples, BUDGET, {STREAM: float(count)}).to(local_device())

    def our_step() -> float:
        """Loss of a step whose gradients are thrown away."""
        trainable.zero_grad(set_to_none=False)
        return step(batch).total

    def their_step() -> float:
        """The same of the other side."""
        theirs.zero_grad(set_to_none=False)
        total = 0.0
        for start in range(0, len(masked), 8):
            inputs, wanted = (torch.from_numpy(part[start : start + 8]).to(local_device()) for part in (masked, labels))
            found = theirs(input_ids=inputs, labels=wanted, num_items_in_batch=count).loss
            found.backward()
            total += float(found.detach())
        return total

    return {"unified_lm": our_step, "stock transformers": their_step}, f"losses {our_step():.5f} and {their_step():.5f}"


def _stock(folder: Path, dtype: str) -> PreTrainedModel:
    """The export as a stock language model that is read bidirectionally, as LLM2Vec's class."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    model.config.is_causal = False
    return model.to(local_device()).train()


def _batch(encoder: PromptEncoder, rows: list[tuple[str, str]]) -> Batch:
    samples = []
    for slot in (0, 1):
        for group, item in enumerate(encode_texts(encoder, [row[slot] for row in rows], "", MAX_TOKENS)):
            sample = embedding_sample(item, "bidirectional")
            samples.append(type(sample)(**{**vars(sample), "stream": STREAM, "group": group, "slot": slot}))
    return make_batch(samples, BUDGET).to(local_device())


def main() -> None:
    """Print seconds, tokens and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("encode", "step", "mntp"))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rows", type=int, default=500, help="texts to encode, or pairs of a step")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--lora", action="store_true", help="adapters instead of all weights (mntp)")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as scratch:
        folder = make_export(Path(scratch) / "export", options.dtype)
        rows = pairs(options.rows)
        if options.what == "encode":
            sides, compared = encode_sides(folder, options.dtype, [document for _, document in rows])
        elif options.what == "mntp":
            sides, compared = mntp_sides(folder, options.dtype, rows, options.lora)
        else:
            sides, compared = step_sides(folder, options.dtype, rows)
        seconds = timed(sides, options.repetitions)
    print(f"{describe_device()}, {options.dtype}, {len(rows)} rows; {compared}")
    for name, values in seconds.items():
        print(f"{name:44} median {statistics.median(values):7.2f} s of {[round(v, 2) for v in values]}")
    own = [name for name in seconds if name.startswith("unified_lm")]
    others = [seconds[name] for name in seconds if name not in own]
    found = {}
    for name in own:
        ratios = [min(other) / ours for ours, other in zip(seconds[name], zip(*others, strict=True), strict=True)]
        found[name] = {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
        print(f"{name}: {found[name]['median']:.2f} times as fast [{min(ratios):.2f}, {max(ratios):.2f}]")
    if options.out is not None:
        options.out.write_text(json.dumps({"what": options.what, "dtype": options.dtype, "ratios": found}, indent=2))


if __name__ == "__main__":
    main()
