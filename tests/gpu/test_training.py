"""Laws 3, 4 and 5, the objectives and whole runs on CUDA."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.engine.exactness import Case, distance
from tests.engine.exactness import run as run_case
from tests.engine.small_run import equal, small_run, tensors
from tests.engine.test_step import distance as gradient_distance
from tests.engine.test_step import run as run_step
from tests.engine.tiny import make_samples, make_trainable
from unified_lm.batch import OutputHead, make_batch
from unified_lm.objectives.cross_entropy import linear_cross_entropy

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).resolve().parents[2]
CUDA = torch.device("cuda")


def train(*arguments: str, ranks: int | None = None) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [*(launcher if ranks else [sys.executable]), str(ROOT / "train.py"), *arguments]
    environment = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_law_4_gradcache_equals_direct(dropout: float) -> None:
    trainable = make_trainable(dropout=dropout).cuda()
    samples, counts = make_samples()
    batch = make_batch(samples, 60, counts).to(CUDA)
    losses, direct = run_step(trainable, batch, num_retained=len(batch.packs))
    cached_losses, cached = run_step(trainable, batch, num_retained=1)
    assert cached_losses.total == pytest.approx(losses.total, rel=1e-6)
    assert gradient_distance(cached, direct) < 1e-5


def test_law_3_the_split_into_packs_changes_nothing() -> None:
    trainable = make_trainable(dtype=torch.float64).cuda()
    samples, counts = make_samples()
    whole = run_step(trainable, make_batch(samples, 10_000, counts).to(CUDA))
    parts = run_step(trainable, make_batch(samples, 60, counts).to(CUDA))
    assert parts[0].total == pytest.approx(whole[0].total, rel=1e-6)
    assert gradient_distance(parts[1], whole[1]) < 1e-6


def test_the_gradients_are_those_of_the_cpu() -> None:
    samples, counts = make_samples()
    batch = make_batch(samples, 60, counts)
    on_cpu = run_step(make_trainable(), batch)
    on_gpu = run_step(make_trainable().cuda(), batch.to(CUDA))
    assert on_gpu[0].total == pytest.approx(on_cpu[0].total, rel=1e-5)
    assert gradient_distance({name: g.cpu() for name, g in on_gpu[1].items()}, on_cpu[1]) < 1e-4


def head(vocab: int, size: int, dtype: torch.dtype) -> tuple[torch.Tensor, OutputHead, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(3)
    hidden = torch.randn(700, size, generator=random).to(CUDA, dtype).requires_grad_()
    weight = (torch.randn(vocab, size, generator=random) / size**0.5).to(CUDA, dtype).requires_grad_()
    targets = torch.randint(vocab, (700,), generator=random).to(CUDA)
    return hidden, OutputHead(weight), targets, torch.full((700,), 0.5, device=CUDA)


def test_chunked_cross_entropy_is_that_of_whole_logits_and_takes_less_memory() -> None:
    hidden, output, targets, weights = head(49_152, 576, torch.bfloat16)
    logits = hidden.float() @ output.weight.float().T
    expected = (torch.nn.functional.cross_entropy(logits, targets, reduction="none") * weights).sum()
    wanted = torch.autograd.grad(expected, [hidden, output.weight])
    whole = logits.numel() * 4
    del logits
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = linear_cross_entropy(hidden, output, targets, weights)
    got = torch.autograd.grad(loss, [hidden, output.weight])
    extra = torch.cuda.max_memory_allocated() - before - output.weight.numel() * 2 - hidden.numel() * 2
    assert float(loss) == pytest.approx(float(expected), rel=1e-3)
    for mine, theirs in zip(got, wanted, strict=True):
        assert float((mine - theirs).float().norm() / theirs.float().norm()) < 1e-2
    assert extra < whole


@pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="needs liger-kernel")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ligers_kernel_gives_the_same_loss_and_gradients(dtype: torch.dtype) -> None:
    from unified_lm.objectives.liger import liger_cross_entropy, load_liger

    hidden, output, targets, weights = head(5_000, 128, dtype)
    weights[::3] = 0.25
    expected = linear_cross_entropy(hidden, output, targets, weights)
    got = liger_cross_entropy(load_liger(), hidden, output, targets, weights)
    bound = 1e-4 if dtype == torch.float32 else 1e-2
    assert float(got) == pytest.approx(float(expected), rel=bound)
    for mine, theirs in zip(
        torch.autograd.grad(got, [hidden, output.weight]), torch.autograd.grad(expected, [hidden, output.weight]), strict=True
    ):
        assert float((mine - theirs).float().norm() / theirs.float().norm()) < bound


def test_law_5_a_resumed_run_ends_bit_for_bit_where_the_uninterrupted_one_ends(tmp_path: Path) -> None:
    common = ["max_steps=6", "checkpoint.every=3", "streams.embedding.batch_size=8", "model.dtype=bfloat16"]
    train(*small_run(tmp_path, tmp_path / "whole", *common))
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    ends = [tmp_path / run / "checkpoints" / "step-00000006" for run in ("whole", "parts")]
    shutil.rmtree(ends[1])
    train(*small_run(tmp_path, tmp_path / "parts", *common, "resume=auto"))
    assert equal(tensors(ends[0]), tensors(ends[1]))


@pytest.mark.parametrize("backend", ["auto", "zero1", "zero2", "zero3"])
def test_a_backend_on_one_gpu_under_nccl_takes_the_steps_of_none(backend: str, tmp_path: Path) -> None:
    if backend != "auto":
        pytest.importorskip("deepspeed")
    common = ["max_steps=4", "model.attention_dropout=0", "streams.embedding.batch_size=8", "checkpoint.every=4"]
    train(*small_run(tmp_path, tmp_path / "single", *common))
    train(*small_run(tmp_path, tmp_path / backend, *common, f"parallel.backend={backend}"), ranks=1)
    states = [tensors(sorted((tmp_path / run / "checkpoints").glob("step-*"))[-1]) for run in ("single", backend)]
    assert distance(states[1], states[0], "weight/") < 1e-5


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_qlora_trains_and_exports(tmp_path: Path) -> None:
    done = train(*small_run(tmp_path, tmp_path / "run", "lora=qlora", "max_steps=4", "export.enabled=true"))
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") >= 4, done.stdout
    assert (tmp_path / "run" / "export" / "model.safetensors").exists()


@pytest.mark.parametrize("kind", ["grit", "mntp", "simcse", "supervised", "kto"])
def test_every_kind_of_training_takes_the_steps_of_the_cpu(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("single", kind, 70, steps=3)
    on_gpu = run_case_on(case, "cuda")
    monkeypatch.setattr("unified_lm.core.distributed.local_device", lambda: torch.device("cpu"))
    on_cpu = run_case_on(case, "cpu")
    assert distance(on_gpu, on_cpu, "weight/") < 1e-4


def run_case_on(case: Case, device: str) -> dict[str, torch.Tensor]:
    """A case of the exactness tests with module and batches on a device."""
    from tests.engine import exactness

    make, share = exactness.make_trainable, exactness.share
    try:
        exactness.make_trainable = lambda case: make(case).to(device)
        exactness.share = lambda case, seed: share(case, seed).to(torch.device(device))
        return run_case(case)
    finally:
        exactness.make_trainable, exactness.share = make, share
