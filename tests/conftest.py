"""Fixtures that every test may use."""

import gc
import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_configure(config: pytest.Config) -> None:
    """Without the tests for CUDA every other runs on the CPU, whatever the machine: their tolerances are its own."""
    if "not gpu" in config.option.markexpr:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_finish() -> None:
    """What is imported by now stays: a garbage collection need not look at it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder with parity tensors and small real data sets; tests that need it are skipped without it."""
    root = Path(os.environ.get("UNIFIED_LM_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    if not (root / "parity" / "manifest.json").exists():
        pytest.skip("needs the shared folder with parity tensors and data")
    return root
