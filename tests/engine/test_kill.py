"""Law 5 on two processes: SIGKILL at random points, resume, and the parameters equal those of the uninterrupted run."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest

from tests.engine.small_run import equal, metrics, small_run, tensors
from tests.processes import NEEDS_DEEPSPEED, Group

EVERY = 2


def arguments(data: Path, run_dir: Path, backend: str, num_steps: int, *more: str) -> list[str]:
    return small_run(data, run_dir, f"parallel={backend}", f"max_steps={num_steps}", f"checkpoint.every={EVERY}", *more)


def wait_for_random_moment(group: Group, run_dir: Path, dice: random.Random, at_first_save: bool = False) -> str:
    """Until a random moment of a run that has just been started: between steps, or while it saves."""
    folder, log = run_dir / "checkpoints", run_dir / "metrics.jsonl"
    started = time.time()
    lines = log.read_text().count("\n") if log.exists() else 0
    kind = dice.choice(["at once", "between steps", "between steps", "while saving", "while saving", "while saving"])
    if at_first_save:
        while group.running and not _saves(folder, since=started):
            time.sleep(0.0002)
        return "while saving"
    if kind == "at once":
        time.sleep(dice.uniform(0, 5))
        return kind
    wanted = dice.randint(1, 3) if kind == "while saving" else dice.randint(1, 6)
    saves: set[str] = set()
    while group.running:
        written = log.read_text().count("\n") if log.exists() else 0
        if kind == "while saving":
            saves |= _saves(folder, since=started)
            if len(saves) >= wanted:
                break
        lines = min(lines, written)  # those of unsaved steps are cut off
        if kind == "between steps" and written >= lines + wanted:
            break
        time.sleep(0.001)
    time.sleep(dice.uniform(0, 0.03))
    return kind


def _saves(folder: Path, since: float) -> set[str]:
    """Checkpoints that are being written, without those that an earlier kill left."""
    found = set()
    for path in folder.glob(".step-*.building"):
        try:
            if path.stat().st_mtime > since:
                found.add(path.name)
        except FileNotFoundError:  # renamed meanwhile: it was there a moment ago
            found.add(path.name)
    return found


def hit_a_save(killed: list[str]) -> bool:
    """Whether a kill left an unfinished checkpoint behind. On a fast machine a save takes few of the milliseconds drawn."""
    return any(".building" in place for place in killed)


@pytest.mark.parametrize(
    ("backend", "num_kills", "more_kills"),
    [
        pytest.param("ddp", 4, 10, marks=pytest.mark.slow),
        pytest.param("zero2", 20, 10, marks=[NEEDS_DEEPSPEED, pytest.mark.slow]),
    ],
)
def test_sigkill_at_random_points(tmp_path, backend, num_kills, more_kills):
    """`more_kills`: the most at the first save, where the random ones have hit none."""
    num_steps = 10 + 3 * num_kills + EVERY * more_kills
    whole = Group(arguments(tmp_path, tmp_path / "whole", backend, num_steps), 2, tmp_path / "whole.log")
    assert whole.wait(600) == [0, 0], whole.output()

    run_dir, dice = tmp_path / "killed", random.Random(5)
    killed: list[str] = []
    starts = 0
    while len(killed) < num_kills or (not hit_a_save(killed) and len(killed) < num_kills + more_kills):
        starts += 1
        group = Group(arguments(tmp_path, run_dir, backend, num_steps, "resume=auto"), 2, tmp_path / f"{starts}.log")
        kind = wait_for_random_moment(group, run_dir, dice, at_first_save=len(killed) >= num_kills)
        last = run_dir / "checkpoints" / f"step-{num_steps:08d}"
        assert group.running, f"ended before it was killed: {killed}\n{group.output()}"
        assert not last.exists(), f"killed after the end: {killed}"
        if kind == "at once" or dice.random() < 0.5:
            group.kill()
        else:  # the other one is left alone, and must end by itself (torchrun would end it, too)
            group.processes[dice.randint(0, 1)].kill()
            assert all(code != 0 for code in group.wait()), group.output()
            assert "lost another process in '" in group.output()
        killed.append(f"{kind} ({', '.join(sorted(p.name for p in run_dir.glob('checkpoints/.step*')))})")
    group = Group(arguments(tmp_path, run_dir, backend, num_steps, "resume=auto"), 2, tmp_path / "last.log")
    assert group.wait(600) == [0, 0], group.output()
    print("\n".join(killed))

    assert hit_a_save(killed), "no kill hit a save"
    name = f"step-{num_steps:08d}"
    assert equal(tensors(tmp_path / "whole" / "checkpoints" / name), tensors(run_dir / "checkpoints" / name))
    assert metrics(run_dir) == metrics(tmp_path / "whole")
    assert not list(run_dir.glob("checkpoints/.step*")), "what killed runs left is swept"


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)], ids=lambda number: number.name
)
def test_a_signal_to_one_rank_loses_no_step(tmp_path, number):
    whole = Group(arguments(tmp_path, tmp_path / "whole", "ddp", 9), 2, tmp_path / "whole.log")
    assert whole.wait() == [0, 0], whole.output()

    run_dir = tmp_path / "stopped"
    group = Group(arguments(tmp_path, run_dir, "ddp", 9, "checkpoint.every=0"), 2, tmp_path / "first.log")
    while group.running and not ((run_dir / "metrics.jsonl").exists() and (run_dir / "metrics.jsonl").read_text()):
        time.sleep(0.001)
    group.signal(number, rank=1)
    assert group.wait() == [0, 0], group.output()
    steps = [line["step"] for line in metrics(run_dir)]
    assert 1 <= len(steps) < 9
    assert f"stopped by {number.name} after step {steps[-1]}" in group.output()
    assert "resume=auto" in group.output()
    assert (run_dir / "checkpoints" / f"step-{steps[-1]:08d}").is_dir(), "the step under way was saved"

    group = Group(arguments(tmp_path, run_dir, "ddp", 9, "resume=auto"), 2, tmp_path / "second.log")
    assert group.wait() == [0, 0], group.output()
    assert f"resuming from step-{steps[-1]:08d}" in group.output()
    assert metrics(run_dir) == metrics(tmp_path / "whole")
    last = "checkpoints/step-00000009"
    assert equal(tensors(tmp_path / "whole" / last), tensors(run_dir / last))


TOPOLOGIES = [
    pytest.param("ddp", 2, "single", 1, marks=pytest.mark.slow),
    pytest.param("single", 1, "ddp", 2, marks=pytest.mark.slow),
    pytest.param("zero2", 2, "single", 1, marks=NEEDS_DEEPSPEED),
    pytest.param("zero2", 2, "zero3", 2, marks=[NEEDS_DEEPSPEED, pytest.mark.slow]),
    pytest.param("zero3", 2, "ddp", 2, marks=[NEEDS_DEEPSPEED, pytest.mark.slow]),
    pytest.param("single", 1, "zero2", 2, marks=[NEEDS_DEEPSPEED, pytest.mark.slow]),
]


@pytest.mark.parametrize(("backend", "size", "other", "other_size"), TOPOLOGIES)
def test_a_checkpoint_resumes_on_another_topology(tmp_path, backend, size, other, other_size):
    """Without dropout the resumed run is the uninterrupted one, up to the order of sums."""
    more = ["model.attention_dropout=0.0", "optim.eps=1e-3"]  # an epsilon that does not amplify rounding
    whole = Group(arguments(tmp_path, tmp_path / "whole", backend, 6, *more), size, tmp_path / "whole.log")
    assert whole.wait() == [0] * size, whole.output()

    run_dir = tmp_path / "moved"
    resume = f"resume={tmp_path}/whole/checkpoints/step-00000004"
    group = Group(arguments(tmp_path, run_dir, other, 6, resume, *more), other_size, tmp_path / "moved.log")
    assert group.wait() == [0] * other_size, group.output()
    assert f"written by {backend} on {size} processes, this is {other} on {other_size}" in group.output()
    assert ("dropout masks differ" in group.output()) == (size != other_size)
    last = "checkpoints/step-00000006"
    expected, resumed = tensors(tmp_path / "whole" / last), tensors(run_dir / last)
    assert expected.keys() == resumed.keys()
    for kind, bound in (("weight/", 1e-6), ("exp_avg/", 1e-4), ("exp_avg_sq/", 1e-4)):
        names = [name for name in expected if name.startswith(kind)]
        squared = sum((expected[n] - resumed[n]).double().square().sum() for n in names)
        assert float((squared / sum(expected[n].double().square().sum() for n in names)).sqrt()) < bound, kind
    for expected_line, line in zip(metrics(tmp_path / "whole")[4:], metrics(run_dir), strict=True):
        assert (line["step"], line["tokens"]) == (expected_line["step"], expected_line["tokens"]), "the same data"
        assert line["loss"] == pytest.approx(expected_line["loss"], rel=1e-5)
