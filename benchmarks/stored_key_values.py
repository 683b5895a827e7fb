"""Stored keys and values, by form: bytes, seconds to write and to read (cold and warm), and what each form does to the loss.

Documents of the embedded model, on the CPU. Times stand beside that of computing the same document in the same run. A cold
read is one after the system was told to forget the file's pages. With `--text`, documents are cut from a text file, and the
loss of what follows each of them is read from its cache in every form, among them forms that were not chosen: 8 bits with
other scales, and keys stored before their rotation.

    python benchmarks/stored_key_values.py [--tokens 250 1000 4000] [--text FILE --documents 12]
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from unified_lm.batch import Sample, make_pack
from unified_lm.config.schema import ModelConfig
from unified_lm.models.backbone import Backbone
from unified_lm.models.key_values import KeyValueCache, KeyValueReader
from unified_lm.models.loading import load_model
from unified_lm.models.rotation import Rotation
from unified_lm.retrieval.eight_bit import GROUP, dequantize, quantize
from unified_lm.retrieval.stored import FORMS, KeyValueStore

DOCUMENT = 512
TAIL = 128
"""Tokens of a document, and of what follows it, when the loss is measured."""

Form = Callable[[torch.Tensor], torch.Tensor]
"""What is left of keys or values `[K, T, d]`, float32, once they were stored."""


def seconds(work: Callable[[], object], repeats: int, before: Callable[[], object] = lambda: None) -> float:
    """Median time; `before` is not counted."""
    times = []
    for _ in range(repeats):
        before()
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return float(np.median(times))


def forget_pages(folder: Path) -> None:
    """Have the files of a folder read from the disk the next time."""
    for path in folder.rglob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)  # pages that are not written yet cannot be dropped
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_into_memory(store: KeyValueStore) -> None:
    """Read an entry and copy it, as generation does; until then it is a mapped file."""
    cache = store.get("document", "causal")
    assert cache is not None
    for keys, values in cache.layers:
        keys.clone(), values.clone()


def times(reader: KeyValueReader, tokens: int, repeats: int) -> None:
    """Print a line per form for a document of this length."""
    ids = np.random.default_rng(0).integers(3, reader.backbone.vocab_size, tokens)
    pack = make_pack([Sample(input_ids=ids, stream="s")])
    computed = seconds(lambda: reader.read(pack), 1)
    _, (cache,) = reader.read(pack)
    for form in FORMS:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            with KeyValueStore(folder, form) as store:
                write = seconds(partial(store.put, "document", "causal", cache), repeats)
                size = store.num_bytes
                flush = seconds(store.flush, 1)
                warm = seconds(partial(read_into_memory, store), repeats)
                cold = seconds(partial(read_into_memory, store), repeats, partial(forget_pages, folder))
            print(
                f"{tokens:5} tokens {form:>9} {size / tokens:8,.0f} bytes a token  computed {1e3 * computed:7.1f} ms  "
                f"write {1e3 * write:6.1f} + flush {1e3 * flush:5.1f}  read cold {1e3 * cold:6.1f} ({computed / cold:5.1f}x)   "
                f"warm {1e3 * warm:6.1f} ({computed / warm:5.1f}x)",
                flush=True,
            )


def shared_scale(dim: int, group: int = GROUP) -> Form:
    """8 bits, neighbors along a dimension sharing a scale."""

    def stored(values: torch.Tensor) -> torch.Tensor:
        numbers, scales = quantize(values, dim, group)
        return dequantize(numbers, scales, dim, group=group)

    return stored


def rounded(dtype: torch.dtype) -> Form:
    """Another dtype."""
    return lambda values: values.to(dtype).float()


def before_rotation(form: Form) -> Callable[[torch.Tensor, Rotation], torch.Tensor]:
    """Keys turned back to position 0, stored, and rotated when they are read."""

    def stored(keys: torch.Tensor, turn: Rotation) -> torch.Tensor:
        positions = torch.arange(keys.shape[1])
        return turn(form(turn(keys, -positions)), positions)

    return stored


def as_rotated(form: Form) -> Callable[[torch.Tensor, Rotation], torch.Tensor]:
    """Keys stored as they are."""
    return lambda keys, _: form(keys)


def variants() -> dict[str, tuple[Callable[[torch.Tensor, Rotation], torch.Tensor], Form]]:
    """Ways to store keys, and values, by what is printed."""
    same, token = rounded(torch.float32), shared_scale(-1)
    found = {}
    for name, form in (("bfloat16", rounded(torch.bfloat16)), ("float16", rounded(torch.float16))):
        found[name] = (as_rotated(form), form)
        found[f"{name}, keys before rotation"] = (before_rotation(form), form)
    keys = {"token": token} | {f"channel and {n} tokens": shared_scale(-2, n) for n in (32, GROUP, 128, DOCUMENT)}
    for name, form in keys.items():
        found[f"keys per {name}"] = (as_rotated(form), same)
        found[f"keys per {name}, before rotation"] = (before_rotation(form), same)
    found |= {f"values per {name}": (as_rotated(same), form) for name, form in keys.items()}
    found["8 bits: keys per channel, values per token"] = (as_rotated(shared_scale(-2)), token)
    found["8 bits: both per token"] = (as_rotated(token), token)
    return found


def places(reader: KeyValueReader, ids: np.ndarray, distance: int = 1000) -> None:
    """Print what storing keys before or after their rotation means for a document at the start, and for one that moves."""
    _, (cache,) = reader.read(make_pack([Sample(input_ids=ids, stream="s")]))
    positions = torch.arange(len(ids))
    keys = [k for k, _ in cache.layers]
    moved = [turn(k, distance) for k, turn in zip(keys, reader.rotations, strict=True)]
    for dtype in (torch.float32, torch.bfloat16):
        after = [k.to(dtype) for k in keys]
        before = [turn(k, -positions).to(dtype) for k, turn in zip(keys, reader.rotations, strict=True)]
        for name, stored, turns in (("after", after, (0, distance)), ("before", before, (positions, positions + distance))):
            for place, by, exact in zip(("at the start", "moved"), turns, (keys, moved), strict=True):

                def read(stored: list[torch.Tensor] = stored, by: torch.Tensor | int = by) -> list[torch.Tensor]:
                    same = isinstance(by, int) and by == 0
                    return stored if same else [turn(k, by) for k, turn in zip(stored, reader.rotations, strict=True)]

                error = np.mean([float((a.float() - b).norm() / b.norm()) for a, b in zip(read(), exact, strict=True)])
                took = 1e3 * seconds(read, 5)
                print(
                    f"{len(ids)} tokens, {str(dtype)[6:]:>8} stored {name:>6} rotation, {place:<12} "
                    f"{took:6.1f} ms   relative error {error:.1e}"
                )


@torch.no_grad()
def tail_logits(backbone: Backbone, cache: KeyValueCache, tail: torch.Tensor) -> torch.Tensor:
    """Logarithms of probabilities `[TAIL - 1, V]` of what follows a document."""
    with backbone.stock_attention() as model:
        past = cache.to_transformers(model.config)
        logits: torch.Tensor = model(input_ids=tail[None], past_key_values=past).logits[0, :-1]
    return logits.float().log_softmax(-1)


def losses(reader: KeyValueReader, ids: np.ndarray, documents: int, bidirectional: bool) -> None:
    """Print a line per variant: relative errors, and the change of the loss of what follows the documents, in nats a token."""
    rows: dict[str, list[tuple[float, float, float]]] = {}
    exact = []
    for start in np.linspace(0, len(ids) - DOCUMENT - TAIL, documents).astype(int):
        document, tail = ids[start : start + DOCUMENT], torch.from_numpy(ids[start + DOCUMENT : start + DOCUMENT + TAIL])
        span = (0, DOCUMENT) if bidirectional else (0, 0)
        _, (cache,) = reader.read(make_pack([Sample(input_ids=document, stream="s", bidirectional=span)]))
        picked = (torch.arange(TAIL - 1), tail[1:])
        exact.append(-float(tail_logits(reader.backbone, cache, tail)[picked].mean()))
        for name, (of_keys, of_values) in variants().items():
            layers = tuple(
                (of_keys(k, turn), of_values(v)) for (k, v), turn in zip(cache.layers, reader.rotations, strict=True)
            )
            loss = -float(tail_logits(reader.backbone, replace(cache, layers=layers), tail)[picked].mean())
            errors = [
                float(np.mean([(a[part] - b[part]).norm() / b[part].norm() for a, b in zip(layers, cache.layers, strict=True)]))
                for part in (0, 1)
            ]
            rows.setdefault(name, []).append((*errors, loss - exact[-1]))
    print(f"\n{documents} {'bidirectional' if bidirectional else 'causal'} documents, loss from float32 {np.mean(exact):.4f}")
    for name, row in rows.items():
        keys, values, change = np.mean(row, axis=0)
        deviation = np.std([r[2] for r in row], ddof=1) / len(row) ** 0.5
        print(f"{name:<55} keys {keys:.4f}  values {values:.4f}  loss {change:+.5f} +- {deviation:.5f}", flush=True)


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="*", default=(250, 1000, 4000))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--text", type=Path, help="a text file; without it no losses are measured")
    parser.add_argument("--documents", type=int, default=12)
    args = parser.parse_args()
    loaded = load_model(ModelConfig(source="embedded", name="smollm2-135m", family="llama", dtype="float32"))
    reader = KeyValueReader(Backbone(loaded.causal_lm, "sdpa").eval())
    for tokens in args.tokens:
        times(reader, tokens, args.repeats)
    places(reader, np.random.default_rng(0).integers(3, reader.backbone.vocab_size, 1000))
    if args.text:
        ids = np.array(loaded.tokenizer(args.text.read_text(encoding="utf-8"))["input_ids"])
        for bidirectional in (False, True):
            losses(reader, ids, args.documents, bidirectional)


if __name__ == "__main__":
    main()
