"""Tests of what only a CUDA device can show. They carry the marker `gpu` and are deselected by default: `pytest -m gpu`."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _needs_cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
