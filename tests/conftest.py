"""Fixtures that every test may use."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder with parity tensors and small real data sets; tests that need it are skipped without it."""
    root = Path(os.environ.get("UNIFIED_LM_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    if not (root / "parity" / "manifest.json").exists():
        pytest.skip("needs the shared folder with parity tensors and data")
    return root
