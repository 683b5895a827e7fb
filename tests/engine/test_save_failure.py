"""A disk that is full on one rank of two: both end with the same error, and the earlier checkpoint stays."""

from __future__ import annotations

import errno

from tests.engine.small_run import small_run
from tests.processes import Group
from unified_lm.checkpoint.store import find_checkpoint, list_checkpoints


def fill_the_disk_of_rank_1(rank: int) -> None:
    from unified_lm.checkpoint.tensor_shards import ShardWriter

    original = ShardWriter.add

    def add(self, name, tensor):
        if rank == 1 and "step-00000004" in str(self.path):
            raise OSError(errno.ENOSPC, "No space left on device")
        original(self, name, tensor)

    ShardWriter.add = add


def test_all_ranks_learn_of_a_full_disk(tmp_path):
    run_dir = tmp_path / "run"
    arguments = small_run(tmp_path, run_dir, "max_steps=9", "checkpoint.every=2", "checkpoint.keep_last=1")
    group = Group(arguments, 2, tmp_path / "log", prepare=fill_the_disk_of_rank_1)
    assert group.wait(60) == [2, 2], group.output()
    assert "step-00000004: rank 1: [Errno 28] No space left on device. What was there before is untouched." in group.output()
    assert "Traceback" not in group.output()
    assert [path.name for path in list_checkpoints(run_dir / "checkpoints")] == ["step-00000002"]
    assert find_checkpoint("auto", run_dir / "checkpoints").path == run_dir / "checkpoints" / "step-00000002"
    assert not list((run_dir / "checkpoints").glob(".*")), "the unfinished folder is removed"
