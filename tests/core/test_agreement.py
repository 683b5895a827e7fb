"""What ranks agree on without a collective."""

from __future__ import annotations

from pathlib import Path

from tests.processes import run_on_ranks
from unified_lm.core import distributed
from unified_lm.core.agreement import fail_alike
from unified_lm.core.errors import DataError


def fail() -> list[bool]:
    rank = distributed.rank()
    same = fail_alike(DataError("no row"), "same")
    other = fail_alike(DataError(f"file of rank {rank}"), "other", seconds=0.5)
    alone = rank == 0 and fail_alike(DataError("no row"), "alone", seconds=0.5)
    bug = fail_alike(ValueError("a bug"), "bug")
    return [same, other, alone, bug]


def test_only_the_same_error_of_the_user_on_every_rank_is_alike(tmp_path: Path) -> None:
    assert run_on_ranks(fail, 2, tmp_path) == [[True, False, False, False]] * 2
    assert fail() == [True, True, True, True], "one process always agrees with itself"
