"""A lock that a killed process left is removed, one that is held is not."""

from __future__ import annotations

import os

from unified_lm.engine.backends.extension_locks import remove_stale_locks


def test_only_locks_that_nobody_holds_are_removed(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    for name in ("stale", "held"):
        (tmp_path / "py311_cpu" / name).mkdir(parents=True)
        (tmp_path / "py311_cpu" / name / "lock").touch()
    held = tmp_path / "py311_cpu" / "held" / "lock"
    descriptor = os.open(held, os.O_RDONLY)
    try:
        assert remove_stale_locks() == [tmp_path / "py311_cpu" / "stale" / "lock"]
        assert held.exists()
    finally:
        os.close(descriptor)
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert remove_stale_locks() == [], "another node may hold it"
    os.utime(held, (0, 0))
    assert remove_stale_locks() == [held]
